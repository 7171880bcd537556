//! The host with real components, well-behaved and hostile.

#![expect(clippy::unwrap_used, reason = "what helps tests may fail like one")]

mod common;

mod cache;
mod good;
mod hostile;
mod importer;
mod measure;
mod names;
