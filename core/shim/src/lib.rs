//! The per-VM shim and its clients.
//!
//! ```text
//!  vmd ──starts──> vmd shim ──parent of──> VMM            (PDEATHSIG: the VMM never outlives its shim)
//!   │                │  ├─ stdin/stdout ── serial console ── console.log(.1), console.sock
//!   │                │  ├─ stderr ──────── vmm.log(.1)
//!   │                │  ├─ channel.sock ── guest's agent ─── ssh.sock, control.sock
//!   │                │  ├─ events.sock ─── how the guest ended (or, without it, the console's last lines)
//!   │                │  ├─ vmm/ ────────── sockets and pipes of a VMM that takes its machine by requests, and makes them itself
//!   └─ shim.sock ────┘  └─ end of the VMM: exit.json, then the shim ends
//! ```
//!
//! [`main`] is the shim: one thread, no decisions, no restarts. It outlives the daemon and is the only
//! one that can know how the VMM ended. [`client`] is the daemon's side of its sockets and files,
//! [`control`] speaks to the guest's agent through it, and [`effect`] is what the engine needs to
//! apply, observe and undo `Effect::Shim`.
//!
//! The VMM may be locked into a [`jail`], which the shim's own program puts around it. The shim knows no VMM by name, and touches nothing but the VM's own two directories.

pub mod client;
pub mod control;
pub mod effect;
pub mod error;
pub mod identity;
pub mod jail;

mod activity;
mod console;
mod events;
mod halt;
mod inherit;
mod lines;
mod link;
mod log;
mod own_dir;
mod prepare;
mod setup;
mod sockets;
mod supervise;
mod words;

pub use client::{ShimStatus, console_tail, exit_record, find, kill, launch, spec, status};
pub use control::{AgentInfo, ControlClient, ControlError, EndedProcesses, connect_control};
pub use error::{ShimError, StartError};
pub use identity::verify;
pub use sockets::share;
pub use supervise::main;
