//! The host's side of the guests' network: one bridge, a tap for each VM, and one nftables table.
//!
//! ```text
//!   guest ── tap ──┐
//!   guest ── tap ──┴─ bridge (gateway address) ── table inet vmd_3f2a ── uplink
//! ```
//!
//! [`Net`] applies the effects [`Bridge`], [`Tap`], [`Firewall`], [`Rules`], [`Port`], [`LinkDns`] and [`Sysctl`]; [`HostNet`]
//! does so for real, [`FakeNet`] in memory. Every name contains the daemon's instance id (see [`names`]), so a thing can be found without any record, and what
//! has the name but another nature is never touched. This crate decides no policy: which
//! address a VM gets and when effects are applied is the engine's.
//!
//! [`Bridge`]: vm_types::Effect::Bridge
//! [`Tap`]: vm_types::Effect::Tap
//! [`Firewall`]: vm_types::Effect::Firewall
//! [`Rules`]: vm_types::Effect::Rules
//! [`Port`]: vm_types::Effect::Port
//! [`LinkDns`]: vm_types::Effect::LinkDns
//! [`Sysctl`]: vm_types::Effect::Sysctl

pub mod addresses;
pub mod error;
pub mod fake;
pub mod firewall;
pub mod foreign;
pub mod host;
mod links;
pub mod names;
pub mod net;
mod nft;
mod ports;
mod resolved;
pub mod resolvers;
mod rules;
pub mod subnet;
mod sysctl;

pub use error::NetError;
pub use fake::FakeNet;
pub use foreign::{Blocker, Hook};
pub use host::HostNet;
pub use net::Net;
pub use resolvers::resolvers;
pub use subnet::{HostRoute, pick_subnet};
