//! Taps that are made before a VM needs one.
//!
//! ```text
//!   refill ──> host's journal ── take ──> VM's journal ── end of the run, room left ──> host's journal
//!   (a task)        │                          └──────────── else ──> deleted
//!                   └── the network is taken down ──> deleted
//! ```
//!
//! A tap that waits here is a port of the bridge and up, so a start only has to look at it. What counts more is the end of a
//! run: deleting a tap takes the kernel some 20 ms, returning it none. Hence returned ones are kept up to twice as many as are
//! made in advance, and a VM that is stopped and started leaves the kernel alone. A tap is an effect of the host's scope; taking it hands it over to the VM's, so that at every moment a
//! journal has it. For one moment both do, and recovery then gives it to the VM. Names are numbered in one row and none is used
//! twice, so a tap is never mistaken for a former one.

use std::{
    collections::HashSet,
    sync::atomic::{AtomicUsize, Ordering},
};

use vm_locks::{Ctx, Lock, TapPool, Unlocked};
use vm_net::names;
use vm_types::{Effect, Layer};

use crate::{
    Engine, EngineError,
    journal::{Entry, Phase, Step},
    vm::cell::Cell,
};

/// The taps that wait. Empty, and filled by nobody, while there is no network.
#[derive(Debug)]
pub(crate) struct Taps {
    pool: Lock<TapPool, Pool>,
    /// How many are ready, for whoever only wants to know.
    ready: AtomicUsize,
}

#[derive(Debug, Default)]
struct Pool {
    /// Whether there is a bridge.
    open: bool,
    /// The number of the next tap.
    next: u32,
    /// Names; each is applied in the host's journal.
    ready: Vec<String>,
    /// Handed over, and still in the host's journal too.
    leaving: HashSet<String>,
    /// Whether a task fills it.
    filling: bool,
}

impl Taps {
    pub(crate) fn new() -> Self {
        Self { pool: Lock::new("tap pool", Pool { next: 1, ..Pool::default() }), ready: AtomicUsize::new(0) }
    }
}

impl Engine {
    fn tap(&self, name: String) -> Effect {
        Effect::Tap { name, bridge: names::bridge_name(&self.inner.instance) }
    }

    /// Gives a VM a tap, from the pool or, where that is empty, a new one. The network is there. Returns its name.
    ///
    /// # Errors
    /// The journal, or the network layer; what is half done is in the VM's journal.
    pub(crate) async fn take_tap(&self, ctx: &mut Ctx<Unlocked>, cell: &Cell) -> Result<String, EngineError> {
        let (name, waiting) = {
            let mut held = ctx.lock(&self.inner.taps.pool).await;
            let (pool, ctx) = held.split();
            pool.open = true;
            match pool.ready.last().cloned() {
                Some(name) => {
                    let effect = self.tap(name.clone());
                    // It leaves the pool when a journal of the VM's has it: whoever gives up before that takes nothing away.
                    cell.scope.receive(ctx, &effect, Phase::Start).await?;
                    pool.ready.pop();
                    pool.leaving.insert(name.clone());
                    self.count(pool);
                    (name, true)
                }
                None => (self.next_name(pool), false),
            }
        };
        let effect = self.tap(name.clone());
        self.refill(waiting.then(|| effect.clone()));
        // One from the pool is only looked at, and made again if somebody took it away.
        cell.scope.apply(ctx, effect, Phase::Start).await?;
        Ok(name)
    }

    /// Undoes all that a run needed. Its tap goes back to the pool where that is short.
    ///
    /// # Errors
    /// The first that could not be undone; the rest is.
    pub(crate) async fn unwind_run(&self, ctx: &mut Ctx<Unlocked>, cell: &Cell) -> Result<(), EngineError> {
        // A tap is of use to another VM only when no VMM holds it.
        if cell.scope.unwind_layer(ctx, &[Phase::Start], Layer::Vmm).await.is_ok() {
            for entry in cell.scope.entries(ctx).await {
                self.give_back(ctx, cell, &entry).await;
            }
        }
        cell.scope.unwind(ctx, Phase::Start).await
    }

    async fn give_back(&self, ctx: &mut Ctx<Unlocked>, cell: &Cell, entry: &Entry) {
        let Effect::Tap { name, .. } = &entry.effect else { return };
        let whole = entry.step == Step::Applied && entry.boot_id == self.inner.boot_id;
        if !whole || names::tap_number(&self.inner.instance, name).is_none() {
            return;
        }
        let mut held = ctx.lock(&self.inner.taps.pool).await;
        let (pool, ctx) = held.split();
        let room = pool.open && pool.ready.len() < 2 * self.inner.settings.tap_pool;
        if !room || pool.leaving.contains(name) {
            return;
        }
        match self.inner.host_scope.receive(ctx, &entry.effect, Phase::Host).await {
            Ok(()) => {
                cell.scope.forget(ctx, &entry.effect).await;
                pool.ready.push(name.clone());
                self.count(pool);
            }
            Err(error) => tracing::warn!(tap = %name, error = %error.chain(), "not returned to the pool"),
        }
    }

