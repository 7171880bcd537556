//! Who uses the VM right now, and since when nobody does.

use std::sync::{Arc, Mutex, PoisonError};

use crate::supervise::now;

/// Connections of one sort that are open now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sort {
    /// Of `ssh.sock`.
    Ssh,
    /// Of `console.sock`.
    Console,
}

/// Open connections and the last ends of them.
#[derive(Debug, Clone)]
pub(crate) struct Activity(Arc<Mutex<Counts>>);

/// What [`vm_types::shim::ShimReply::Status`] tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) ssh: u32,
    pub(crate) console: u32,
    pub(crate) ssh_idle_since: Option<u64>,
    pub(crate) idle_since: Option<u64>,
}

impl Activity {
    /// Nobody since `started_at`.
    pub(crate) fn new(started_at: u64) -> Self {
        let counts = Counts { ssh: 0, console: 0, ssh_idle_since: None, idle_since: Some(started_at) };
        Self(Arc::new(Mutex::new(counts)))
    }

    /// Counts a connection until the result is dropped.
    pub(crate) fn begin(&self, sort: Sort) -> Use {
        self.change(|counts| {
            match sort {
                Sort::Ssh => {
                    counts.ssh += 1;
                    counts.ssh_idle_since = None;
                }
                Sort::Console => counts.console += 1,
            }
            counts.idle_since = None;
        });
        Use { activity: self.clone(), sort }
    }

    /// Now.
    pub(crate) fn counts(&self) -> Counts {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// A connection that is counted.
#[derive(Debug)]
pub(crate) struct Use {
    activity: Activity,
    sort: Sort,
}

impl Drop for Use {
    fn drop(&mut self) {
        let now = now();
        self.activity.change(|counts| {
            match self.sort {
                Sort::Ssh => {
                    counts.ssh -= 1;
                    counts.ssh_idle_since = (counts.ssh == 0).then_some(now);
                }
                Sort::Console => counts.console -= 1,
            }
            counts.idle_since = (counts.ssh == 0 && counts.console == 0).then_some(now);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_idle_only_when_the_last_one_of_any_sort_has_left() {
        let activity = Activity::new(7);
        assert_eq!((activity.counts().idle_since, activity.counts().ssh_idle_since), (Some(7), None));
        let (one, other) = (activity.begin(Sort::Ssh), activity.begin(Sort::Ssh));
        let console = activity.begin(Sort::Console);
        drop(one);
        let counts = activity.counts();
        assert_eq!((counts.ssh, counts.ssh_idle_since, counts.idle_since), (1, None, None));
        drop(other);
        let counts = activity.counts();
        assert!(counts.ssh_idle_since.is_some_and(|since| since > 7), "{counts:?}");
        assert_eq!((counts.ssh, counts.console, counts.idle_since), (0, 1, None));
        drop(console);
        assert!(activity.counts().idle_since.is_some_and(|since| since > 7));
    }
}
