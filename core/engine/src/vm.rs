//! A VM's life.
//!
//! ```text
//!  create ──> Stopped ⇄ start/stop ⇄ Running        cell     what is known of one VM, and who works on it
//!     │          │                      │           create   record, address, keys, disk
//!     └──────────┴──────> delete <──────┘           start    network, initramfs, shim, agent
//!                                                   stop     shutdown, kill, and the VMM's own end
//!                                                   (after the daemon was away: `crate::reconcile`)
//! ```

pub mod cell;
pub mod change;
pub mod create;
mod delete;
mod disk;
mod disk_limits;
pub(crate) mod ended;
mod expire;
mod fill;
mod guest;
mod hooks;
mod limits;
mod planned;
pub mod prune;
mod replan;
pub(crate) mod start;
pub mod state;
mod stop;
mod visit;

pub use disk_limits::LimitsRequest;
pub use hooks::HookReport;
pub use replan::Answer;
pub(crate) use vm_host::clock::unix_seconds as now;
