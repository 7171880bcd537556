//! Workspaces on real repositories: what goes into a guest is what the host has. A guest is a directory here, into which
//! archives are unpacked.

mod bench;
mod differences;
mod generated;
mod guest;
mod history;
mod identity;
mod inspection;
mod packing;
mod repo;
