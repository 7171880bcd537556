//! The daemon dies, or a step fails, on either side of every effect, while a VM is created, started, stopped, deleted or
//! recovered; nothing is lost, stuck or leaked.
//!
//! Failpoints are those of all [`EffectKind`]s. A first pass sees which of them an operation comes by (the daemon prints them);
//! one that none comes by fails the test. Then each of these is a case of its own:
//!
//! ```text
//!   prepare ──> operation, with a failpoint ──> a daemon without ──> what was acknowledged holds; starts; is deleted
//!   (no failpoint)   the daemon kills itself,                          ──> daemon ended, snapshot as before
//!                    or the step fails
//! ```

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::ExitStatus,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use strum::VariantArray;
use vm_api::ErrorKind;
use vm_tests::{
    FakeWorld,
    fakes::{Started, was_killed},
    programs,
    rpc::{Failure, Seen},
    world::SHORT,
};
use vm_types::{EffectKind, vm::VmState};

/// The one VM of each case.
const VM: &str = "a";
/// What a step fails with.
const ERRORS: [&str; 3] = ["ENOSPC", "EBUSY", "EPERM"];
/// How often an operation may come by one failpoint before further times are no case of their own.
const TIMES: usize = 3;
/// Worlds that work at once.
const WORKERS: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Create,
    Start,
    Stop,
    Delete,
    /// A daemon that comes up after its predecessor and a VMM were killed.
    Recover,
}

const OPERATIONS: [Operation; 5] =
    [Operation::Create, Operation::Start, Operation::Stop, Operation::Delete, Operation::Recover];

/// What the client knows of its request.
#[derive(Debug)]
enum Answer {
    Done,
    Refused(ErrorKind, String),
    /// The daemon died before it said.
    None,
}

/// What must not be.
#[derive(Debug)]
enum Wrong {
    Leak(Vec<String>),
    Lost(String),
    Stuck(String),
    Other(String),
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leak(what) => write!(f, "leak: {what:#?}"),
            Self::Lost(what) => write!(f, "lost: {what}"),
            Self::Stuck(what) => write!(f, "stuck: {what}"),
            Self::Other(what) => f.write_str(what),
        }
    }
}

/// One run.
#[derive(Debug, Clone)]
struct Case {
    operation: Operation,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    /// The daemon dies there, the n-th time.
    Kill { point: String, time: usize },
    /// The step fails, with each of [`ERRORS`] in turn.
    Errors { point: String },
    /// The step fails and cannot be undone.
    FailingRollback { failpoints: String },
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operation = format!("{:?}", self.operation).to_lowercase();
        match &self.what {
            What::Kill { point, time } => write!(f, "{operation}, killed at {point} the {time}. time"),
            What::Errors { point } => write!(f, "{operation}, errors at {point}"),
            What::FailingRollback { failpoints } => write!(f, "{operation}, {failpoints}"),
        }
    }
}

/// Why no daemon of this test comes by an effect. Its steps, taken alone, are those of the engine's own test of failpoints.
fn elsewhere(kind: EffectKind) -> Option<&'static str> {
    match kind {
        EffectKind::Cgroup => {
            Some("only a VMM that is locked in has one, and the fake is not; see the end-to-end test `jail`")
        }
        EffectKind::DmSnapshot if !Path::new("/dev/mapper/control").exists() => {
            Some("this host has no device-mapper; see the nested host's tests")
        }
        _ => None,
    }
}

