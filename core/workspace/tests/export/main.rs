//! A guest's work brought back to the host. The guest is a directory that is filled from the workspace's archives, worked in with
//! real git, and listed and packed as a guest's agent does.

#![expect(clippy::unwrap_used, reason = "a test may panic; clippy knows no helper as part of one")]

mod beforehand;
mod branch;
mod files;
mod generated;
mod hostile;
mod patch;
mod programs;
#[path = "../common/seed.rs"]
mod seed;
mod submodules;
mod within;
mod world;
