use std::{sync::Arc, time::Duration};

use super::*;
use crate::{ports::NoHooks, testing::Bench};

const SIZE: usize = 2;

async fn bench() -> Bench {
    Bench::new(Arc::new(NoHooks), SIZE).await
}

impl Bench {
    /// Names of taps in the host's journal that are whole.
    async fn waiting(&self) -> Vec<String> {
        let scope = &self.engine.inner.host_scope;
        let entries = self.engine.locks().root("test", async |mut ctx| scope.entries(&mut ctx).await).await;
        let whole = entries.into_iter().filter(|entry| entry.step == Step::Applied);
        whole.filter_map(|entry| tap_of(&entry.effect)).collect()
    }

    fn on_host(&self) -> usize {
        self.net.applied().iter().filter(|id| id.0.starts_with("tap:")).count()
    }

    /// Waits until nothing is on its way in or out of the pool.
    async fn settled(&self, ready: usize) {
        let settled = async {
            loop {
                let (idle, found) = self
                    .engine
                    .locks()
                    .root("test", async |mut ctx| {
                        let pool = ctx.lock(&self.engine.inner.taps.pool).await;
                        (!pool.filling && pool.leaving.is_empty(), pool.ready.len())
                    })
                    .await;
                if idle && found == ready && self.waiting().await.len() == ready {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), settled).await.expect("the pool settles");
    }

    async fn take(&self, cell: &Cell) -> String {
        let locks = self.engine.locks();
        locks
            .root("test", async |mut ctx| {
                self.engine.ensure_network(&mut ctx).await.unwrap();
                self.engine.take_tap(&mut ctx, cell).await.unwrap()
            })
            .await
    }

    async fn end(&self, cell: &Cell) {
        let locks = self.engine.locks();
        locks.root("test", async |mut ctx| self.engine.unwind_run(&mut ctx, cell).await.unwrap()).await;
    }
}

fn tap_of(effect: &Effect) -> Option<String> {
    match effect {
        Effect::Tap { name, .. } => Some(name.clone()),
        _ => None,
    }
}

async fn taps_of(cell: &Cell) -> Vec<String> {
    let locks = vm_locks::LockTable::default();
    let entries = locks.root("test", async |mut ctx| cell.scope.entries(&mut ctx).await).await;
    entries.iter().filter_map(|entry| tap_of(&entry.effect)).collect()
}

#[tokio::test]
async fn the_first_vm_makes_its_own_tap_and_the_next_finds_one_waiting() {
    let bench = bench().await;
    assert_eq!(bench.on_host(), 0, "no VM, no network");
    let (first, second) = (bench.cell(1), bench.cell(2));
    let one = bench.take(&first).await;
    bench.settled(SIZE).await;
    let ready = bench.waiting().await;
    let two = bench.take(&second).await;
    assert!(ready.contains(&two), "{two} was not among {ready:?}");
    bench.settled(SIZE).await;
    assert_eq!((taps_of(&first).await, taps_of(&second).await), (vec![one], vec![two.clone()]));
    assert!(!bench.waiting().await.contains(&two), "two have it");
    assert_eq!(bench.on_host(), SIZE + 2);
}

#[tokio::test]
async fn a_tap_goes_back_where_there_is_room_and_is_deleted_where_there_is_not() {
    let bench = bench().await;
    let cells: Vec<_> = (1..=5).map(|number| bench.cell(number)).collect();
    let mut taken = Vec::new();
    for cell in &cells {
        taken.push(bench.take(cell).await);
        bench.settled(SIZE).await;
    }
    for (cell, ready) in cells.iter().zip([3, 4, 4, 4, 4]) {
        bench.end(cell).await;
        bench.settled(ready).await;
        assert!(taps_of(cell).await.is_empty());
        assert_eq!(bench.engine.taps_ready(), ready);
    }
    assert_eq!(bench.on_host(), 2 * SIZE);
    assert!(bench.waiting().await.contains(&taken[0]) && !bench.waiting().await.contains(&taken[4]));
    // There are enough for a while: none is made.
    let applied = bench.net.applied();
    bench.take(&cells[0]).await;
    bench.settled(2 * SIZE - 1).await;
    assert_eq!(bench.net.applied(), applied);
}

#[tokio::test]
async fn what_somebody_took_from_the_pool_is_made_again() {
    let bench = bench().await;
    bench.take(&bench.cell(1)).await;
    bench.settled(SIZE).await;
    for name in bench.waiting().await {
        let tap = bench.engine.tap(name);
        vm_net::Net::undo(bench.net.as_ref(), &tap, &vm_types::Handle::None).await.unwrap();
    }
    let name = bench.take(&bench.cell(2)).await;
    let id = bench.engine.tap(name).id();
    assert!(bench.net.applied().contains(&id));
}

#[tokio::test]
async fn the_pool_goes_with_the_network() {
    let bench = bench().await;
    let cell = bench.cell(1);
    bench.take(&cell).await;
    bench.settled(SIZE).await;
    bench.end(&cell).await;
    bench.engine.shut_down().await;
    assert!(bench.net.applied().is_empty(), "{:?}", bench.net.applied());
    bench.settled(0).await;
    assert_ne!(bench.take(&cell).await, names::tap_name(&bench.engine.inner.instance, 1));
}
