//! A guest's work brought back to the host. The guest is a directory that is filled from the workspace's archives, worked in with
//! real git, and listed and packed as a guest's agent does.

mod branch;
mod files;
mod generated;
mod hostile;
mod patch;
mod world;
