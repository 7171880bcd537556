use std::{
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use vm_types::{
    Effect,
    operation::OperationKind,
    plan::{HostEffect, Lifetime, MachinePart},
    vm::VmmKind,
};

use super::*;
use crate::{
    ports::{Hooks, Tool},
    testing::Bench,
    vm::{
        cell::{Activity, Reserved},
        planned::Extras,
    },
};

const ALL: [Hook; 6] = [
    Hook::Preflight,
    Hook::ContributeGuest,
    Hook::ContributeMachine,
    Hook::PrepareHost,
    Hook::PostStart,
    Hook::Cleanup,
];

/// A plugin with all hooks that plans what it is told to.
#[derive(Debug, Default)]
struct Fake {
    name: &'static str,
    plan: Mutex<Plan>,
    fails_in: Mutex<Option<Hook>>,
    calls: Mutex<Vec<(Hook, HookInput)>>,
}

impl Fake {
    fn new(name: &'static str, host: Vec<HostEffect>, machine: Vec<MachinePart>) -> Arc<Self> {
        let plan = Mutex::new(Plan { machine, host, ..Plan::default() });
        Arc::new(Self { name, plan, ..Self::default() })
    }

    fn plans(&self, host: Vec<HostEffect>, machine: Vec<MachinePart>) {
        *self.plan.lock().unwrap() = Plan { machine, host, ..Plan::default() };
    }

    fn fail_in(&self, hook: Option<Hook>) {
        *self.fails_in.lock().unwrap() = hook;
    }

    fn called(&self) -> Vec<Hook> {
        self.calls.lock().unwrap().iter().map(|(hook, _)| *hook).collect()
    }

    /// What it was told in a hook, the last time.
    fn told(&self, hook: Hook) -> HookInput {
        self.calls.lock().unwrap().iter().rfind(|call| call.0 == hook).expect("it was called").1.clone()
    }
}

#[async_trait]
impl Plugin for Fake {
    fn name(&self) -> &str {
        self.name
    }

    fn required(&self) -> bool {
        false
    }

    fn has(&self, hook: Hook) -> bool {
        ALL.contains(&hook)
    }

    fn tool(&self, _: &str, _: &[String]) -> Option<Tool> {
        None
    }

    async fn blob(&self, _: &str) -> Result<Vec<u8>, HookFailure> {
        Ok(Vec::new())
    }

    async fn call(&self, hook: Hook, input: HookInput) -> Result<HookOutcome, HookFailure> {
        self.calls.lock().unwrap().push((hook, input));
        if *self.fails_in.lock().unwrap() == Some(hook) {
            return Err(HookFailure { message: format!("{} fails", self.name), hint: None });
        }
        let all = self.plan.lock().unwrap().clone();
        let plan = match hook {
            Hook::ContributeMachine => Plan { machine: all.machine, ..Plan::default() },
            Hook::PrepareHost => Plan { host: all.host, ..Plan::default() },
            _ => Plan::default(),
        };
        Ok(HookOutcome { plan, ..HookOutcome::default() })
    }
}

/// Each time it is asked which plugins there are, there is one more, up to all.
#[derive(Debug, Default)]
struct Growing {
    plugins: Vec<Arc<Fake>>,
    asked: AtomicUsize,
    all_at_once: bool,
}

impl Growing {
    fn new(plugins: &[&Arc<Fake>], all_at_once: bool) -> Arc<Self> {
        let plugins = plugins.iter().map(|plugin| (*plugin).clone()).collect();
        Arc::new(Self { plugins, asked: AtomicUsize::new(0), all_at_once })
    }
}

#[async_trait]
impl Hooks for Growing {
    fn enabled(&self) -> Vec<Arc<dyn Plugin>> {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        let there = if self.all_at_once { self.plugins.len() } else { asked + 1 };
        self.plugins.iter().take(there).map(|plugin| plugin.clone() as Arc<dyn Plugin>).collect()
    }

    async fn forget(&self, _: &VmId) {}
}

fn disk(name: &str, lifetime: Lifetime) -> HostEffect {
    HostEffect::Disk { name: RefName(name.into()), size_bytes: 1 << 20, filesystem: None, lifetime }
}

fn file(path: &str) -> HostEffect {
    HostEffect::File { path: path.into(), content: b"x".to_vec(), mode: 0o600, lifetime: Lifetime::Run }
}

fn record(name: &str) -> HostEffect {
    HostEffect::DnsRecord { name: name.into(), record_type: 1, ttl_seconds: 5, data: "192.0.2.7".into() }
}

fn drive(source: &str) -> MachinePart {
    MachinePart::Drive { serial: "a".into(), source: RefName(source.into()), read_only: false }
}

fn nic() -> MachinePart {
    MachinePart::Nic { name: RefName("nic".into()) }
}

/// A bench whose VM has an address.
async fn bench(hooks: &Arc<Growing>) -> (Bench, Arc<Cell>) {
    let bench = Bench::new(hooks.clone(), 0).await;
    let cell = bench.cell(1);
    let network = in_root(async |ctx| bench.engine.ensure_network(ctx).await.unwrap()).await;
    let address = network.subnet.hosts().nth(9);
    in_root(async |ctx| cell.lock(ctx).await.change_record(|record| record.address = address)).await;
    (bench, cell)
}

async fn in_root<R>(work: impl AsyncFnOnce(&mut Ctx<Unlocked>) -> R) -> R {
    vm_locks::LockTable::default().root("test", async |mut ctx| work(&mut ctx).await).await
}

/// The part of a start that plans and applies.
async fn placed(engine: &Engine, cell: &Cell) -> (Asked, Extras) {
    in_root(async |ctx| {
        let mut asked = engine.ask(cell).await.unwrap().expect("there are plugins");
        engine.preflight(ctx, &mut asked).await.unwrap();
        let plans = engine.ask_for_plans(ctx, cell, &mut asked).await.unwrap();
        let extras = engine.apply_plans(ctx, cell, &mut asked, &mut None, plans).await.unwrap();
        (asked, extras)
    })
    .await
}

async fn journaled(cell: &Cell) -> Vec<String> {
    let entries = in_root(async |ctx| cell.scope.entries(ctx).await).await;
    entries.iter().map(|entry| entry.effect.id().0).collect()
}

/// This process, which does not end before the test does.
fn live() -> Live {
    let own = vm_host::process::identify(std::process::id()).unwrap();
    Live {
        shim: own,
        vmm: own,
        driver: VmmKind::Fake,
        since: 0,
        cpus: 1,
        memory_mib: 128,
        disk_limits: Default::default(),
    }
}

#[tokio::test]
async fn a_plugin_that_comes_during_a_start_has_no_part_in_it() {
    let (first, late) = (Fake::new("first", vec![file("f")], vec![]), Fake::new("late", vec![], vec![]));
    let hooks = Growing::new(&[&first, &late], false);
    let (bench, cell) = bench(&hooks).await;
    let layout = bench.engine.layout();
    let kernel = layout.kernel(&cell.record().spec.kernel);
    std::fs::create_dir_all(&kernel).unwrap();
    std::fs::write(kernel.join("modules.cpio"), "").unwrap();
    std::fs::create_dir_all(&cell.paths().state).unwrap();
    std::fs::write(cell.paths().host_key(), "key").unwrap();
    let (engine, starting) = (bench.engine.clone(), cell.clone());
    // Pretended shims run nothing, so it fails where its processes are looked at.
    let start =
        bench.engine.operations().begin(OperationKind::VmStart, "a", async move |context, mut ctx| {
            let reserved = Reserved::new(&starting, Activity::Starting, context.id);
            engine.start_reserved(&mut ctx, &reserved, &context).await
        });
    let error = start.unwrap().wait().await.unwrap_err();
    assert!(matches!(&*error, EngineError::File { action: "watch", .. }), "{error}");
    let once = [&[Hook::Preflight][..], &PLANNING, &[Hook::Cleanup]].concat();
    assert_eq!((first.called(), late.called()), (once, vec![]));
    assert_eq!(hooks.asked.load(Ordering::Relaxed), 1);
    assert_eq!(first.told(Hook::Cleanup).reason, "start-failed");
}

#[tokio::test]
async fn post_start_is_for_those_that_planned_and_tells_them_what_it_came_to() {
    let (first, late) = (Fake::new("first", vec![file("f")], vec![nic()]), Fake::new("late", vec![], vec![]));
    let failing = Fake::new("failing", vec![], vec![]);
    failing.fail_in(Some(Hook::PrepareHost));
    let hooks = Growing::new(&[&failing, &first, &late], false);
    hooks.asked.store(1, Ordering::Relaxed);
    let (bench, cell) = bench(&hooks).await;
    let (mut asked, _) = placed(&bench.engine, &cell).await;
    let engine = bench.engine.clone();
    let guest = cell.clone();
    let post = bench.engine.operations().begin(OperationKind::VmStart, "a", async move |context, mut ctx| {
        engine.post_start(&mut ctx, &guest, live(), &mut asked, &context).await
    });
    post.unwrap().wait().await.unwrap();
    assert_eq!(late.called(), []);
    assert!(!failing.called().contains(&Hook::PostStart), "it was left out");
    let told = first.told(Hook::PostStart);
    let names: Vec<_> = told.references.keys().map(|name| name.0.as_str()).collect();
    assert_eq!((names, told.reason.as_str()), (vec!["f", "nic"], "start"));
    assert!(Path::new(&told.references[&RefName("f".into())]).is_file());
}

#[tokio::test]
async fn of_an_optional_plugin_that_cannot_be_served_nothing_is_left() {
    let good = Fake::new("good", vec![file("own"), record("good.vm")], vec![nic()]);
    let bad = Fake::new("bad", vec![disk("before", Lifetime::Vm)], vec![]);
    let hooks = Growing::new(&[&good, &bad], true);
    let (bench, cell) = bench(&hooks).await;
    placed(&bench.engine, &cell).await;
    in_root(async |ctx| bench.engine.unwind_run(ctx, &cell).await.unwrap()).await;
    let layout = bench.engine.layout();
    let (run, own) = (layout.plugin_run("bad", cell.id()), layout.plugin_vm("bad", cell.id()));
    assert!(own.join("before.img").is_file());

    // All of it is begun before it turns out that there is no such disk.
    bad.plans(
        vec![
            disk("before", Lifetime::Vm),
            disk("fresh", Lifetime::Vm),
            disk("kept", Lifetime::Kept),
            disk("scratch", Lifetime::Run),
            file("f"),
            record("bad.vm"),
        ],
        vec![nic(), drive("none")],
    );
    let (_, extras) = placed(&bench.engine, &cell).await;
    assert!(!run.exists(), "its run directory");
    assert!(own.join("before.img").is_file() && !own.join("fresh.img").exists());
    assert!(layout.plugin_kept("bad").join("kept.img").is_file(), "only a person removes it");
    assert!(layout.plugin_run("good", cell.id()).join("own").is_file());
    let ids = journaled(&cell).await;
    let has = |what: &str| ids.iter().filter(|id| id.contains(what)).count();
    assert_eq!((has("tap:"), has("good.vm"), has("bad")), (1, 1, 2), "{ids:?}");
    let taps = bench.net.applied().iter().filter(|id| id.0.starts_with("tap:")).count();
    assert_eq!(taps, 1, "the interface of the other");
    let mut machine = machine();
    { extras }.extend_machine(&mut machine);
    assert_eq!((machine.nics.len(), machine.drives.len()), (1, 0));
}

fn machine() -> vm_types::machine::MachineSpec {
    serde_json::from_value(serde_json::json!({
        "vm": "0123456789ab", "cpus": 1, "memory_mib": 1, "kernel": "/k", "initramfs": "/i", "kernel_args": [],
        "drives": [], "nics": [], "vsock_cid": null,
    }))
    .unwrap()
}

#[tokio::test]
async fn a_dry_run_is_asked_as_a_start_is() {
    let plugin = Fake::new("a", vec![disk("d", Lifetime::Vm)], vec![]);
    let hooks = Growing::new(&[&plugin], true);
    let (bench, cell) = bench(&hooks).await;
    placed(&bench.engine, &cell).await;
    let planned = async || {
        let facts = bench.engine.vm_facts(&cell).await.unwrap();
        in_root(async |ctx| bench.engine.plan_start(ctx, Some(&cell), facts).await).await
    };
    let reports = planned().await;
    let hooks: Vec<_> = reports.iter().map(|report| report.hook).collect();
    assert_eq!(hooks, [&[Hook::Preflight][..], &PLANNING].concat());
    let dry: Vec<_> = hooks.iter().map(|hook| plugin.told(*hook)).collect();
    placed(&bench.engine, &cell).await;
    for (hook, dry) in hooks.iter().zip(dry) {
        let real = plugin.told(*hook);
        assert!(dry.dry_run && !real.dry_run);
        assert_eq!((dry.reason, dry.references), (real.reason, real.references), "{hook}");
    }
    // As a start would do without it, nothing of it is shown but its failure.
    plugin.fail_in(Some(Hook::ContributeMachine));
    let reports = planned().await;
    assert!(reports.last().is_some_and(|last| last.hook == Hook::ContributeMachine && last.outcome.is_err()));
}

#[tokio::test]
async fn planning_anew_fails_with_the_plugin_and_takes_nothing_away_then() {
    let plugin = Fake::new("a", vec![record("a.vm")], vec![]);
    let hooks = Growing::new(&[&plugin], true);
    let (bench, cell) = bench(&hooks).await;
    placed(&bench.engine, &cell).await;
    in_root(async |ctx| cell.lock(ctx).await.set_on(live(), false)).await;
    let replan = async || bench.engine.replan(plugin.clone(), vec![cell.clone()]).unwrap().wait().await;
    plugin.fail_in(Some(Hook::PrepareHost));
    let error = replan().await.unwrap_err();
    assert!(matches!(&*error, EngineError::Plugin(_)), "{error}");
    assert_eq!(journaled(&cell).await.len(), 1);
    plugin.fail_in(None);
    plugin.plans(vec![record("b.vm")], vec![]);
    replan().await.unwrap();
    let ids = journaled(&cell).await;
    assert!(ids.len() == 1 && ids[0].contains("b.vm"), "{ids:?}");
    assert_eq!(plugin.told(Hook::PrepareHost).reason, "configured");
    plugin.plans(vec![], vec![]);
    replan().await.unwrap();
    assert!(journaled(&cell).await.is_empty());
    in_root(async |ctx| cell.lock(ctx).await.set_off(None)).await;
}

#[tokio::test]
async fn a_kept_disk_that_could_not_be_made_is_not_said_to_be_there() {
    let plugin = Fake::new("a", vec![disk("d", Lifetime::Kept)], vec![drive("d")]);
    let hooks = Growing::new(&[&plugin], true);
    let (bench, cell) = bench(&hooks).await;
    let kept = bench.engine.layout().plugin_kept("a");
    std::fs::create_dir_all(kept.parent().unwrap()).unwrap();
    std::fs::write(&kept, "in its way").unwrap();
    let (asked, _) = placed(&bench.engine, &cell).await;
    assert!(asked.left_out.contains("a") && journaled(&cell).await.is_empty());
    std::fs::remove_file(&kept).unwrap();
    let (asked, extras) = placed(&bench.engine, &cell).await;
    assert_eq!(asked.references["a"][&RefName("d".into())], kept.join("d.img").display().to_string());
    let mut machine = machine();
    { extras }.extend_machine(&mut machine);
    assert_eq!(machine.drives[0].path, kept.join("d.img"));

    // One that is there from before is not touched by a failure, though no journal tells of it.
    in_root(async |ctx| bench.engine.unwind_run(ctx, &cell).await.unwrap()).await;
    let path = kept.join("d.img");
    std::fs::write(&path, "what somebody has on it").unwrap();
    let too_small = Effect::Disk { path: path.clone(), size_bytes: 1 << 20, filesystem: Some("none".into()) };
    let by = crate::journal::By { plugin: "a".into(), name: None, keep: true };
    let phase = crate::journal::Phase::Start;
    in_root(async |ctx| cell.scope.apply_by(ctx, too_small, phase, Some(by)).await).await.unwrap_err();
    assert_eq!(std::fs::read(&path).unwrap(), b"what somebody has on it");
    assert!(journaled(&cell).await.is_empty());
}
