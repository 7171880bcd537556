//! Deleting VMs whose time is over, and stopping those that nobody uses.
//!
//! ```text
//!   event log ──> wake ─┐
//!   next due time ──────┼─> plan: who is due? ─┬─ expired ─────────> delete --force
//!   a job's end ────────┘                      └─ idle, perhaps ───> ask the shim ──> stop
//! ```
//!
//! One task plans; each VM that is due gets a job of its own, so that one that takes its time to shut down holds up nobody. A
//! VM's shim is asked only when it may have been idle for long enough; nothing is polled. What fails is tried again, ever less often.
//!
//! A time to live ends by the wall clock, which may jump, and stands still for no suspended host: it is looked at once a minute at
//! the latest. Idleness is counted by the monotonic clock; the wall clock is asked only how long ago the last connection
//! ended, and is not believed beyond what the monotonic one allows; where it was set meanwhile, the VM gets the doubt. Over a restart of the daemon, the wall clock is all there is.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    task::{Id, JoinSet},
    time::{Instant, sleep_until},
};
use vm_types::{EventKind, ProcessRef, VmId};

use super::now;
use crate::{Engine, EngineError};

/// The longest time in which a jump of the wall clock is not noticed.
const LOOK: Duration = Duration::from_secs(60);
/// Seconds by which two clocks in whole seconds differ without either having been set.
const ROUNDING: u64 = 2;
/// Before the second attempt, and while another operation has the VM; doubled with each further attempt.
const RETRY: Duration = Duration::from_secs(5);
/// As good as never.
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
/// The longest pause between two attempts.
const RETRY_MAX: Duration = Duration::from_secs(300);

/// What is known of a VM that has a time to live or is to be stopped when idle.
#[derive(Debug, Clone)]
struct Policy {
    id: VmId,
    /// Seconds since the Unix epoch.
    expires_at: Option<u64>,
    idle_stop: Option<Duration>,
    /// The VMM and since when it runs, in seconds since the Unix epoch, if the guest could be used: a paused one is not, and could
    /// not shut down either.
    up: Option<(ProcessRef, u64)>,
    /// An operation has it.
    busy: bool,
}

/// How a job failed.
#[derive(Debug)]
enum Setback {
    /// It is tried again.
    Failed,
    /// The daemon goes down; the next one takes over.
    ShuttingDown,
}

/// The world as seen from here.
trait World: Send + Sync + 'static {
    /// Seconds since the Unix epoch.
    fn wall(&self) -> u64;
    /// All VMs that have a policy.
    fn policies(&self) -> Vec<Policy>;
    /// Since when, in seconds since the Unix epoch, no SSH connection has been open; `None` while one is.
    fn idle_since(&self, id: &VmId) -> impl Future<Output = Result<Option<u64>, Setback>> + Send;
    /// Tells people why something happens to a VM.
    fn tell(&self, id: &VmId, message: String);
    fn stop(&self, id: &VmId) -> impl Future<Output = Result<(), Setback>> + Send;
    fn delete(&self, id: &VmId) -> impl Future<Output = Result<(), Setback>> + Send;
}

/// How long one run of a VM has been idle at most.
#[derive(Debug, Clone, Copy)]
struct IdleClock {
    vmm: ProcessRef,
    /// The end of the last connection as the shim had it, once it was asked.
    since: Option<u64>,
    /// At `at`.
    idle: Duration,
    at: Instant,
    /// The wall clock at `at`.
    wall: u64,
}

impl IdleClock {
    /// For a VMM that has run since then, in seconds since the Unix epoch.
    fn new(vmm: ProcessRef, up_since: u64, wall: u64, at: Instant) -> Self {
        let idle = Duration::from_secs(wall.saturating_sub(up_since));
        Self { vmm, since: None, idle, at, wall }
    }

    /// The first moment at which it can have been idle for `limit`.
    fn due(&self, limit: Duration) -> Instant {
        let left = limit.saturating_sub(self.idle);
        // What does not fit into the clock is not due in its time.
        self.at.checked_add(left).unwrap_or(self.at + FAR)
    }

