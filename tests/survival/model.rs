//! Many clients at once against a model.
//!
//! A step is a batch: for each of some VMs either a sequence of requests, each of which has to be answered exactly as the model
//! says whatever happens to the other VMs meanwhile, or a race of requests for one VM, after which it has to be in some state
//! that it may be in and go away when told to. All of a batch is under way at once.

use std::{collections::BTreeMap, time::Instant};

use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest};
use serde_json::{Value, json};
use vm_api::ErrorKind;
use vm_tests::{
    FakeWorld,
    fixtures::TINY,
    rpc::{Api, Failure, Seen},
    world::SHORT,
};
use vm_types::vm::VmState;

/// VMs there may be.
const VMS: usize = 6;
/// Worlds, each from nothing.
const CASES: u32 = 6;
/// Batches of a world.
const BATCHES: usize = 16;

/// What a VM is when nobody works on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Model {
    #[default]
    Absent,
    Stopped,
    Running,
    Paused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Create,
    CreateAndStart,
    Start,
    Stop,
    Kill,
    Restart,
    Pause,
    Resume,
    Delete,
    DeleteByForce,
}

#[derive(Debug, Clone)]
enum Act {
    /// One after the other, by one client.
    Sequence(Vec<Request>),
    /// All at once, by a client each; then it is deleted.
    Race(Vec<Request>),
}

type Batch = BTreeMap<usize, Act>;
type Models = [Model; VMS];

impl Request {
    fn method(self) -> &'static str {
        match self {
            Self::Create | Self::CreateAndStart => "vm.create",
            Self::Start => "vm.start",
            Self::Stop => "vm.stop",
            Self::Kill => "vm.kill",
            Self::Restart => "vm.restart",
            Self::Pause => "vm.pause",
            Self::Resume => "vm.resume",
            Self::Delete | Self::DeleteByForce => "vm.delete",
        }
    }

    fn params(self, name: &str) -> Vec<Value> {
        match self {
            Self::Create => vec![json!({"name": name, "image": TINY})],
            Self::CreateAndStart => vec![json!({"name": name, "image": TINY, "start": true})],
            Self::Start | Self::Kill | Self::Pause | Self::Resume => vec![json!(name)],
            Self::Stop | Self::Restart => vec![json!(name), json!({})],
            Self::Delete => vec![json!(name), json!(false)],
            Self::DeleteByForce => vec![json!(name), json!(true)],
        }
    }

    async fn send(self, api: &Api, name: &str) -> Result<(), Failure> {
        api.run(self.method(), &self.params(name)).await.map(drop)
    }
}

impl Model {
    /// The answer to a request, and what the VM is then.
    fn after(self, request: Request) -> Result<Self, ErrorKind> {
        use Model::{Absent, Paused, Running, Stopped};
        match (request, self) {
            (Request::Create, Absent) => Ok(Stopped),
            (Request::CreateAndStart, Absent) => Ok(Running),
            (Request::Create | Request::CreateAndStart, _) => Err(ErrorKind::AlreadyExists),
            (_, Absent) => Err(ErrorKind::NotFound),
            (Request::Start, Stopped) => Ok(Running),
            (Request::Start, Running | Paused) => Err(ErrorKind::WrongState),
            (Request::Stop | Request::Kill, _) => Ok(Stopped),
            (Request::Restart, _) => Ok(Running),
            (Request::Pause, Running | Paused) => Ok(Paused),
            (Request::Resume, Running | Paused) => Ok(Running),
            (Request::Pause | Request::Resume, Stopped) => Err(ErrorKind::WrongState),
            (Request::Delete, Stopped) | (Request::DeleteByForce, _) => Ok(Absent),
            (Request::Delete, Running | Paused) => Err(ErrorKind::WrongState),
        }
    }

    fn is(self, vm: Option<&Seen>) -> bool {
        match (self, vm.map(|vm| &vm.state)) {
            (Self::Absent, None)
            | (Self::Stopped, Some(VmState::Stopped { .. }))
            | (Self::Running, Some(VmState::Running { .. }))
            | (Self::Paused, Some(VmState::Paused { .. })) => true,
            (Self::Absent | Self::Stopped | Self::Running | Self::Paused, _) => false,
        }
    }
}

