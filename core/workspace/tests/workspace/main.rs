//! Workspaces on real repositories: what goes into a guest is what the host has. A guest is a directory here, into which
//! archives are unpacked.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod bench;
mod differences;
mod generated;
mod guest;
mod history;
mod identity;
mod inspection;
mod packing;
mod places;
mod repo;
#[path = "../common/seed.rs"]
mod seed;
mod submodules;
