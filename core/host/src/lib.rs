//! Seams to the host that several crates share: commands ([`run`]), processes that cannot be
//! mistaken for others ([`process`]) and files that are whole or absent ([`files`]).
//!
//! It decides nothing and keeps no state.

pub mod clock;
pub mod files;
pub mod process;
pub mod run;

pub use run::{HostCommand, HostRunner, RunError, RunOutput, Runner};
