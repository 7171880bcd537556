//! Plugins: sandboxed WASM components that decide what happens around a VM.
//!
//! ```text
//!   plugin.toml ──> Manifest ──────────────┐
//!   component ──> Cache ──> Parts (hooks)  ├──> Plugin ──> Plugins, in order
//!   operator ──> Granted, configuration ───┘      │
//!                                                 │ call(hook, Input)
//!                        fresh instance, limits   ▼
//!   Sandbox, StateStore, Blob <──── broker ──── component
//!                                     │
//!                     planned effects │ form checked as they come
//!                                     ▼
//!                        Grants::check ──> Outcome { plan, findings, … }
//! ```
//!
//! The interface is the package `vm:plugin` in `wit/`. A component plans; nothing here changes the host, and nothing here
//! knows what a plan's effects do. What acts at once, acts in a guest that runs, through [`ports::Sandbox`].
//!
//! A component of world `dns` lives longer than a call: [`Resolver`].

mod bindings;
mod broker;
mod cache;
pub mod call;
mod digest;
pub mod error;
mod forms;
pub mod grant;
pub mod limits;
pub mod log;
pub mod manifest;
pub mod order;
mod parts;
mod plugin;
mod plugins;
pub mod ports;
mod resolver;
mod runtime;
pub mod schema;
mod stats;
mod wasi;

pub use broker::Query;
#[cfg(feature = "compiler")]
pub use cache::compile_main;
pub use cache::{Compiler, MAX_COMPONENT};
pub use call::{Change, Finding, Input, Outcome, Severity, VmFacts};
pub use error::{CallError, Excess, LoadError, PluginError};
pub use grant::{Grant, Granted, Grants};
pub use limits::Limits;
pub use manifest::{Manifest, World};
pub use plan::Plan;
pub use plugin::Plugin;
pub use plugins::{Installed, Plugins, Unloaded};
pub use resolver::{Record, ResolveError, Resolved, Resolver};
pub use runtime::Runtime;
pub use stats::{Disabled, HookStats};
pub use vm_types::{Hook, hook, plan};

/// The version of `vm:plugin` that this host has.
pub const WIT_VERSION: &str = "0.1.0";
