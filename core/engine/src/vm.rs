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
pub mod create;
mod delete;
mod guest;
mod recover;
mod start;
mod stop;
