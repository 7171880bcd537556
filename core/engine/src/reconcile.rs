//! What a daemon that comes back does: the host is made to agree with what should be.
//!
//! ```text
//!   records ──┐
//!   journals ─┼─> Plan (pure) ──> apply, over all VMs:  processes ─> disks ─> network ─> files ─> what is known of them
//!   the host ─┘                                          adopt         undo     undo       undo     store, report
//! ```
//!
//! [`plan`] decides and touches nothing; [`apply`] does it, layer by layer over all VMs: a VMM is gone before its disks and taps
//! are, and files, which say where the others are, go last. A VM for which a step fails goes no further, is shown as failed and
//! stops no other. What carries our instance's names and is in nobody's journal is reclaimed; another instance's is never
//! looked at. [`report`] is what `vm doctor` and the event log tell of it.

pub(crate) mod apply;
pub mod plan;
pub mod report;

pub use plan::{Found, HostFacts, Plan, Processes, Verdict, VmFacts};
pub use report::Recovery;