impl Act {
    fn after(&self, model: Model) -> Model {
        match self {
            Self::Sequence(requests) => {
                requests.iter().fold(model, |model, request| model.after(*request).unwrap_or(model))
            }
            Self::Race(_) => Model::Absent,
        }
    }
}

fn request() -> impl Strategy<Value = Request> {
    use Request::*;
    prop_oneof![
        2 => Just(Create),
        4 => Just(CreateAndStart),
        4 => Just(Start),
        3 => Just(Stop),
        2 => Just(Kill),
        2 => Just(Restart),
        2 => Just(Pause),
        2 => Just(Resume),
        1 => Just(Delete),
        2 => Just(DeleteByForce),
    ]
}

/// The model on its own.
struct Reference;

impl ReferenceStateMachine for Reference {
    type State = Models;
    type Transition = Batch;

    fn init_state() -> BoxedStrategy<Models> {
        Just([Model::Absent; VMS]).boxed()
    }

    fn transitions(_: &Models) -> BoxedStrategy<Batch> {
        let act = prop_oneof![
            2 => prop::collection::vec(request(), 1..5).prop_map(Act::Sequence),
            1 => prop::collection::vec(request(), 2..5).prop_map(Act::Race),
            // The same by all: exactly one is right.
            1 => (request(), 2..5_usize).prop_map(|(request, times)| Act::Race(vec![request; times])),
        ];
        prop::collection::btree_map(0..VMS, act, 2..=VMS).boxed()
    }

    fn apply(mut state: Models, batch: &Batch) -> Models {
        for (vm, act) in batch {
            state[*vm] = act.after(state[*vm]);
        }
        state
    }
}

/// The daemon, and what is true of it before the next batch.
struct Daemon {
    host: FakeWorld,
    models: Models,
    requests: usize,
}

struct Test;

impl StateMachineTest for Test {
    type SystemUnderTest = Daemon;
    type Reference = Reference;

    fn init_test(models: &Models) -> Daemon {
        let mut host = FakeWorld::new("");
        host.start("");
        Daemon { host, models: *models, requests: 0 }
    }

    fn apply(mut daemon: Daemon, after: &Models, batch: Batch) -> Daemon {
        let mut working = Vec::new();
        for (vm, act) in &batch {
            let (name, model, act) = (name(*vm), daemon.models[*vm], act.clone());
            let (Act::Sequence(requests) | Act::Race(requests)) = &act;
            daemon.requests += requests.len();
            let apis: Vec<_> = match &act {
                Act::Sequence(_) => vec![daemon.host.connect()],
                Act::Race(requests) => requests.iter().map(|_| daemon.host.connect()).collect(),
            };
            working.push(daemon.host.spawn(async move {
                match &act {
                    Act::Sequence(requests) => sequence(&apis[0], &name, model, requests).await,
                    Act::Race(requests) => race(&apis, &name, model, requests).await,
                }
            }));
        }
        for working in working {
            let result = daemon.host.block_on(working).expect("a client does not panic");
            result.unwrap_or_else(|wrong| {
                panic!("{wrong}\nin {batch:?}\nfrom {:?}{}", daemon.models, daemon.host.world().context()())
            });
        }
        daemon.models = *after;
        daemon
    }

    fn check_invariants(daemon: &Daemon, models: &Models) {
        let vms = daemon.host.ask(async |api| api.list().await).expect("the daemon answers");
        let context = || daemon.host.world().context()();
        for (number, model) in models.iter().enumerate() {
            let vm = vms.iter().find(|vm| vm.name == name(number));
            assert!(model.is(vm), "{} should be {model:?}, but is {vm:?}{}", name(number), context());
        }
        let vmms = daemon.host.vmms();
        for vm in &vms {
            if let Some(pid) = vm.pid() {
                let found = vmms.iter().find(|process| process.inside == pid);
                let right = found.is_some_and(|process| process.arguments.contains(vm.id.as_str()));
                assert!(right, "{vm:?} has not its VMM among {vmms:?}{}", context());
            }
        }
        let up = vms.iter().filter(|vm| vm.pid().is_some()).count();
        assert_eq!(vmms.len(), up, "{vms:?} {vmms:?}{}", context());
    }