#[test]
fn nothing_is_lost_stuck_or_leaked_at_any_failpoint() {
    let begun = Instant::now();
    let points: Vec<String> = EffectKind::VARIANTS
        .iter()
        .filter(|kind| match elsewhere(**kind) {
            Some(why) => {
                crate::say(&format!("NOT HERE: steps of {kind:?}: {why}"));
                false
            }
            None => true,
        })
        .flat_map(|kind| points_of(*kind))
        .collect();
    let reached = discover(&points);
    let missed: Vec<_> =
        points.iter().filter(|point| !reached.keys().any(|(_, other)| other == *point)).collect();
    assert!(
        missed.is_empty(),
        "no operation of {OPERATIONS:?} comes by {missed:#?}: an effect needs all four"
    );

    let cases = cases(&reached);
    let kills = cases.iter().filter(|case| matches!(case.what, What::Kill { .. })).count();
    let errors = cases.iter().filter(|case| matches!(case.what, What::Errors { .. })).count();
    let failures = run_all(&cases);
    let count = |test: fn(&Wrong) -> bool| failures.iter().filter(|(_, wrong)| test(wrong)).count();
    crate::say(&format!(
        "{} failpoints × {} operations: {} leaks, {} lost, {} stuck ({kills} kills, {} failing steps, {} failing \
         rollbacks; {:.0?})",
        points.len(),
        OPERATIONS.len(),
        count(|wrong| matches!(wrong, Wrong::Leak(_))),
        count(|wrong| matches!(wrong, Wrong::Lost(_))),
        count(|wrong| matches!(wrong, Wrong::Stuck(_))),
        errors * ERRORS.len(),
        cases.len() - kills - errors,
        begun.elapsed(),
    ));
    let mut text = String::new();
    for (case, wrong) in &failures {
        let _ = writeln!(text, "* {case}: {wrong}");
    }
    assert!(failures.is_empty(), "{} of {} cases:\n{text}", failures.len(), cases.len());
}

fn points_of(kind: EffectKind) -> Vec<String> {
    let kind: &'static str = kind.into();
    let both = |side: &str| ["before", "after"].map(|when| format!("effect.{kind}.{side}.{when}"));
    ["apply", "undo"].iter().flat_map(|side| both(side)).collect()
}

/// A world in which each kind of effect has its use: a plugin plans those that the core does not.
fn world() -> FakeWorld {
    let mut host = FakeWorld::new("");
    host.install(&programs::test_plugin("effects"), &[]);
    host
}

/// Which failpoints each operation comes by, and how often.
fn discover(points: &[String]) -> BTreeMap<(Operation, String), usize> {
    let print: Vec<_> = points.iter().map(|point| format!("{point}=print(came by {point})")).collect();
    let print = print.join(";");
    let mut host = world();
    let mut reached = BTreeMap::new();
    for operation in OPERATIONS {
        prepare(&mut host, operation).unwrap_or_else(|wrong| panic!("before {operation:?}: {wrong}"));
        let (_, from) = host.logged(0);
        let (status, answer) =
            act(&mut host, operation, &print).unwrap_or_else(|wrong| panic!("{operation:?}: {wrong}"));
        assert!(
            matches!(answer, Answer::Done) && status.success(),
            "{operation:?}: {answer:?}, and the daemon ends with {status}"
        );
        let (log, _) = host.logged(from);
        for point in log.lines().filter_map(|line| Some(line.split_once("came by ")?.1.trim())) {
            *reached.entry((operation, point.to_owned())).or_default() += 1;
        }
        verify(&mut host, operation, &answer).unwrap_or_else(|wrong| panic!("after {operation:?}: {wrong}"));
    }
    reached
}

fn cases(reached: &BTreeMap<(Operation, String), usize>) -> Vec<Case> {
    let mut cases = Vec::new();
    for ((operation, point), times) in reached {
        let mut add = |what| cases.push(Case { operation: *operation, what });
        for time in 1..=(*times).min(TIMES) {
            add(What::Kill { point: point.clone(), time });
        }
        add(What::Errors { point: point.clone() });
        let makes = matches!(operation, Operation::Create | Operation::Start);
        if makes && let Some(effect) = point.strip_suffix(".apply.after") {
            // The step itself cannot be undone, on either side; then one that cannot be undone when a later one fails.
            let last = if *operation == Operation::Create { "effect.cow_disk" } else { "effect.shim" };
            for failpoints in [
                format!("{effect}.apply.after=return(ENOSPC);{effect}.undo.before=return(EBUSY)"),
                format!("{effect}.apply.after=return(EBUSY);{effect}.undo.after=return(EPERM)"),
                format!("{last}.apply.after=return(ENOSPC);{effect}.undo.before=return(EPERM)"),
            ] {
                add(What::FailingRollback { failpoints });
            }
        }
    }
    cases
}

