use std::{
    sync::atomic::{AtomicUsize, Ordering},
    task::Poll,
};

use async_trait::async_trait;
use tokio::sync::Notify;
use vm_disk::{Backend, DiskError, FakeCow};
use vm_locks::{LockState, Origin, Unlocked};
use vm_net::FakeNet;
use vm_shim::ShimError;
use vm_types::{ProcessRef, VmPaths};

use super::*;

struct Bench {
    dir: tempfile::TempDir,
    net: Arc<FakeNet>,
    host: Host,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let net = Arc::new(FakeNet::new());
    let (cow, shims) = (Arc::new(FakeCow::new()), Arc::new(FakeShims::new()));
    let host = Host::new(net.clone(), cow, shims, [dir.path().to_owned()], Arc::new(vm_host::HostRunner));
    Bench { dir, net, host }
}

/// A scope whose steps are operations of their own.
struct Steps {
    scope: Scope,
    locks: LockTable,
}

impl Steps {
    async fn root<R>(&self, step: impl AsyncFnOnce(&Scope, &mut Ctx<Unlocked>) -> R) -> R {
        self.locks.root("step", async |mut ctx| step(&self.scope, &mut ctx).await).await
    }

    async fn apply(&self, effect: Effect, phase: Phase) -> Result<Handle, EngineError> {
        self.root(async |scope, ctx| scope.apply(ctx, effect, phase).await).await
    }

    async fn unwind(&self, phase: Phase) -> Result<(), EngineError> {
        self.root(async |scope, ctx| scope.unwind(ctx, phase).await).await
    }

    async fn close(&self) -> Result<(), EngineError> {
        self.root(async |scope, ctx| scope.close(ctx).await).await
    }

    /// What a daemon that dies in the middle of a step leaves.
    async fn intend(&self, effect: &Effect, phase: Phase, former: Handle) {
        self.root(async |scope, ctx| {
            ctx.lock(&scope.journal).await.record(effect, phase, Step::Intent, former).unwrap();
        })
        .await;
    }
}

fn scope(bench: &Bench) -> Steps {
    let path = |name: &str| bench.dir.path().join(name);
    let name = "journal of vm web".to_owned();
    let scope = Scope::open(&bench.host, name, path("j.jsonl"), path("h.json"), "boot").unwrap();
    Steps { scope, locks: LockTable::default() }
}

fn bridge() -> Effect {
    Effect::Bridge { name: "vmbr-aaaa".into(), address: "10.9.0.1/24".parse().unwrap() }
}

fn tap(number: u32) -> Effect {
    Effect::Tap { name: format!("vtaaaa{number:04x}"), bridge: "vmbr-aaaa".into() }
}

async fn there(bench: &Bench, effect: &Effect) -> bool {
    matches!(bench.host.observe(effect).await.unwrap(), Observed::Present(_))
}

#[tokio::test(start_paused = true)]
async fn the_fold_is_written_soon_after_a_phase_has_ended() {
    let bench = bench();
    let scope = scope(&bench);
    let handles = bench.dir.path().join("h.json");
    scope.apply(bridge(), Phase::Start).await.unwrap();
    scope.root(async |scope, ctx| scope.settle(ctx).await).await;
    assert!(!handles.exists(), "nobody waits for it");
    while !handles.exists() {
        tokio::time::sleep(SOON).await;
    }
    assert!(std::fs::read_to_string(&handles).unwrap().contains("vmbr-aaaa"));
    scope.unwind(Phase::Start).await.unwrap();
    scope.close().await.unwrap();
    assert!(!handles.exists());
}

#[tokio::test]
async fn a_phase_is_unwound_in_reverse_and_no_other_is_touched() {
    let bench = bench();
    let scope = scope(&bench);
    let dir = Effect::Directory { path: bench.dir.path().join("kept"), mode: 0o700 };
    scope.apply(dir.clone(), Phase::Create).await.unwrap();
    scope.apply(bridge(), Phase::Start).await.unwrap();
    // A bridge with a port cannot be removed before it, so only the reverse order succeeds.
    scope.apply(tap(1), Phase::Start).await.unwrap();
    scope.unwind(Phase::Start).await.unwrap();
    assert!(!there(&bench, &bridge()).await && !there(&bench, &tap(1)).await);
    assert!(there(&bench, &dir).await);
    assert!(scope.close().await.is_err(), "the directory is still open");
    scope.unwind(Phase::Create).await.unwrap();
    scope.close().await.unwrap();
    assert!(!Path::new(&bench.dir.path().join("j.jsonl")).exists());
}

