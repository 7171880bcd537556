//! Data that crosses crate, process or guest boundaries: ids, names, specifications, the guest's
//! configuration and control messages, host effects, the shim's contract and the on-disk layout.
//!
//! This crate holds data and its validation only. It does no I/O and knows no driver.

pub mod effect;
pub mod event;
pub mod guest;
pub mod hook;
pub mod id;
pub mod image;
mod kind;
pub mod layout;
pub mod machine;
pub mod operation;
pub mod plan;
pub mod plugin;
pub mod report;
pub mod shim;
pub mod vm;
pub mod workspace;

pub use effect::{Cgroup, Effect, EffectId, EffectKind, Handle, Layer, Observed, ProcessRef};
pub use event::{Event, EventKind};
pub use hook::Hook;
pub use id::{ImageDigest, InstanceId, KernelId, OperationId, VmId, VmName};
pub use kind::ErrorKind;
pub use layout::{Layout, VmPaths};