    /// Fills the pool where nobody waits for it; `taken` is struck out of the host's journal first.
    fn refill(&self, taken: Option<Effect>) {
        let engine = self.clone();
        tokio::spawn(async move {
            let locks = engine.locks().clone();
            locks.root("tap pool", async move |mut ctx| engine.fill(&mut ctx, taken).await).await;
        });
    }

    async fn fill(&self, ctx: &mut Ctx<Unlocked>, taken: Option<Effect>) {
        if let Some(effect) = taken {
            self.inner.host_scope.forget(ctx, &effect).await;
            if let Effect::Tap { name, .. } = &effect {
                ctx.lock(&self.inner.taps.pool).await.leaving.remove(name);
            }
        }
        let mut mine = false;
        loop {
            let name = {
                let mut pool = ctx.lock(&self.inner.taps.pool).await;
                if !mine && pool.filling {
                    return;
                }
                mine = pool.open && pool.ready.len() < self.inner.settings.tap_pool;
                pool.filling = mine;
                if !mine {
                    return;
                }
                self.next_name(&mut pool)
            };
            let made = self.inner.host_scope.apply(ctx, self.tap(name.clone()), Phase::Host).await;
            let mut pool = ctx.lock(&self.inner.taps.pool).await;
            match made {
                // If the network was taken down meanwhile, the tap went with it: it was in the same journal.
                Ok(_) if !pool.open => {}
                Ok(_) => {
                    pool.ready.push(name);
                    self.count(&pool);
                }
                Err(error) => {
                    tracing::warn!(tap = %name, error = %error.chain(), "the pool of taps is not full");
                    pool.filling = false;
                    return;
                }
            }
        }
    }

    /// Takes the pool out of use: its taps are about to go with the network.
    pub(crate) async fn close_taps(&self, ctx: &mut Ctx<Unlocked>) -> Vec<String> {
        let mut pool = ctx.lock(&self.inner.taps.pool).await;
        pool.open = false;
        let ready = std::mem::take(&mut pool.ready);
        self.count(&pool);
        ready
    }

    /// Puts it into use again: the network stays.
    pub(crate) async fn reopen_taps(&self, ctx: &mut Ctx<Unlocked>, ready: Vec<String>) {
        let mut pool = ctx.lock(&self.inner.taps.pool).await;
        pool.open = true;
        pool.ready.extend(ready);
        self.count(&pool);
    }

    /// Begins with what the former daemon had ready; `taken` are names that are in use anywhere.
    pub(crate) async fn recover_taps(&self, ctx: &mut Ctx<Unlocked>, taken: impl Iterator<Item = String>) {
        let entries = self.inner.host_scope.entries(ctx).await;
        let whole = |entry: &&Entry| entry.step == Step::Applied && entry.boot_id == self.inner.boot_id;
        let mut pool = ctx.lock(&self.inner.taps.pool).await;
        for entry in entries.iter().filter(whole) {
            if let Effect::Tap { name, .. } = &entry.effect {
                // Those of a former build have no owner yet. One that cannot be had is left to the end of the network.
                match self.inner.host.net.apply(&entry.effect).await {
                    Ok(_) => pool.ready.push(name.clone()),
                    Err(error) => tracing::warn!(tap = %name, %error, "cannot be used any more"),
                }
            }
        }
        pool.open = !pool.ready.is_empty();
        self.count(&pool);
        let known = taken.filter_map(|name| names::tap_number(&self.inner.instance, &name)).max();
        pool.next = known.map_or(1, |number| number.wrapping_add(1)).max(1);
    }

    /// Taps that wait for a VM.
    pub fn taps_ready(&self) -> usize {
        self.inner.taps.ready.load(Ordering::Relaxed)
    }

    fn count(&self, pool: &Pool) {
        self.inner.taps.ready.store(pool.ready.len(), Ordering::Relaxed);
    }

    fn next_name(&self, pool: &mut Pool) -> String {
        let number = pool.next;
        // After four thousand million taps, the first is not in use any more.
        pool.next = number.wrapping_add(1).max(1);
        names::tap_name(&self.inner.instance, number)
    }
}

#[cfg(test)]
#[path = "taps_tests.rs"]
mod tests;
