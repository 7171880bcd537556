//! The engine: what happens to VMs, images and kernels, and in which order.
//!
//! ```text
//!  request ─> Operations (ops) ─> vm::{create,start,stop,delete} ─> Scope::apply / unwind (effects)
//!                                        │                                │
//!                                     Store (intent)            journal + handles.json (what is)
//! ```
//!
//! Long work reserves its VM by the state in its [`vm::cell::Cell`] and holds no lock meanwhile. Locks are typed: `vm-locks` has
//! their order, and whoever may take long asks for a context that holds none. It knows drivers only by their traits.

pub mod admission;
pub mod effects;
mod engine;
pub mod error;
pub mod events;
#[cfg(feature = "failpoints")]
mod failpoint;
mod flights;
mod images;
pub mod journal;
mod kernels;
mod keys;
mod network;
pub mod ops;
pub mod ports;
pub mod reconcile;
mod taps;
#[cfg(test)]
mod testing;
pub mod vm;
pub mod workspaces;

pub use engine::{Engine, Parts, Settings, SubnetChoice};
pub use error::EngineError;
pub use images::{
    build::{BuildRequest, ContextError},
    commit::CommitRequest,
    oci::Registries,
};
pub use reconcile::Recovery;
