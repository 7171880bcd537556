//! A lock: a name, a level and the data it guards.

use std::{
    fmt,
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::Mutex;

use crate::order::Level;

/// What the table shows of a lock.
#[derive(Debug)]
pub(crate) struct Label {
    pub(crate) name: String,
    pub(crate) level: &'static str,
    /// Unique in this process. Pairs are locked in its order; unlike a key from outside it is never the same for two locks.
    pub(crate) number: u64,
}

/// Data that one task at a time may use, at level `M` of the order. First come, first served.
///
/// Clones are the same lock. It is locked only through a [`Ctx`](crate::Ctx).
pub struct Lock<M, T> {
    pub(crate) label: Arc<Label>,
    pub(crate) data: Arc<Mutex<T>>,
    level: PhantomData<fn() -> M>,
}

impl<M: Level, T> Lock<M, T> {
    /// A lock that people know by `name`, such as `vm web`.
    pub fn new(name: impl Into<String>, data: T) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            label: Arc::new(Label { name: name.into(), level: M::NAME, number }),
            data: Arc::new(Mutex::new(data)),
            level: PhantomData,
        }
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.label.name
    }
}

impl<M, T> Clone for Lock<M, T> {
    fn clone(&self) -> Self {
        Self { label: self.label.clone(), data: self.data.clone(), level: PhantomData }
    }
}

/// Without the data, which may be in use.
impl<M, T> fmt::Debug for Lock<M, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lock").field("name", &self.label.name).field("level", &self.label.level).finish()
    }
}
