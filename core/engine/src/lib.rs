//! The engine: what happens to VMs, images and kernels, and in which order.
//!
//! ```text
//!  request ─> Operations (ops) ─> vm::{create,start,stop,delete} ─> Scope::apply / unwind (effects)
//!                                        │                                │
//!                                     Store (intent)            journal + handles.json (what is)
//! ```
//!
//! Long work reserves its VM by the state in its [`vm::cell::Cell`] and holds no lock meanwhile; images and kernels
//! are made under one lock of their own. It knows drivers only by their traits.

pub mod effects;
mod engine;
pub mod error;
pub mod events;
#[cfg(feature = "failpoints")]
mod failpoint;
mod images;
pub mod journal;
mod keys;
mod network;
pub mod ops;
pub mod vm;

pub use engine::{Engine, Parts, Settings, SubnetChoice};
pub use error::EngineError;
pub use images::KernelSource;