#[tokio::test]
async fn what_a_dead_daemon_left_is_undone_by_the_next() {
    let bench = bench();
    let first = scope(&bench);
    first.apply(bridge(), Phase::Start).await.unwrap();
    first.apply(tap(1), Phase::Start).await.unwrap();
    // Dead between the intent and the effect.
    first.intend(&tap(2), Phase::Start, Handle::None).await;
    drop(first);
    let second = scope(&bench);
    second.unwind(Phase::Start).await.unwrap();
    assert!(!there(&bench, &tap(1)).await && !there(&bench, &bridge()).await);
    second.close().await.unwrap();
}

#[tokio::test]
async fn an_effect_that_fails_is_undone_and_those_before_it_stay_for_unwinding() {
    let bench = bench();
    let scope = scope(&bench);
    scope.apply(bridge(), Phase::Start).await.unwrap();
    bench.net.fail_apply(1);
    let error = scope.apply(tap(1), Phase::Start).await.unwrap_err();
    assert!(matches!(error, EngineError::Net(_)), "{error}");
    assert!(!there(&bench, &tap(1)).await);
    assert!(there(&bench, &bridge()).await);
    scope.unwind(Phase::Start).await.unwrap();
    scope.close().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_undone_is_kept_and_tried_again() {
    let bench = bench();
    let scope = scope(&bench);
    scope.apply(bridge(), Phase::Start).await.unwrap();
    bench.net.fail_undo(true);
    let error = scope.unwind(Phase::Start).await.unwrap_err();
    assert!(matches!(&error, EngineError::Undo { id, .. } if id.0 == "bridge:vmbr-aaaa"), "{error}");
    assert!(scope.close().await.is_err(), "the bridge would be forgotten");
    bench.net.fail_undo(false);
    scope.unwind(Phase::Start).await.unwrap();
    scope.close().await.unwrap();
}

#[tokio::test]
async fn a_setting_gets_its_former_value_back_wherever_the_daemon_died() {
    let key = "net/ipv4/ip_forward";
    let setting = Effect::Sysctl { key: key.into(), value: "1".into() };
    for applied_again in [false, true] {
        let bench = bench();
        bench.net.set_setting(key, "0");
        let first = scope(&bench);
        // Dead right after the change, which no `applied` tells of.
        let former = vm_net::Net::former(bench.net.as_ref(), &setting).await.unwrap();
        first.intend(&setting, Phase::Host, former).await;
        vm_net::Net::apply(bench.net.as_ref(), &setting).await.unwrap();
        drop(first);
        let second = scope(&bench);
        if applied_again {
            second.apply(setting.clone(), Phase::Host).await.unwrap();
        }
        second.unwind(Phase::Host).await.unwrap();
        assert_eq!(bench.net.setting(key), "0", "applied again: {applied_again}");
    }
}

#[tokio::test]
async fn what_somebody_took_away_is_made_again() {
    let bench = bench();
    let scope = scope(&bench);
    scope.apply(bridge(), Phase::Host).await.unwrap();
    vm_net::Net::undo(bench.net.as_ref(), &bridge(), &Handle::None).await.unwrap();
    scope.apply(bridge(), Phase::Host).await.unwrap();
    assert!(there(&bench, &bridge()).await);
}

/// Shims that take as long to start as the test wants.
#[derive(Debug, Default)]
struct Slow {
    shims: FakeShims,
    begun: Notify,
    go_on: Notify,
    applied: AtomicUsize,
}

#[async_trait]
impl Shims for Slow {
    async fn apply(&self, run_dir: &Path, spec: &Path) -> Result<Handle, ShimError> {
        self.begun.notify_one();
        self.go_on.notified().await;
        self.applied.fetch_add(1, Ordering::Relaxed);
        self.shims.apply(run_dir, spec).await
    }

    async fn observe(&self, run_dir: &Path) -> Observed {
        self.shims.observe(run_dir).await
    }

    async fn undo(&self, run_dir: &Path, handle: &Handle) -> Result<(), ShimError> {
        self.shims.undo(run_dir, handle).await
    }

    fn verify(&self, paths: &VmPaths, shim: ProcessRef, vmm: ProcessRef) -> bool {
        self.shims.verify(paths, shim, vmm)
    }

    fn running(&self) -> Vec<PathBuf> {
        self.shims.running()
    }
}

/// What the table of locks shows: lock, state and by whom.
fn shown(locks: &LockTable) -> Vec<(String, LockState, String)> {
    locks.snapshot().into_iter().map(|entry| (entry.lock, entry.state, entry.origin)).collect()
}

/// Lets the other tasks run until it is so.
async fn until(what: &str, so: impl Fn() -> bool) {
    let wait = async {
        while !so() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Until all tasks but the test's own have ended.
async fn quiet() {
    let tasks = tokio::runtime::Handle::current().metrics();
    until("all tasks ended", || tasks.num_alive_tasks() == 0).await;
}

#[tokio::test]
async fn an_effect_that_has_begun_goes_on_without_its_caller_and_unwinding_waits_for_it() {
    let slow = Arc::new(Slow::default());
    let mut bench = bench();
    bench.host.shims = slow.clone();
    let Steps { scope, locks } = scope(&bench);
    let scope = Arc::new(scope);
    let run_dir = bench.dir.path().join("run");
    let shim = Effect::Shim { spec: run_dir.join("shim.json"), run_dir };

    let (applying, effect) = (scope.clone(), shim.clone());
    let caller = tokio::spawn(locks.root(Origin::operation(7, "vm-start web"), async move |mut ctx| {
        applying.apply(&mut ctx, effect, Phase::Start).await
    }));
    slow.begun.notified().await;
    let journal = || "journal of vm web".to_owned();
    let held = (journal(), LockState::Held, "operation 7 vm-start web".to_owned());
    assert_eq!(shown(&locks), std::slice::from_ref(&held), "a stuck effect can be seen");
    caller.abort();
    assert!(caller.await.unwrap_err().is_cancelled());

    let unwound = scope.clone();
    let unwinding = tokio::spawn(
        locks.root("unwinding", async move |mut ctx| unwound.unwind(&mut ctx, Phase::Start).await),
    );
    until("unwinding waits", || shown(&locks).len() == 2).await;
    assert_eq!(shown(&locks), [held, (journal(), LockState::Waiting, "unwinding".to_owned())]);
    slow.go_on.notify_one();
    unwinding.await.unwrap().unwrap();
    assert_eq!(slow.applied.load(Ordering::Relaxed), 1);
    assert!(!there(&bench, &shim).await);
    quiet().await;
    assert_eq!(shown(&locks), []);
}

#[tokio::test]
async fn an_effect_whose_caller_gave_up_at_once_is_not_begun_after_the_unwinding() {
    let bench = bench();
    let steps = scope(&bench);
    {
        let mut apply = std::pin::pin!(steps.apply(bridge(), Phase::Start));
        let polled = std::future::poll_fn(|context| Poll::Ready(apply.as_mut().poll(context))).await;
        assert!(polled.is_pending(), "its task has not run yet");
    }
    steps.unwind(Phase::Start).await.unwrap();
    quiet().await;
    assert!(!there(&bench, &bridge()).await);
    steps.close().await.unwrap();
}

#[tokio::test]
async fn an_effect_whose_caller_gave_up_while_it_waited_leaves_the_queue() {
    let bench = bench();
    let Steps { scope, locks } = scope(&bench);
    let scope = Arc::new(scope);
    let (applying, table) = (scope.clone(), locks.clone());
    locks
        .root("other", async |mut ctx| {
            let held = ctx.lock(&scope.journal).await;
            let caller =
                tokio::spawn(table.root("caller", async move |mut ctx| {
                    applying.apply(&mut ctx, bridge(), Phase::Start).await
                }));
            until("the caller waits", || shown(&table).len() == 2).await;
            caller.abort();
            until("it has left the queue", || shown(&table).len() == 1).await;
            drop(held);
        })
        .await;
    quiet().await;
    assert!(!there(&bench, &bridge()).await);
    assert!(locks.root("other", async |mut ctx| scope.entries(&mut ctx).await).await.is_empty());
}

/// Disks whose copying never ends.
#[derive(Debug)]
struct Endless(FakeCow);

#[async_trait]
impl Cow for Endless {
    fn backend(&self) -> Backend {
        self.0.backend()
    }

    async fn observe(&self, effect: &Effect) -> Result<Observed, DiskError> {
        self.0.observe(effect).await
    }

    async fn apply(&self, _: &Effect) -> Result<Handle, DiskError> {
        std::future::pending().await
    }

    async fn grow(&self, effect: &Effect, size_bytes: u64) -> Result<(), DiskError> {
        self.0.grow(effect, size_bytes).await
    }

    async fn undo(&self, effect: &Effect, handle: &Handle) -> Result<(), DiskError> {
        self.0.undo(effect, handle).await
    }
}

#[tokio::test]
async fn the_copying_of_a_disk_stops_with_its_caller() {
    let mut bench = bench();
    bench.host.cow = Arc::new(Endless(FakeCow::new()));
    let steps = scope(&bench);
    let path = bench.dir.path().join("disk");
    let disk = Effect::CowDisk { base: "/base".into(), path, size_bytes: 1 << 20, delta: false };
    {
        let mut apply = std::pin::pin!(steps.apply(disk, Phase::Create));
        let polled = std::future::poll_fn(|context| Poll::Ready(apply.as_mut().poll(context))).await;
        assert!(polled.is_pending());
        assert_eq!(
            shown(&steps.locks),
            [("journal of vm web".to_owned(), LockState::Held, "step".to_owned())]
        );
    }
    assert_eq!(shown(&steps.locks), []);
    let close = steps.close().await;
    assert!(close.is_err(), "its intent is on record");
    // This would wait for ever for a copying that went on.
    steps.unwind(Phase::Create).await.unwrap();
    steps.close().await.unwrap();
}