    /// Takes the shim's answer in.
    fn observe(&mut self, idle_since: Option<u64>, wall: u64, at: Instant) {
        let passed = at.saturating_duration_since(self.at);
        let most = self.idle + passed;
        // What the wall clock has leapt ahead since the last look. The shim's time may be of before that.
        let leap = wall.saturating_sub(self.wall).saturating_sub(passed.as_secs());
        let leap = if leap > ROUNDING { leap } else { 0 };
        self.idle = match idle_since {
            None => Duration::ZERO,
            // Nobody has come since the last look.
            Some(since) if self.since == Some(since) => most,
            Some(since) => most.min(Duration::from_secs(wall.saturating_sub(since).saturating_sub(leap))),
        };
        (self.since, self.at, self.wall) = (idle_since, at, wall);
    }
}

/// What is remembered of one VM.
#[derive(Debug, Default)]
struct Tended {
    clock: Option<IdleClock>,
    job: Option<Id>,
    /// Failed ones in a row.
    attempts: u32,
    not_before: Option<Instant>,
}

/// What is to be done to a VM now.
#[derive(Debug)]
enum Job {
    Delete,
    /// Ask whether it is idle; if so, stop it.
    Look(IdleClock, Duration),
}

/// How a job ended.
#[derive(Debug)]
enum Done {
    Acted,
    InUse(IdleClock),
    Setback(Setback),
}

impl Engine {
    /// Looks after expiry and idleness from now on. To be called once, when all VMs are known.
    pub(crate) fn watch_policies(&self) {
        let engine = self.clone();
        tokio::spawn(async move {
            loop {
                let changes = engine.inner.events.changes();
                let tending = tokio::spawn(tend(Arc::new(engine.clone()), changes));
                // Its end is the daemon's; a panic is a bug that must not end all VMs' times to live.
                match tending.await {
                    Ok(()) => return,
                    Err(error) => tracing::error!(%error, "looking after expiry failed; beginning anew"),
                }
                tokio::time::sleep(RETRY).await;
            }
        });
    }
}

