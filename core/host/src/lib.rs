//! Seams to the host that several crates share: commands ([`run`]), processes that cannot be
//! mistaken for others ([`process`]), files that are whole or absent ([`files`]), Unix sockets that are no links ([`socket`]), HTTP over
//! them (`http`) and taps ([`tap`]).
//!
//! It decides nothing and keeps no state.

pub mod clock;
pub mod files;
#[cfg(feature = "http")]
pub mod http;
pub mod process;
pub mod run;
pub mod socket;
pub mod tap;

#[cfg(feature = "http")]
pub use http::{HttpClient, HttpError};
pub use run::{HostCommand, HostRunner, RunError, RunOutput, Runner};
