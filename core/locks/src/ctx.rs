//! Contexts, which are the right to lock, and guards.

use std::{
    fmt,
    marker::PhantomData,
    ops::{Deref, DerefMut},
    sync::Arc,
};

use tokio::sync::OwnedMutexGuard;

use crate::{
    lock::Lock,
    order::{Level, LockAfter, Paired, Unlocked},
    table::{Entry, LockState, LockTable, Origin, Root},
};

tokio::task_local! {
    /// The root that is being polled.
    static CURRENT: Arc<Root>;
}

/// A mistake that only shows when the program runs: found by tests, survived by users.
fn mistake(what: fmt::Arguments<'_>) {
    if cfg!(debug_assertions) {
        panic!("{what}");
    }
    tracing::error!("locks: {what}");
}

/// The right to lock what comes after `L`, the innermost level that is held.
///
/// There is no way to have two in one task: it is neither `Clone` nor `Copy`, only [`LockTable::root`] makes one, and a lock
/// that is held keeps the context that it was locked through borrowed. `&mut Ctx<Unlocked>` therefore proves that the caller
/// holds no lock; so does `&Ctx<Unlocked>`, which several futures of one task may have at once.
pub struct Ctx<L> {
    root: Arc<Root>,
    /// How many locks are held where this context is in use.
    depth: usize,
    level: PhantomData<fn() -> L>,
}

impl LockTable {
    /// Runs `body` with the one context that it and all it calls lock through; the table shows `origin` for it. Made where a
    /// task begins: `tokio::spawn(table.root("request vm.get", async move |mut ctx| …))`. The future is `Send` where the body's
    /// is, and can be dropped at any time.
    ///
    /// # Panics
    ///
    /// In a debug build when polled inside another root, whose locks would not count in the inner one. A release build logs
    /// that as an error and goes on.
    pub fn root<O, B, F>(&self, origin: O, body: B) -> impl Future<Output = F::Output> + use<O, B, F>
    where
        O: Into<Origin>,
        B: FnOnce(Ctx<Unlocked>) -> F,
        F: Future,
    {
        let root = Root::new(self.clone(), origin.into());
        let ctx = Ctx { root: root.clone(), depth: 0, level: PhantomData };
        // In a box because the future around it would otherwise have room for it twice.
        let future = Box::pin(CURRENT.scope(root.clone(), body(ctx)));
        async move {
            if let Ok(outer) = CURRENT.try_with(Arc::clone) {
                mistake(format_args!("a root for {} inside that for {}", root.origin(), outer.origin()));
            }
            let output = future.await;
            if root.held() != 0 {
                mistake(format_args!("{} forgot a guard: it ended with locks held", root.origin()));
            }
            output
        }
    }
}

impl<L: Level> Ctx<L> {
    /// Locks, after those who came before. Dropping the future leaves the queue.
    ///
    /// # Panics
    ///
    /// In a debug build when the context is used outside its root, or when a guard was forgotten (`std::mem::forget`) instead
    /// of dropped. A release build logs that as an error and goes on.
    pub async fn lock<M, T>(&mut self, lock: &Lock<M, T>) -> Held<'_, M, T>
    where
        M: LockAfter<L>,
    {
        self.check();
        Held { guard: acquire(&self.root, lock).await, ctx: self.inner(1) }
    }

    /// Locks if nobody holds or waits for the lock.
    ///
    /// # Panics
    ///
    /// As [`lock`](Self::lock).
    pub fn try_lock<M, T>(&mut self, lock: &Lock<M, T>) -> Option<Held<'_, M, T>>
    where
        M: LockAfter<L>,
    {
        self.check();
        Some(Held { guard: try_acquire(&self.root, lock)?, ctx: self.inner(1) })
    }

    /// Locks two of one level, always in the same order whichever is given first.
    ///
    /// # Errors
    ///
    /// When both are the same lock.
    ///
    /// # Panics
    ///
    /// As [`lock`](Self::lock).
    pub async fn lock_pair<M, T>(
        &mut self,
        first: &Lock<M, T>,
        second: &Lock<M, T>,
    ) -> Result<HeldPair<'_, M, T>, SamePair>
    where
        M: LockAfter<L> + Paired,
    {
        self.check();
        let (first, second) = match first.label.number.cmp(&second.label.number) {
            std::cmp::Ordering::Equal => return Err(SamePair { lock: first.name().to_owned() }),
            std::cmp::Ordering::Less => {
                let first = acquire(&self.root, first).await;
                (first, acquire(&self.root, second).await)
            }
            std::cmp::Ordering::Greater => {
                let second = acquire(&self.root, second).await;
                (acquire(&self.root, first).await, second)
            }
        };
        Ok(HeldPair { first, second, ctx: self.inner(2) })
    }

