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
pub(crate) mod ended;
mod expire;
mod guest;
pub mod prune;
pub(crate) mod start;
pub mod state;
mod stop;

/// Seconds since the Unix epoch.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