fn run_all(cases: &[Case]) -> Vec<(Case, Wrong)> {
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let work = || {
        let mut host = None;
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let host_now = host.get_or_insert_with(world);
            let result = catch_unwind(AssertUnwindSafe(|| run(host_now, case))).unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                Err(Wrong::Stuck(text.unwrap_or_default()))
            });
            if let Err(wrong) = result {
                let log = host_now.world().context()();
                crate::say(&format!("{case}: {wrong}{log}"));
                failures.lock().unwrap_or_else(PoisonError::into_inner).push((case.clone(), wrong));
                // The next case shall not suffer for this one.
                host = None;
            }
        }
    };
    std::thread::scope(|scope| (0..WORKERS).for_each(|_| drop(scope.spawn(work))));
    failures.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn run(host: &mut FakeWorld, case: &Case) -> Result<(), Wrong> {
    let operation = case.operation;
    prepare(host, operation)?;
    match &case.what {
        What::Kill { point, time } => {
            let failpoints = format!("{point}={}*off->return(kill)", time - 1);
            // `0*off` would be a mistake to crate `fail`.
            let failpoints = failpoints.replace("0*off->", "");
            let (status, answer) = act(host, operation, &failpoints)?;
            // What is refilled beside an operation comes by at another time, or not.
            if *time == 1 && !was_killed(status) {
                return Err(Wrong::Other(format!("not killed there: {answer:?}, {status}")));
            }
            verify(host, operation, &answer)
        }
        What::Errors { point } => {
            let mut last = Answer::None;
            for error in ERRORS {
                let done = matches!(last, Answer::Done);
                last = failing(host, operation, &format!("{point}=return({error})"))?;
                // Done once, it is refused the second time, as it should be.
                if done {
                    last = Answer::Done;
                }
            }
            verify(host, operation, &last)
        }
        What::FailingRollback { failpoints } => {
            let answer = failing(host, operation, failpoints)?;
            verify(host, operation, &answer)
        }
    }
}

/// The operation with steps that fail; neither the daemon nor the client's trust in it does.
fn failing(host: &mut FakeWorld, operation: Operation, failpoints: &str) -> Result<Answer, Wrong> {
    let (status, answer) = act(host, operation, failpoints)?;
    if was_killed(status) {
        return Err(Wrong::Other(format!("the daemon died of {failpoints}")));
    }
    match answer {
        Answer::None => Err(Wrong::Other(format!("no answer with {failpoints}: {status}"))),
        Answer::Refused(ErrorKind::Internal, message) => {
            Err(Wrong::Other(format!("with {failpoints}, an internal error: {message}")))
        }
        answer => Ok(answer),
    }
}

/// What there has to be before the operation. The daemon that made it is gone afterwards.
fn prepare(host: &mut FakeWorld, operation: Operation) -> Result<(), Wrong> {
    let Some(start) = (match operation {
        Operation::Create => None,
        Operation::Start => Some(false),
        Operation::Stop | Operation::Delete | Operation::Recover => Some(true),
    }) else {
        return Ok(());
    };
    host.start("");
    let created = host.ask(async |api| api.create(VM, start).await);
    created.map_err(|error| Wrong::Other(format!("preparing: {error}")))?;
    host.kill();
    if operation == Operation::Recover {
        for vmm in host.vmms() {
            host.world().kill(vmm.outside);
        }
    }
    Ok(())
}