    /// Says from now on what this root is for, such as the operation that a request has become.
    pub fn set_origin(&self, origin: impl Into<Origin>) {
        self.root.set_origin(origin.into());
    }

    /// What this root is for.
    pub fn origin(&self) -> Origin {
        self.root.origin()
    }

    /// The table that this root is of, for the root of a task that begins here.
    pub fn table(&self) -> LockTable {
        self.root.table.clone()
    }

    fn inner<M>(&self, more: usize) -> Ctx<M> {
        Ctx { root: self.root.clone(), depth: self.depth + more, level: PhantomData }
    }

    fn check(&self) {
        if !CURRENT.try_with(|current| Arc::ptr_eq(current, &self.root)).unwrap_or(false) {
            mistake(format_args!("the context of {} is used outside its root", self.origin()));
        }
        if self.root.held() != self.depth {
            mistake(format_args!("{} forgot a guard: it holds more locks than it knows of", self.origin()));
        }
    }
}

impl<L: Level> fmt::Debug for Ctx<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ctx").field("level", &L::NAME).field("origin", &self.origin()).finish()
    }
}

/// The row in the table goes before the lock does, so that no lock is ever shown as held twice.
struct Guard<'c, T> {
    _entry: Entry<'c>,
    data: OwnedMutexGuard<T>,
}

fn try_acquire<'c, M, T>(root: &Arc<Root>, lock: &Lock<M, T>) -> Option<Guard<'c, T>> {
    // Tokio's mutex is handed from holder to waiter, so this never overtakes a queue.
    let data = lock.data.clone().try_lock_owned().ok()?;
    Some(Guard { _entry: Entry::new(root, &lock.label, LockState::Held), data })
}

async fn acquire<'c, M, T>(root: &Arc<Root>, lock: &Lock<M, T>) -> Guard<'c, T> {
    if let Some(guard) = try_acquire(root, lock) {
        return guard;
    }
    let mut entry = Entry::new(root, &lock.label, LockState::Waiting);
    let data = lock.data.clone().lock_owned().await;
    entry.acquired();
    Guard { _entry: entry, data }
}

/// A lock that is held until this is dropped; dereferences to the data.
#[must_use = "the lock is released at once"]
pub struct Held<'c, M: Level, T> {
    guard: Guard<'c, T>,
    ctx: Ctx<M>,
}

impl<M: Level, T> Held<'_, M, T> {
    /// The context for what is locked while this is held.
    pub fn ctx(&mut self) -> &mut Ctx<M> {
        &mut self.ctx
    }

    /// The data and the context, to use the one while locking through the other.
    pub fn split(&mut self) -> (&mut T, &mut Ctx<M>) {
        (&mut self.guard.data, &mut self.ctx)
    }
}

impl<M: Level, T> Deref for Held<'_, M, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard.data
    }
}

impl<M: Level, T> DerefMut for Held<'_, M, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard.data
    }
}

impl<M: Level, T: fmt::Debug> fmt::Debug for Held<'_, M, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("level", &M::NAME).field("data", &**self).finish()
    }
}

/// Two locks of one level that are held until this is dropped.
#[must_use = "the locks are released at once"]
pub struct HeldPair<'c, M: Level, T> {
    first: Guard<'c, T>,
    second: Guard<'c, T>,
    ctx: Ctx<M>,
}

impl<M: Level, T> HeldPair<'_, M, T> {
    /// The data of the lock that was given first.
    pub fn first(&mut self) -> &mut T {
        &mut self.first.data
    }

    /// The data of the lock that was given second.
    pub fn second(&mut self) -> &mut T {
        &mut self.second.data
    }

    /// The context for what is locked while these are held.
    pub fn ctx(&mut self) -> &mut Ctx<M> {
        &mut self.ctx
    }

    /// Both locks' data, in the order in which they were given, and the context.
    pub fn split(&mut self) -> (&mut T, &mut T, &mut Ctx<M>) {
        (&mut self.first.data, &mut self.second.data, &mut self.ctx)
    }
}

impl<M: Level, T: fmt::Debug> fmt::Debug for HeldPair<'_, M, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldPair")
            .field("level", &M::NAME)
            .field("first", &*self.first.data)
            .field("second", &*self.second.data)
            .finish()
    }
}

/// One lock was given as both of a pair.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{lock} was to be locked together with itself")]
pub struct SamePair {
    /// The lock's name.
    pub lock: String,
}

impl SamePair {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        "name two different ones"
    }
}