    fn teardown(mut daemon: Daemon, _: Models) {
        for vm in daemon.host.ask(async |api| api.list().await).expect("the daemon answers") {
            daemon.host.ask(async |api| api.delete(&vm.name).await).expect("it can be deleted");
        }
        assert!(daemon.host.terminate().success());
        daemon.host.leaves_nothing();
        crate::say(&format!("model: {} requests", daemon.requests));
    }
}

fn name(vm: usize) -> String {
    format!("m{vm}")
}

async fn sequence(api: &Api, name: &str, mut model: Model, requests: &[Request]) -> Result<(), String> {
    for request in requests {
        let expected = model.after(*request);
        let answer = request.send(api, name).await;
        match (&expected, &answer) {
            (Ok(next), Ok(())) => model = *next,
            (Err(kind), Err(failure)) if failure.kind() == Some(*kind) => {}
            _ => {
                let answer = answer.map_err(|failure| failure.to_string());
                return Err(format!(
                    "{name}, {model:?}: {request:?} of {requests:?} brings {answer:?}, not {expected:?}"
                ));
            }
        }
    }
    Ok(())
}

async fn race(apis: &[Api], name: &str, model: Model, requests: &[Request]) -> Result<(), String> {
    let begun = Instant::now();
    let sending = requests.iter().zip(apis).map(|(request, api)| request.send(api, name));
    let answers = futures::future::join_all(sending).await;
    let tell = |what: &str| {
        let pairs: Vec<_> = requests
            .iter()
            .zip(&answers)
            .map(|(request, answer)| match answer {
                Ok(()) => format!("{request:?}: done"),
                Err(failure) => format!("{request:?}: {failure}"),
            })
            .collect();
        format!("{name}, {model:?}, after {:?}: {what}: {pairs:#?}", begun.elapsed())
    };
    for (request, answer) in requests.iter().zip(&answers) {
        let Err(failure) = answer else { continue };
        match failure.kind() {
            Some(
                ErrorKind::WrongState
                | ErrorKind::NotFound
                | ErrorKind::AlreadyExists
                | ErrorKind::InUse
                | ErrorKind::Cancelled,
            ) => {}
            // Somebody else's kill took its VMM away while it spoke with that.
            Some(ErrorKind::HostFailure | ErrorKind::VmmDied)
                if matches!(request, Request::Pause | Request::Resume) => {}
            _ => return Err(tell("an answer that helps nobody")),
        }
    }
    let done = answers.iter().filter(|answer| answer.is_ok()).count();
    let first = requests[0];
    if requests.iter().all(|request| *request == first) {
        let right = match (first, model.after(first)) {
            (_, Err(_)) => done == 0,
            (Request::Create | Request::CreateAndStart | Request::Start, Ok(_)) => done == 1,
            // One makes it so; whoever comes later finds it so.
            (_, Ok(_)) => done >= 1,
        };
        if !right {
            return Err(tell("not one winner"));
        }
    }
    settle(&apis[0], name).await.map_err(|wrong| tell(&wrong))?;
    match apis[0].delete(name).await {
        Ok(_) => Ok(()),
        Err(failure) if failure.kind() == Some(ErrorKind::NotFound) => Ok(()),
        Err(failure) => Err(tell(&format!("then it cannot be deleted: {failure}"))),
    }
}

/// Waits until nobody works on the VM.
async fn settle(api: &Api, name: &str) -> Result<(), String> {
    let deadline = Instant::now() + SHORT;
    loop {
        let vms = api.list().await.map_err(|failure| failure.to_string())?;
        match vms.iter().find(|vm| vm.name == name) {
            Some(vm) if !vm.settled() && Instant::now() > deadline => return Err(format!("stuck: {vm:?}")),
            Some(vm) if !vm.settled() => tokio::task::yield_now().await,
            _ => return Ok(()),
        }
    }
}

#[test]
fn many_clients_agree_with_the_model() {
    let seed = crate::seeded("model").u128(..).to_le_bytes().repeat(2);
    let config =
        Config { cases: CASES, max_shrink_iters: 40, failure_persistence: None, ..Config::default() };
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(config.clone(), random);
    let strategy = Reference::sequential_strategy(BATCHES..BATCHES + 1);
    let result = runner.run(&strategy, |(models, batches, seen)| {
        Test::test_sequential(config.clone(), models, batches, seen);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}
