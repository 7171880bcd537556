//! A VM's life.
//!
//! ```text
//!  create ──> Stopped ⇄ start/stop ⇄ Running        cell     what is known of one VM, and who works on it
//!     │          │                      │           create   record, address, keys, disk
//!     └──────────┴──────> delete <──────┘           start    network, initramfs, shim, agent
//!                                                   stop     shutdown, kill, and the VMM's own end
//!                                                   recover  after the daemon was away
//! ```

pub mod cell;
pub mod change;
pub mod create;
mod delete;
mod ended;
mod expire;
mod guest;
pub mod prune;
mod recover;
mod start;
pub mod state;
mod stop;

/// Seconds since the Unix epoch.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
