//! Write plugins for vmd: sandboxed WASM components that decide what happens around a VM.
//!
//! A plugin is a type that holds its configuration. It implements the trait of each hook in which it has something to do, and
//! one macro exports exactly those:
//!
//! ```
//! use serde::Deserialize;
//! use vm_plugin_sdk::{Context, Facts, Preflight, Report, Result, Vm, capability};
//!
//! #[derive(Deserialize)]
//! #[serde(rename_all = "kebab-case")]
//! struct Limits {
//!     max_cpus: u32,
//! }
//!
//! impl Preflight for Limits {
//!     fn run(&self, _: &Context, vm: &Vm, _: &Facts, report: &Report) -> Result {
//!         if vm.cpus() > self.max_cpus {
//!             let message = format!("{} wants {} CPUs, {} are allowed", vm.name(), vm.cpus(), self.max_cpus);
//!             report.failure("cpus", &message, Some("start it with fewer: --cpus"));
//!         }
//!         Ok(())
//!     }
//! }
//!
//! capability!(Limits: Preflight);
//! ```
//!
//! The crate type is `cdylib`, the target `wasm32-unknown-unknown`, the linker `wasm-component-ld`, which comes with
//! Rust: `.cargo/config.toml` beside the manifest says so, and a plain `cargo build` ends in a component.
//!
//! ```toml
//! [target.wasm32-unknown-unknown]
//! linker = "wasm-component-ld"
//! ```
//!
//! Such a component imports nothing but what it uses of `vm:plugin`: no files, no clock, no network. The methods of the host's
//! types exist only inside of it. In unit tests, which run natively, they panic; keep what is worth a test in functions of
//! plain values.

#[doc(hidden)]
pub mod bindings;
mod error;
mod hooks;
mod job;
pub mod log;
mod macros;
mod runtime;

pub use bindings::{
    dns::exports::vm::plugin::resolver::{Answer, DnsRecord},
    imports::vm::plugin::{
        directory::{Query, Vms},
        host::{Blob, Context, Facts, Reference, Report, Vm},
        live::{Command, Output, Sandbox},
        plan::{GuestConfig, HostPlan, MachineConfig, Rule},
        repository::{Difference, Job, Offers, Repo},
        state,
        types::{Error, Lifetime, Outcome},
    },
};
pub use error::OrRefuse;
pub use hooks::{
    Cleanup, ConfigChange, ContributeGuest, ContributeMachine, Doctor, Importer, PostStart, Preflight,
    PrepareHost, Resolver,
};
#[doc(hidden)]
pub use runtime::Adapter;

/// What a hook answers. An error is for people too: it has a code, a message and best a hint.
pub type Result<T = ()> = core::result::Result<T, Error>;
