//! The daemon's interface: JSON-RPC 2.0 over WebSocket on a Unix socket, one trait per namespace.
//!
//! Long work answers at once with an operation; `operation.watch` streams its progress and its end.
//! Errors carry a stable [`error::ErrorKind`] and a hint. With feature `server` the traits have their
//! server halves, with `client` their client halves and [`client::connect`].

#[cfg(feature = "client")]
pub mod client;
pub mod daemon;
pub mod error;
pub mod image;
pub mod operation;
pub mod plugin;
#[cfg(any(feature = "server", feature = "client"))]
pub mod rpc;
pub mod vm;
pub mod workspace;

pub use daemon::*;
pub use error::{ErrorKind, Problem};
pub use image::*;
pub use operation::*;
pub use plugin::*;
pub use vm::*;
pub use workspace::*;

/// Version of this interface; a client and a daemon whose majors differ do not talk.
pub const API_VERSION: &str = "1.0";
