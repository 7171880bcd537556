//! What plugins did: for doctor, and for deciding that one has failed often enough.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{error::CallError, hook::Hook};

/// Calls of one hook.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HookStats {
    /// All.
    pub calls: u64,
    /// Those that gave an error of any kind.
    pub errors: u64,
    /// Those of them that were faults: traps, limits, time-outs.
    pub faults: u64,
    /// Time in all.
    pub total: Duration,
    /// The longest.
    pub longest: Duration,
}

/// A plugin that is not called any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disabled {
    /// Faults of one hook in a row.
    pub failures: u32,
    /// The last one.
    pub last: String,
}

#[derive(Debug, Default)]
struct Counts {
    hooks: BTreeMap<Hook, HookStats>,
    /// Faults in a row, of each hook: that others do what they should mends none of them.
    in_a_row: BTreeMap<Hook, u32>,
    disabled: Option<Disabled>,
}

/// One plugin's.
#[derive(Debug, Default)]
pub(crate) struct Stats(Mutex<Counts>);

impl Stats {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call. Says whether this one was one fault too many.
    pub(crate) fn count(&self, hook: Hook, took: Duration, error: Option<&CallError>, most: u32) -> bool {
        let mut counts = self.lock();
        let stats = counts.hooks.entry(hook).or_default();
        stats.calls += 1;
        stats.total += took;
        stats.longest = stats.longest.max(took);
        stats.errors += u64::from(error.is_some());
        let Some(fault) = error.filter(|error| error.is_fault()) else {
            counts.in_a_row.remove(&hook);
            return false;
        };
        stats.faults += 1;
        let in_a_row = counts.in_a_row.entry(hook).or_default();
        *in_a_row += 1;
        let failures = *in_a_row;
        let now = failures >= most && counts.disabled.is_none();
        if now {
            counts.disabled = Some(Disabled { failures, last: fault.to_string() });
        }
        now
    }

    pub(crate) fn disabled(&self) -> Option<Disabled> {
        self.lock().disabled.clone()
    }

    pub(crate) fn disable(&self, disabled: Disabled) {
        self.lock().disabled = Some(disabled);
    }

    pub(crate) fn enable(&self) {
        let mut counts = self.lock();
        counts.disabled = None;
        counts.in_a_row.clear();
    }

    pub(crate) fn hooks(&self) -> BTreeMap<Hook, HookStats> {
        self.lock().hooks.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_that_always_fails_is_known_though_others_do_not() {
        let stats = Stats::default();
        let fault = CallError::Excess {
            plugin: "x".into(),
            hook: Hook::PostStart,
            excess: crate::error::Excess::Processor(Duration::from_secs(1)),
        };
        let count = |hook, error| stats.count(hook, Duration::ZERO, error, 3);
        for _ in 0..2 {
            assert!(!count(Hook::PostStart, Some(&fault)));
            assert!(!count(Hook::Preflight, None));
        }
        // One that works again has not failed in a row.
        assert!(!count(Hook::PostStart, None));
        for more in [2, 1, 0] {
            assert_eq!(count(Hook::PostStart, Some(&fault)), more == 0);
            assert!(!count(Hook::Doctor, None));
        }
        assert_eq!(stats.disabled().map(|disabled| disabled.failures), Some(3));
    }
}
