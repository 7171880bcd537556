//! The host with real components, well-behaved and hostile.

mod common;

mod cache;
mod good;
mod hostile;
mod measure;
mod names;
