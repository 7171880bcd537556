//! What should be: VMs, images, kernels, plugins with their state, workspaces in VMs, and a few facts about the daemon, in one
//! SQLite database.
//!
//! ```text
//!   Store (Clone, Send) ──bounded channel──> one thread ──> Connection
//!     .vms() .images() .kernels() .plugins() .workspaces() .meta()    runs each request to its end
//! ```
//!
//! One thread owns the connection, so there is no lock to hold across an await and none to
//! poison. A request that was sent is carried out even if the future waiting for its answer is
//! dropped. This crate holds intent only; what *is* comes from the host, see `vm-engine`.

pub mod builds;
pub mod error;
pub mod images;
pub mod kernels;
pub mod meta;
mod migrations;
pub mod plugins;
mod rows;
pub mod store;
pub mod vms;
pub mod workspaces;

pub use builds::{BuildStep, Builds};
pub use error::StoreError;
pub use images::Images;
pub use kernels::Kernels;
pub use meta::Meta;
pub use plugins::{PluginFailures, PluginRecord, Plugins};
pub use store::Store;
pub use vms::Vms;
pub use workspaces::Workspaces;