/// Runs until the daemon goes down. `changes` wakes it when a VM has come, gone, started or been changed.
async fn tend<W: World>(world: Arc<W>, mut changes: watch::Receiver<u64>) {
    let mut tended = HashMap::new();
    let mut jobs = JoinSet::new();
    loop {
        changes.borrow_and_update();
        let next = plan(&world, &mut tended, &mut jobs);
        // Cancel-safe: each arm only waits, and what it waited for shows in the next plan.
        tokio::select! {
            Some(ended) = jobs.join_next_with_id() => {
                let (job, done) = match ended {
                    Ok((job, done)) => (job, done),
                    // A bug; its own VM is tried again, and no other suffers.
                    Err(error) => (error.id(), Done::Setback(Setback::Failed)),
                };
                if settle(&mut tended, job, done).is_break() {
                    return;
                }
            }
            changed = changes.changed() => if changed.is_err() { return },
            () = at(next) => {}
        }
    }
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Begins what is due; when to look again at the latest.
fn plan<W: World>(
    world: &Arc<W>,
    tended: &mut HashMap<VmId, Tended>,
    jobs: &mut JoinSet<Done>,
) -> Option<Instant> {
    let (now, wall) = (Instant::now(), world.wall());
    let policies = world.policies();
    let known: HashSet<&VmId> = policies.iter().map(|policy| &policy.id).collect();
    tended.retain(|id, vm| vm.job.is_some() || known.contains(id));
    let mut next = None;
    let mut wake = |moment: Instant| next = Some(next.map_or(moment, |next: Instant| next.min(moment)));
    for policy in &policies {
        let vm = tended.entry(policy.id.clone()).or_default();
        if vm.job.is_some() {
            continue;
        }
        match (policy.idle_stop, policy.up) {
            (Some(_), Some((vmm, since))) if vm.clock.is_none_or(|clock| clock.vmm != vmm) => {
                vm.clock = Some(IdleClock::new(vmm, since, wall, now));
            }
            (Some(_), Some(_)) => {}
            _ => vm.clock = None,
        }
        let expiry = policy.expires_at.map(|at| Duration::from_secs(at.saturating_sub(wall)));
        let look = vm.clock.zip(policy.idle_stop);
        let job = match (expiry, look) {
            (Some(Duration::ZERO), _) => Job::Delete,
            (_, Some((clock, limit))) if clock.due(limit) <= now => Job::Look(clock, limit),
            _ => {
                if let Some(expiry) = expiry {
                    wake(now + expiry.min(LOOK));
                }
                if let Some((clock, limit)) = look {
                    wake(clock.due(limit));
                }
                continue;
            }
        };
        match vm.not_before {
            _ if policy.busy => wake(now + RETRY),
            Some(moment) if moment > now => wake(moment),
            _ => {
                let first = vm.attempts == 0;
                let job = jobs.spawn(act(world.clone(), policy.id.clone(), job, first));
                vm.job = Some(job.id());
            }
        }
        // It may expire while it waits for being stopped.
        if let Some(expiry) = expiry.filter(|expiry| !expiry.is_zero()) {
            wake(now + expiry.min(LOOK));
        }
    }
    next
}

async fn act<W: World>(world: Arc<W>, id: VmId, job: Job, first: bool) -> Done {
    let acted = match job {
        Job::Delete => {
            if first {
                world.tell(&id, "its time to live is over; it is deleted".into());
            }
            world.delete(&id).await
        }
        Job::Look(mut clock, limit) => {
            match world.idle_since(&id).await {
                Ok(since) => clock.observe(since, world.wall(), Instant::now()),
                Err(setback) => return Done::Setback(setback),
            }
            if clock.idle < limit {
                return Done::InUse(clock);
            }
            if first {
                world.tell(&id, format!("nobody has used it for {} s; it is stopped", clock.idle.as_secs()));
            }
            world.stop(&id).await
        }
    };
    match acted {
        Ok(()) => Done::Acted,
        Err(setback) => Done::Setback(setback),
    }
}

fn settle(tended: &mut HashMap<VmId, Tended>, job: Id, done: Done) -> std::ops::ControlFlow<()> {
    let Some(vm) = tended.values_mut().find(|vm| vm.job == Some(job)) else {
        return std::ops::ControlFlow::Continue(());
    };
    vm.job = None;
    match done {
        Done::Acted => *vm = Tended::default(),
        Done::InUse(clock) => *vm = Tended { clock: Some(clock), ..Tended::default() },
        Done::Setback(Setback::Failed) => {
            let pause = RETRY.saturating_mul(1 << vm.attempts.min(16)).min(RETRY_MAX);
            vm.not_before = Some(Instant::now() + pause);
            vm.attempts += 1;
        }
        Done::Setback(Setback::ShuttingDown) => return std::ops::ControlFlow::Break(()),
    }
    std::ops::ControlFlow::Continue(())
}

impl World for Engine {
    fn wall(&self) -> u64 {
        now()
    }

    fn policies(&self) -> Vec<Policy> {
        let cells = self.cells();
        let policies = cells.values().filter_map(|cell| {
            let (expires_at, idle) =
                cell.with_record(|record| (record.spec.expires_at, record.spec.idle_stop_seconds));
            let idle_stop = idle.filter(|seconds| *seconds > 0).map(Duration::from_secs);
            if expires_at.is_none() && idle_stop.is_none() {
                return None;
            }
            let up = cell.live().filter(|_| !cell.paused()).map(|live| (live.vmm, live.since));
            let busy = cell.operation().is_some();
            Some(Policy { id: cell.id().clone(), expires_at, idle_stop, up, busy })
        });
        policies.collect()
    }

    async fn idle_since(&self, id: &VmId) -> Result<Option<u64>, Setback> {
        // A VM that is gone shows so in the next plan.
        let Some(cell) = self.by_id(id) else { return Ok(None) };
        match vm_shim::status(&cell.paths()).await {
            // A shim too old to count is never idle.
            Ok(status) if status.idle_since.is_none() && status.console_connections == 0 => Ok(None),
            Ok(status) if status.ssh_connections > 0 => Ok(None),
            Ok(status) => Ok(Some(status.ssh_idle_since.unwrap_or(status.started_at))),
            Err(error) => {
                let error = EngineError::from(error).chain();
                tracing::warn!(vm = %cell.name(), %error, "its shim cannot be asked whether the VM is idle");
                Err(Setback::Failed)
            }
        }
    }

    fn tell(&self, id: &VmId, message: String) {
        if let Some(cell) = self.by_id(id) {
            tracing::info!(vm = %cell.name(), "{message}");
            self.event(EventKind::VmExpired, &cell, None, message);
        }
    }

    async fn stop(&self, id: &VmId) -> Result<(), Setback> {
        let Some(cell) = self.by_id(id) else { return Ok(()) };
        let operation = Engine::stop(self, cell, None).map_err(|error| setback(&error))?;
        self.operations().wait(operation).await.map(drop).map_err(|error| setback(&error))
    }

    async fn delete(&self, id: &VmId) -> Result<(), Setback> {
        let Some(cell) = self.by_id(id) else { return Ok(()) };
        let operation = Engine::delete(self, cell, true).map_err(|error| setback(&error))?;
        operation.wait().await.map_err(|error| setback(&error))
    }
}

fn setback(error: &EngineError) -> Setback {
    match error {
        EngineError::ShuttingDown => Setback::ShuttingDown,
        // The registry has logged it.
        _ => Setback::Failed,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const START: u64 = 1_000_000;

    #[derive(Debug)]
    struct State {
        policy: Option<Policy>,
        /// The wall clock at the beginning; it goes on with the monotonic one.
        wall: u64,
        idle_since: Option<u64>,
        failures: u32,
        /// What was done, and how many seconds after the beginning.
        log: Vec<(&'static str, u64)>,
    }

    struct Fake {
        begun: Instant,
        state: Mutex<State>,
        changes: watch::Sender<u64>,
    }

    impl Fake {
        fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
            f(&mut self.state.lock().unwrap())
        }

        fn note(&self, what: &'static str) {
            let seconds = self.begun.elapsed().as_secs();
            self.with(|state| state.log.push((what, seconds)));
        }

        fn attempt(&self, what: &'static str) -> Result<(), Setback> {
            self.note(what);
            self.with(|state| {
                if state.failures > 0 {
                    state.failures -= 1;
                    return Err(Setback::Failed);
                }
                match (what, &mut state.policy) {
                    ("stop", Some(policy)) => policy.up = None,
                    _ => state.policy = None,
                }
                Ok(())
            })
        }

        fn change(&self, f: impl FnOnce(&mut State)) {
            self.with(f);
            self.changes.send_modify(|version| *version += 1);
        }
    }

    impl World for Fake {
        fn wall(&self) -> u64 {
            self.with(|state| state.wall) + self.begun.elapsed().as_secs()
        }
        fn policies(&self) -> Vec<Policy> {
            self.with(|state| state.policy.clone().into_iter().collect())
        }
        async fn idle_since(&self, _: &VmId) -> Result<Option<u64>, Setback> {
            self.note("look");
            Ok(self.with(|state| state.idle_since))
        }
        fn tell(&self, _: &VmId, _: String) {
            self.note("tell");
        }
        async fn stop(&self, _: &VmId) -> Result<(), Setback> {
            self.attempt("stop")
        }
        async fn delete(&self, _: &VmId) -> Result<(), Setback> {
            self.attempt("delete")
        }
    }

    /// A VM that was started just now, with these policies in seconds.
    fn world(ttl: Option<u64>, idle: Option<u64>) -> Arc<Fake> {
        let policy = Policy {
            id: "00112233aabb".parse().unwrap(),
            expires_at: ttl.map(|ttl| START + ttl),
            idle_stop: idle.map(Duration::from_secs),
            up: Some((ProcessRef { pid: 1, start_ticks: 1 }, START)),
            busy: false,
        };
        let state = State {
            policy: Some(policy),
            wall: START,
            idle_since: Some(START),
            failures: 0,
            log: Vec::new(),
        };
        let (changes, _) = watch::channel(0);
        let fake = Arc::new(Fake { begun: Instant::now(), state: Mutex::new(state), changes });
        tokio::spawn(tend(fake.clone(), fake.changes.subscribe()));
        fake
    }

    // With the clock paused, time passes only where everybody waits: what comes out is exact.
    async fn pass(seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }

    fn log(world: &Fake) -> Vec<(&'static str, u64)> {
        world.with(|state| state.log.clone())
    }

    #[tokio::test(start_paused = true)]
    async fn a_vm_is_deleted_when_its_time_is_over() {
        let world = world(Some(200), None);
        pass(199).await;
        assert_eq!(log(&world), []);
        pass(1000).await;
        assert_eq!(log(&world), [("tell", 200), ("delete", 200)]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_nobody_uses_is_stopped_and_asked_about_only_when_it_may_be_due() {
        let world = world(None, Some(600));
        pass(10_000).await;
        assert_eq!(log(&world), [("look", 600), ("tell", 600), ("stop", 600)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_puts_it_off() {
        let world = world(None, Some(600));
        pass(100).await;
        world.with(|state| state.idle_since = None);
        pass(1000).await;
        // It ends at 1,100; the looks while it was open were at 600, and the next is at 1,200.
        world.with(|state| state.idle_since = Some(START + 1100));
        pass(10_000).await;
        assert_eq!(
            log(&world),
            [("look", 600), ("look", 1200), ("look", 1700), ("tell", 1700), ("stop", 1700)]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_jump_of_the_clock_makes_nobody_idle() {
        let world = world(None, Some(600));
        pass(500).await;
        world.with(|state| {
            // Somebody was there a moment ago, by a clock that then leapt a day ahead.
            state.idle_since = Some(START + 499);
            state.wall += 86_400;
        });
        pass(10_000).await;
        assert_eq!(log(&world), [("look", 600), ("look", 1099), ("tell", 1099), ("stop", 1099)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_put_back_keeps_nobody_up() {
        let world = world(None, Some(600));
        world.with(|state| state.idle_since = None);
        pass(601).await;
        world.with(|state| {
            state.idle_since = Some(START + 601);
            state.wall -= 86_400;
        });
        pass(10_000).await;
        // First seen at 1,200, when the wall clock makes no sense of it; from there on it counts.
        assert_eq!(log(&world)[1..], [("look", 1200), ("look", 1800), ("tell", 1800), ("stop", 1800)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_slept_is_noticed_within_a_minute() {
        let world = world(Some(86_400), None);
        pass(90).await;
        world.with(|state| state.wall += 100_000);
        pass(60).await;
        assert_eq!(log(&world).last().unwrap().0, "delete");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_being_worked_on_is_left_alone_until_that_ends() {
        let world = world(Some(100), None);
        world.with(|state| state.policy.as_mut().unwrap().busy = true);
        pass(500).await;
        assert_eq!(log(&world), []);
        world.with(|state| state.policy.as_mut().unwrap().busy = false);
        pass(RETRY.as_secs()).await;
        assert_eq!(log(&world).last().unwrap().0, "delete");
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_is_tried_again_ever_less_often_and_told_once() {
        let world = world(Some(100), None);
        world.with(|state| state.failures = 3);
        pass(10_000).await;
        let expected = [("tell", 100), ("delete", 100), ("delete", 105), ("delete", 115), ("delete", 135)];
        assert_eq!(log(&world), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_counts_at_once() {
        let world = world(None, None);
        pass(1000).await;
        assert_eq!(log(&world), []);
        world.change(|state| state.policy.as_mut().unwrap().expires_at = Some(START + 1010));
        pass(100).await;
        assert_eq!(log(&world), [("tell", 1010), ("delete", 1010)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_returns_counts_what_was_before_it() {
        let world = world(None, Some(600));
        // Adopted: it runs since long ago, and its last connection ended 500 s ago.
        world.change(|state| {
            state.idle_since = Some(START - 500);
            let vmm = ProcessRef { pid: 2, start_ticks: 2 };
            state.policy.as_mut().unwrap().up = Some((vmm, START - 5000));
        });
        pass(1000).await;
        assert_eq!(log(&world), [("look", 0), ("look", 100), ("tell", 100), ("stop", 100)]);
    }
}
