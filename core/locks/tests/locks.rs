//! What locks do when they run: fair, visible, and no mistake unseen.

use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Waker},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    task::{JoinHandle, yield_now},
    time::timeout,
};
use vm_locks::{CreateVm, Ctx, Lock, LockState, LockTable, Network, Origin, SamePair, Unlocked, Vm};

/// Far longer than anything here takes.
const LONG: Duration = Duration::from_secs(120);

/// As whoever starts operations does it: the body is somebody else's.
fn spawn<B, F>(table: &LockTable, origin: impl Into<Origin> + 'static, body: B) -> JoinHandle<F::Output>
where
    B: FnOnce(Ctx<Unlocked>) -> F + 'static,
    F: Future + Send + 'static,
    F::Output: Send,
{
    tokio::spawn(table.root(origin, body))
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let wait = async {
        while !is() {
            yield_now().await;
        }
    };
    timeout(LONG, wait).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

fn waiting(table: &LockTable) -> Vec<(String, String)> {
    let waits = table.snapshot().into_iter().filter(|entry| entry.state == LockState::Waiting);
    waits.map(|entry| (entry.lock, entry.origin)).collect()
}

/// A task that holds `lock` until told.
async fn hold<T: Send + 'static>(
    table: &LockTable,
    lock: &Lock<Vm, T>,
) -> (oneshot::Sender<()>, JoinHandle<()>) {
    let (held, is_held) = oneshot::channel();
    let (release, released) = oneshot::channel::<()>();
    let lock = lock.clone();
    let task = spawn(table, Origin::operation(1, "vm-start web"), async move |mut ctx: Ctx<Unlocked>| {
        let _held = ctx.lock(&lock).await;
        held.send(()).expect("somebody waits for this");
        // Nobody can be told that all is over; being dropped is as good as being told.
        let _ = released.await;
    });
    timeout(LONG, is_held).await.expect("in time").expect("the lock is held");
    (release, task)
}

/// The message of a task that panicked.
async fn panic_of<T>(task: JoinHandle<T>) -> String {
    let Err(error) = timeout(LONG, task).await.expect("in time") else { panic!("no panic") };
    *error.into_panic().downcast::<String>().expect("a message")
}

async fn guest_io(_: &mut Ctx<Unlocked>) {
    yield_now().await;
}

#[tokio::test]
async fn locks_are_taken_and_left_in_a_spawned_task() {
    let table = LockTable::default();
    let (vm, create) = (Lock::<Vm, _>::new("vm web", 1), Lock::<CreateVm, _>::new("create", 10));
    let network = Lock::<Network, _>::new("network", 100);
    let task = spawn(&table, "test", async move |mut ctx: Ctx<Unlocked>| {
        guest_io(&mut ctx).await;
        let sum = {
            let mut held = ctx.lock(&vm).await;
            let (vm, ctx) = held.split();
            let mut create = ctx.lock(&create).await;
            *create += *vm;
            *vm = *create;
            let mut network = create.ctx().lock(&network).await;
            *network += *vm;
            *network
        };
        guest_io(&mut ctx).await;
        (sum, *ctx.lock(&vm).await)
    });
    assert_eq!(task.await.unwrap(), (111, 11));
    assert_eq!(table.snapshot(), []);
}

#[tokio::test]
async fn locks_go_to_whoever_came_first() {
    const TASKS: usize = 100;
    let table = LockTable::default();
    let vm = Lock::new("vm web", Vec::new());
    let (release, holder) = hold(&table, &vm).await;
    let mut tasks = Vec::new();
    for task in 0..TASKS {
        let vm = vm.clone();
        tasks.push(spawn(&table, format!("request {task}"), async move |mut ctx: Ctx<Unlocked>| {
            ctx.lock(&vm).await.push(task);
            // Back at once, but behind everybody else.
            ctx.lock(&vm).await.push(TASKS + task);
        }));
        until("one more in the queue", || waiting(&table).len() == task + 1).await;
    }
    let queue: Vec<_> = (0..TASKS).map(|task| ("vm web".to_owned(), format!("request {task}"))).collect();
    assert_eq!(waiting(&table), queue, "the table has the queue in its order");
    release.send(()).unwrap();
    holder.await.unwrap();
    for task in tasks {
        timeout(LONG, task).await.unwrap().unwrap();
    }
    let expected: Vec<_> = (0..2 * TASKS).collect();
    table.root("test", async |mut ctx| assert_eq!(*ctx.lock(&vm).await, expected)).await;
}

#[tokio::test]
async fn locks_are_not_snatched_from_a_queue() {
    let table = LockTable::default();
    let vm = Lock::<Vm, _>::new("vm web", ());
    let mut waiter = None;
    table
        .root("test", async |mut ctx| {
            let held = ctx.lock(&vm).await;
            let (table, lock) = (table.clone(), vm.clone());
            waiter = Some(spawn(&table, "waiter", async move |mut ctx: Ctx<Unlocked>| {
                drop(ctx.lock(&lock).await)
            }));
            until("the other in the queue", || waiting(&table).len() == 1).await;
            drop(held);
            // The other has not run yet; the lock is its all the same.
            assert!(ctx.try_lock(&vm).is_none());
            assert!(ctx.lock(&vm).await.ctx().origin().to_string() == "test");
            assert!(ctx.try_lock(&vm).is_some());
        })
        .await;
    assert!(waiter.unwrap().is_finished(), "it came first");
}

#[tokio::test]
async fn locks_show_who_holds_and_who_waits() {
    let table = LockTable::default();
    let (vm, other) = (Lock::<Vm, _>::new("vm web", ()), Lock::<Network, _>::new("network", ()));
    let (release, holder) = hold(&table, &vm).await;
    let waiter = spawn(&table, "request vm.get", async move |mut ctx: Ctx<Unlocked>| {
        let mut held = ctx.lock(&vm).await;
        let _other = held.ctx().lock(&other).await;
        std::future::pending::<()>().await;
    });
    until("a waiter that has waited a while", || {
        table.snapshot().len() == 2 && table.snapshot()[1].age_ms > 1
    })
    .await;
    let shown = table.snapshot();
    assert!(shown[0].age_ms >= shown[1].age_ms, "{shown:?}");
    let mut json = serde_json::to_value(&shown).unwrap();
    for entry in json.as_array_mut().unwrap() {
        assert!(entry["age_ms"].take().is_u64());
    }
    let expected = serde_json::json!([
        {"lock": "vm web", "level": "Vm", "state": "held", "origin": "operation 1 vm-start web", "operation": 1, "age_ms": null},
        {"lock": "vm web", "level": "Vm", "state": "waiting", "origin": "request vm.get", "operation": null, "age_ms": null},
    ]);
    assert_eq!(json, expected);

    release.send(()).unwrap();
    holder.await.unwrap();
    until("both locks held", || table.snapshot().len() == 2).await;
    let held: Vec<_> =
        table.snapshot().into_iter().map(|entry| (entry.lock, entry.state, entry.origin)).collect();
    let by = || "request vm.get".to_owned();
    let expected =
        [("network".to_owned(), LockState::Held, by()), ("vm web".to_owned(), LockState::Held, by())];
    assert_eq!(held, expected);

    waiter.abort();
    assert!(waiter.await.unwrap_err().is_cancelled());
    assert_eq!(table.snapshot(), [], "a task that is gone holds nothing");
}

#[tokio::test]
async fn locks_forget_who_no_longer_waits() {
    let table = LockTable::default();
    let vm = Lock::new("vm web", Vec::new());
    let (release, holder) = hold(&table, &vm).await;
    let wait = |name: &'static str| {
        let vm = vm.clone();
        spawn(&table, name, async move |mut ctx: Ctx<Unlocked>| ctx.lock(&vm).await.push(name))
    };
    let first = wait("first");
    until("one in the queue", || waiting(&table).len() == 1).await;
    let second = wait("second");
    until("two in the queue", || waiting(&table).len() == 2).await;

    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    assert_eq!(waiting(&table), [("vm web".to_owned(), "second".to_owned())]);
    release.send(()).unwrap();
    holder.await.unwrap();
    timeout(LONG, second).await.unwrap().unwrap();
    assert_eq!(table.snapshot(), []);

    // The same where only the wait is given up, not the task.
    let (release, holder) = hold(&table, &vm).await;
    table
        .root("test", async |mut ctx| {
            {
                let mut wait = pin!(ctx.lock(&vm));
                assert!(wait.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
                assert_eq!(waiting(&table), [("vm web".to_owned(), "test".to_owned())]);
            }
            assert_eq!(waiting(&table), []);
            release.send(()).unwrap();
            holder.await.unwrap();
            assert_eq!(*ctx.lock(&vm).await, ["second"]);
        })
        .await;
    assert_eq!(table.snapshot(), []);
}

#[tokio::test]
async fn locks_of_a_task_that_panicked_are_free() {
    let table = LockTable::default();
    let vm = Lock::<Vm, _>::new("vm web", 7);
    let lock = vm.clone();
    let task = spawn(&table, "test", async move |mut ctx: Ctx<Unlocked>| {
        let held = ctx.lock(&lock).await;
        panic!("{} is too much", *held);
    });
    assert_eq!(panic_of(task).await, "7 is too much");
    assert_eq!(table.snapshot(), []);
    table.root("test", async |mut ctx| assert_eq!(*ctx.lock(&vm).await, 7)).await;
}

#[tokio::test]
async fn locks_of_a_pair_come_as_they_were_asked_for() {
    let table = LockTable::default();
    let (a, b) = (Lock::<Vm, _>::new("vm a", "a"), Lock::<Vm, _>::new("vm b", "b"));
    let network = Lock::<Network, _>::new("network", ());
    table
        .root("test", async |mut ctx| {
            for (first, second, expected) in [(&a, &b, ("a", "b")), (&b, &a, ("b", "a"))] {
                let mut pair = ctx.lock_pair(first, second).await.unwrap();
                assert_eq!((*pair.first(), *pair.second()), expected);
                let (one, two, inner) = pair.split();
                assert_eq!((*one, *two), expected);
                drop(inner.lock(&network).await);
                assert_eq!(table.snapshot().len(), 2);
            }
            let again = a.clone();
            assert_eq!(ctx.lock_pair(&a, &again).await.unwrap_err(), SamePair { lock: "vm a".to_owned() });
            assert_eq!(table.snapshot(), []);
        })
        .await;
}

#[tokio::test]
async fn locks_of_pairs_are_waited_for_in_one_order() {
    let table = LockTable::default();
    let (a, b) = (Lock::<Vm, _>::new("vm a", ()), Lock::<Vm, _>::new("vm b", ()));
    let (release, holder) = hold(&table, &a).await;
    let pair = |first: &Lock<Vm, ()>, second: &Lock<Vm, ()>| {
        let (first, second) = (first.clone(), second.clone());
        let origin = format!("{} and {}", first.name(), second.name());
        spawn(&table, origin, async move |mut ctx: Ctx<Unlocked>| {
            drop(ctx.lock_pair(&first, &second).await.unwrap())
        })
    };
    let tasks = [pair(&b, &a), pair(&a, &b)];
    until("both in a queue", || waiting(&table).len() == 2).await;
    assert!(waiting(&table).iter().all(|(lock, _)| lock == "vm a"), "nobody holds b while waiting for a");
    assert_eq!(table.snapshot().len(), 3);
    release.send(()).unwrap();
    holder.await.unwrap();
    for task in tasks {
        timeout(LONG, task).await.unwrap().unwrap();
    }
    assert_eq!(table.snapshot(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn locks_of_pairs_never_deadlock() {
    const LOCKS: usize = 5;
    const TASKS: u64 = 16;
    const ROUNDS: u64 = 300;
    let table = LockTable::default();
    let locks: Arc<Vec<_>> =
        Arc::new((0..LOCKS).map(|n| Lock::<Vm, _>::new(format!("vm {n}"), 0u64)).collect());
    let create = Lock::<CreateVm, _>::new("create", 0u64);
    let mut tasks = Vec::new();
    for task in 0..TASKS {
        let (locks, create) = (locks.clone(), create.clone());
        tasks.push(spawn(&table, Origin::operation(task, "clone"), async move |mut ctx: Ctx<Unlocked>| {
            // Any spread of pairs will do: a linear congruential generator (Knuth's MMIX).
            let mut random = task;
            let mut next = || {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 33) as usize
            };
            for _ in 0..ROUNDS {
                let first = next() % LOCKS;
                let second = (first + 1 + next() % (LOCKS - 1)) % LOCKS;
                let mut pair = ctx.lock_pair(&locks[first], &locks[second]).await.unwrap();
                *pair.first() += 1;
                yield_now().await;
                *pair.second() += 1;
                *pair.ctx().lock(&create).await += 1;
            }
        }));
    }
    for task in tasks {
        timeout(LONG, task).await.expect("no deadlock").unwrap();
    }
    assert_eq!(table.snapshot(), []);
    table
        .root("test", async |mut ctx| {
            let mut sum = 0;
            for lock in locks.iter() {
                sum += *ctx.lock(lock).await;
            }
            assert_eq!((sum, *ctx.lock(&create).await), (2 * TASKS * ROUNDS, TASKS * ROUNDS));
        })
        .await;
}

#[tokio::test]
async fn locks_show_what_a_request_has_become() {
    let table = LockTable::default();
    let vm = Lock::<Vm, _>::new("vm web", ());
    table
        .root("request vm.start", async |mut ctx| {
            assert_eq!(ctx.origin(), Origin::from("request vm.start"));
            ctx.set_origin(Origin::operation(12, "vm-start web"));
            let mut held = ctx.lock(&vm).await;
            assert_eq!(table.snapshot()[0].operation, Some(12));
            held.ctx().set_origin(Origin::operation(13, "vm-stop web"));
            assert_eq!(table.snapshot()[0].origin, "operation 13 vm-stop web");
        })
        .await;
}

#[tokio::test]
async fn locks_have_one_root_in_a_task_but_any_number_beside_each_other() {
    let table = LockTable::default();
    let vm = Lock::<Vm, _>::new("vm web", 0);
    let add = async |mut ctx: Ctx<Unlocked>| *ctx.lock(&vm).await += 1;
    // One after the other, side by side, and in a task that was begun within a root.
    table.root("first", add).await;
    tokio::join!(table.root("second", add), table.root("third", add));
    let lock = vm.clone();
    table
        .root("fourth", async |_| {
            let fifth =
                spawn(&table, "fifth", async move |mut ctx: Ctx<Unlocked>| *ctx.lock(&lock).await += 1);
            fifth.await.unwrap();
        })
        .await;
    table.root("test", async |mut ctx| assert_eq!(*ctx.lock(&vm).await, 4)).await;
}

#[tokio::test]
#[cfg_attr(not(debug_assertions), ignore = "a release build logs it")]
async fn locks_have_no_second_root_within_the_first() {
    let table = LockTable::default();
    let inner = table.clone();
    let task = spawn(&table, "request vm.get", async move |_: Ctx<Unlocked>| {
        inner.root(Origin::operation(3, "vm-stop web"), async |_| ()).await;
    });
    assert_eq!(panic_of(task).await, "a root for operation 3 vm-stop web inside that for request vm.get");
}

#[tokio::test]
#[cfg_attr(not(debug_assertions), ignore = "a release build logs it")]
async fn locks_are_not_taken_with_a_context_that_left_its_root() {
    let table = LockTable::default();
    let vm = Lock::<Vm, _>::new("vm web", ());
    let mut escaped = table.root("first", async |ctx| ctx).await;
    let task = spawn(&table, "second", async move |_: Ctx<Unlocked>| drop(escaped.lock(&vm).await));
    assert_eq!(panic_of(task).await, "the context of first is used outside its root");
}

#[tokio::test]
#[cfg_attr(not(debug_assertions), ignore = "a release build logs it")]
async fn locks_whose_guard_was_forgotten_are_noticed() {
    let table = LockTable::default();
    let (vm, other) = (Lock::<Vm, _>::new("vm web", ()), Lock::<Vm, _>::new("vm db", ()));
    let lock = vm.clone();
    let task = spawn(&table, "test", async move |mut ctx: Ctx<Unlocked>| {
        std::mem::forget(ctx.lock(&lock).await);
        drop(ctx.lock(&other).await);
    });
    assert_eq!(panic_of(task).await, "test forgot a guard: it holds more locks than it knows of");
    let task = spawn(&table, "test", async move |mut ctx: Ctx<Unlocked>| {
        std::mem::forget(ctx.lock(&Lock::<Vm, _>::new("vm db", ())).await);
    });
    assert_eq!(panic_of(task).await, "test forgot a guard: it ended with locks held");
    assert_eq!(table.snapshot().len(), 2, "what is held for ever is shown for ever");
}