/// Does the operation with a daemon that has these failpoints, then ends that daemon if it has not died.
fn act(host: &mut FakeWorld, operation: Operation, failpoints: &str) -> Result<(ExitStatus, Answer), Wrong> {
    if let Started::Ended(status) = host.try_start(failpoints) {
        return if was_killed(status) {
            Ok((status, Answer::None))
        } else {
            Err(Wrong::Stuck(format!("with {failpoints} the daemon does not come up: {status}")))
        };
    }
    let result = host.ask(async |api| match operation {
        Operation::Create => api.create(VM, false).await.map(drop),
        Operation::Start => api.start(VM).await.map(drop),
        Operation::Stop => api.stop(VM).await.map(drop),
        Operation::Delete => api.delete(VM).await.map(drop),
        Operation::Recover => api.list().await.map(drop),
    });
    match result {
        Ok(()) => Ok((host.terminate(), Answer::Done)),
        Err(Failure::Refused(problem)) => {
            Ok((host.terminate(), Answer::Refused(problem.kind, problem.message)))
        }
        Err(Failure::Lost(_)) => Ok((host.wait(), Answer::None)),
        Err(Failure::Hangs(what)) => Err(Wrong::Stuck(format!("no answer to {what}"))),
    }
}

/// What a daemon without failpoints has to make of it.
fn verify(host: &mut FakeWorld, operation: Operation, answer: &Answer) -> Result<(), Wrong> {
    if let Started::Ended(status) = host.try_start("") {
        return Err(Wrong::Stuck(format!("the next daemon does not come up: {status}")));
    }
    let vm = settled(host)?;
    holds(operation, answer, vm.as_ref())?;
    let must = |what: &str, result: Result<serde_json::Value, Failure>| match result {
        Ok(_) => Ok(()),
        Err(error) => Err(Wrong::Stuck(format!("it was {:?}, but {what}: {error}", vm.as_ref()))),
    };
    if let Some(vm) = &vm {
        if vm.pid().is_some() {
            must("cannot be stopped", host.ask(async |api| api.stop(VM).await))?;
        } else if operation != Operation::Delete {
            must("cannot be started", host.ask(async |api| api.start(VM).await))?;
        }
        must("cannot be deleted", host.ask(async |api| api.delete(VM).await))?;
    }
    if let Some(vm) = settled(host)? {
        return Err(Wrong::Stuck(format!("deleted, but still there: {vm:?}")));
    }
    let status = host.terminate();
    if !status.success() {
        return Err(Wrong::Other(format!("the daemon ends with {status}")));
    }
    let leaks = host.leaks();
    if leaks.is_empty() { Ok(()) } else { Err(Wrong::Leak(leaks)) }
}

/// The VM once nobody works on it.
fn settled(host: &FakeWorld) -> Result<Option<Seen>, Wrong> {
    let deadline = Instant::now() + SHORT;
    loop {
        let listed = host.ask(async |api| api.list().await);
        let mut listed = listed.map_err(|error| Wrong::Stuck(format!("`vm ls` does not answer: {error}")))?;
        match listed.pop() {
            Some(vm) if !vm.settled() => {
                if Instant::now() > deadline {
                    return Err(Wrong::Stuck(format!("{vm:?} for {SHORT:?}")));
                }
                std::thread::park_timeout(vm_tests::command::LOOK);
            }
            vm => return Ok(vm),
        }
    }
}

/// Whether what was acknowledged is so, and what was refused is not.
fn holds(operation: Operation, answer: &Answer, vm: Option<&Seen>) -> Result<(), Wrong> {
    use Operation::{Create, Delete, Recover, Start, Stop};
    let lost = |what: &str| Err(Wrong::Lost(format!("{what}, but it is {vm:?}")));
    match (operation, answer, vm) {
        (Create, Answer::Done, None) => lost("it was created"),
        (Start | Stop | Recover, _, None) => lost("nobody deleted it"),
        (Delete, Answer::Done, Some(_)) => lost("it was deleted"),
        (Create, Answer::Refused(..), Some(_)) => lost("its creation was refused"),
        (Start, Answer::Done, Some(vm)) if vm.pid().is_none() => lost("it was started"),
        (Start, Answer::Refused(..), Some(vm)) if vm.pid().is_some() => lost("its start was refused"),
        (Stop, Answer::Done, Some(vm)) if !matches!(vm.state, VmState::Stopped { .. }) => {
            lost("it was stopped")
        }
        (Recover, _, Some(vm)) if vm.pid().is_some() => lost("its VMM was killed"),
        _ => Ok(()),
    }
}
