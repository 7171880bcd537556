//! Images and kernels with the host's real tools. Needs root; two tests download.

#![expect(clippy::unwrap_used, reason = "a test may panic; clippy knows no helper as part of one")]

mod bundle;
mod common;
mod debian;
mod fuzz;
mod kernel;
mod layers;
mod layout;
mod measure;
mod rootfs;
mod stacks;
mod writable;
