//! What the server has done, for the doctor.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Answers from the zones, "no" included.
    pub zone: u64,
    /// Answers that an upstream gave.
    pub forwarded: u64,
    /// Answers of an upstream that were still remembered.
    pub cached: u64,
    /// Calls of the resolver that were late, failed or panicked.
    pub resolver_failures: u64,
    /// Questions that no upstream answered.
    pub upstream_failures: u64,
    /// Questions beyond a limit.
    pub overload: u64,
    /// Questions of strangers, answered or dropped.
    pub strangers: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) zone: AtomicU64,
    pub(crate) forwarded: AtomicU64,
    pub(crate) cached: AtomicU64,
    pub(crate) resolver_failures: AtomicU64,
    pub(crate) upstream_failures: AtomicU64,
    pub(crate) overload: AtomicU64,
    pub(crate) strangers: AtomicU64,
}

pub(crate) fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed)
}

impl Counters {
    pub(crate) fn read(&self) -> Stats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            zone: read(&self.zone),
            forwarded: read(&self.forwarded),
            cached: read(&self.cached),
            resolver_failures: read(&self.resolver_failures),
            upstream_failures: read(&self.upstream_failures),
            overload: read(&self.overload),
            strangers: read(&self.strangers),
        }
    }
}
