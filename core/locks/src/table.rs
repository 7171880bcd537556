//! The table of all locks that are held or waited for, with by whom and since when.

use std::{
    collections::BTreeMap,
    fmt,
    marker::PhantomData,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use serde::{Deserialize, Serialize};

use crate::lock::Label;

/// Who locks: what a root context was made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    text: String,
    operation: Option<u64>,
}

impl Origin {
    /// An operation, such as 12 and `vm-start web`.
    pub fn operation(id: u64, text: impl Into<String>) -> Self {
        Self { text: text.into(), operation: Some(id) }
    }
}

impl<T: Into<String>> From<T> for Origin {
    /// What is no operation: `request vm.get`, `reaper`.
    fn from(text: T) -> Self {
        Self { text: text.into(), operation: None }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.operation {
            Some(id) => write!(f, "operation {id} {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

/// Whether a lock is held or waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockState {
    /// Held.
    Held,
    /// In the queue.
    Waiting,
}

/// A lock that somebody holds or waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockEntry {
    /// The lock's name, e.g. `vm web`.
    pub lock: String,
    /// Its level in the order, e.g. `Vm`.
    pub level: String,
    /// Held or waited for.
    pub state: LockState,
    /// By whom, e.g. `operation 12 vm-start web` or `request vm.get`.
    pub origin: String,
    /// The operation's id, if it is one.
    pub operation: Option<u64>,
    /// How long it has been held, or waited for, in milliseconds.
    pub age_ms: u64,
}

/// All locks that are held or waited for by contexts of this table. Clones are the same table.
#[derive(Debug, Clone, Default)]
pub struct LockTable(Arc<Mutex<Rows>>);

#[derive(Debug, Default)]
struct Rows {
    next: u64,
    /// By ticket, which is in the order in which they came.
    rows: BTreeMap<u64, Row>,
}

#[derive(Debug, Clone)]
struct Row {
    label: Arc<Label>,
    root: Arc<Root>,
    state: LockState,
    since: Instant,
}

impl LockTable {
    /// What is held and waited for now: what is held first, then by the locks' names, then whoever came first.
    pub fn snapshot(&self) -> Vec<LockEntry> {
        // The origins' own mutexes are not taken under the table's.
        let mut rows: Vec<_> = self.rows().rows.iter().map(|(ticket, row)| (*ticket, row.clone())).collect();
        rows.sort_by(|(ticket, row), (other_ticket, other)| {
            let key = (row.state, &row.label.name, row.label.number, ticket);
            key.cmp(&(other.state, &other.label.name, other.label.number, other_ticket))
        });
        let now = Instant::now();
        rows.into_iter().map(|(_, row)| row.entry(now)).collect()
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        // No code that runs under it panics half way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Row {
    fn entry(self, now: Instant) -> LockEntry {
        let origin = self.root.origin();
        LockEntry {
            lock: self.label.name.clone(),
            level: self.label.level.to_owned(),
            state: self.state,
            origin: origin.to_string(),
            operation: origin.operation,
            age_ms: u64::try_from(now.saturating_duration_since(self.since).as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// What all contexts of one root share.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) table: LockTable,
    origin: Mutex<Origin>,
    /// How many locks it holds.
    held: AtomicUsize,
}

impl Root {
    pub(crate) fn new(table: LockTable, origin: Origin) -> Arc<Self> {
        Arc::new(Self { table, origin: Mutex::new(origin), held: AtomicUsize::new(0) })
    }

    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub(crate) fn origin(&self) -> Origin {
        self.origin.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_origin(&self, origin: Origin) {
        *self.origin.lock().unwrap_or_else(PoisonError::into_inner) = origin;
    }
}

/// One row of the table, there as long as this value. It borrows a context, and being `Drop` it does so to its very end: a
/// guard that is merely in scope keeps its context borrowed.
pub(crate) struct Entry<'c> {
    root: Arc<Root>,
    ticket: u64,
    state: LockState,
    context: PhantomData<&'c mut ()>,
}

impl Entry<'_> {
    pub(crate) fn new(root: &Arc<Root>, label: &Arc<Label>, state: LockState) -> Self {
        let row = Row { label: label.clone(), root: root.clone(), state, since: Instant::now() };
        let mut table = root.table.rows();
        let ticket = table.next;
        table.next += 1;
        table.rows.insert(ticket, row);
        drop(table);
        if state == LockState::Held {
            root.held.fetch_add(1, Ordering::Relaxed);
        }
        Self { root: root.clone(), ticket, state, context: PhantomData }
    }

    /// From waiting to held.
    pub(crate) fn acquired(&mut self) {
        if let Some(row) = self.root.table.rows().rows.get_mut(&self.ticket) {
            row.state = LockState::Held;
            row.since = Instant::now();
        }
        self.state = LockState::Held;
        self.root.held.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.root.table.rows().rows.remove(&self.ticket);
        if self.state == LockState::Held {
            self.root.held.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
