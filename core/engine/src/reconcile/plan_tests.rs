use super::*;

const BOOT: &str = "boot";
const FORMER: &str = "former boot";
const SHIM: ProcessRef = ProcessRef { pid: 10, start_ticks: 1 };
const VMM: ProcessRef = ProcessRef { pid: 11, start_ticks: 2 };

fn id(number: u8) -> VmId {
    format!("{number:012x}").parse().unwrap()
}

fn layout() -> Layout {
    Layout { run: "/run/vmd".into(), state: "/var/lib/vmd".into(), config: "/etc/vmd".into() }
}

fn entry(effect: Effect, phase: Phase, step: Step, boot: &str) -> Entry {
    let handle = match (&effect, step) {
        (Effect::Shim { .. }, Step::Applied | Step::Undoing) => {
            Handle::Processes { shim: SHIM, vmm: VMM, answered: true }
        }
        _ => Handle::None,
    };
    Entry { effect, phase, step, handle, boot_id: boot.to_owned(), by: None }
}

fn run_directory(vm: &VmId) -> Effect {
    Effect::Directory { path: layout().vm(vm).run, mode: 0o711 }
}

fn state_directory(vm: &VmId) -> Effect {
    Effect::Directory { path: layout().vm(vm).state, mode: 0o700 }
}

fn disk(vm: &VmId) -> Effect {
    Effect::CowDisk { base: "/base".into(), path: layout().vm(vm).disk(), size_bytes: 1, delta: false }
}

fn tap(number: u32) -> Effect {
    Effect::Tap { name: format!("vt3f2a{number:04x}"), bridge: "vmbr-3f2a".into() }
}

fn shim(vm: &VmId) -> Effect {
    let run_dir = layout().vm(vm).run;
    Effect::Shim { spec: run_dir.join("shim.json"), run_dir }
}

/// What a VM that was made has.
fn made(vm: &VmId) -> Vec<Entry> {
    [state_directory(vm), disk(vm)].map(|effect| entry(effect, Phase::Create, Step::Applied, FORMER)).into()
}

/// What one that was started has besides; the last of it, the shim, at `step`.
fn started(vm: &VmId, step: Step, boot: &str) -> Vec<Entry> {
    let mut entries = made(vm);
    entries
        .extend([run_directory(vm), tap(1)].map(|effect| entry(effect, Phase::Start, Step::Applied, boot)));
    entries.push(entry(shim(vm), Phase::Start, step, boot));
    entries
}

/// The same, before the guest answered.
fn booting(vm: &VmId, step: Step) -> Vec<Entry> {
    let mut entries = started(vm, step, BOOT);
    for entry in &mut entries {
        if let Handle::Processes { answered, .. } = &mut entry.handle {
            *answered = false;
        }
    }
    entries
}

fn facts(vm: &VmId, running: bool, journal: Vec<Entry>, processes: Processes) -> VmFacts {
    VmFacts { id: vm.clone(), record: Some(Wish { complete: true, running }), journal, processes }
}

fn plan(vms: &[VmFacts], host: &HostFacts) -> Plan {
    Plan::new(&layout(), BOOT, vms, host)
}

fn decided(facts: VmFacts) -> (Verdict, Vec<Action>) {
    let vm = facts.id.clone();
    let plan = plan(&[facts], &HostFacts::default());
    (plan.verdicts[&vm], plan.actions)
}

fn undone(vm: &VmId, layers: &[Layer]) -> Vec<Action> {
    let mut actions: Vec<_> = layers.iter().map(|layer| Action::Undo(vm.clone(), *layer)).collect();
    actions.push(Action::Settle(vm.clone()));
    actions
}

const RUN: [Layer; 3] = [Layer::Vmm, Layer::Network, Layer::Files];

#[test]
fn a_vm_that_is_off_is_left_alone() {
    let vm = id(1);
    let (verdict, actions) = decided(facts(&vm, false, made(&vm), Processes::Gone));
    assert_eq!((verdict, actions), (Verdict::Rest, undone(&vm, &[])));
}

#[test]
fn a_vm_that_lives_is_adopted_and_nothing_of_it_undone() {
    let vm = id(1);
    let (verdict, actions) = decided(facts(&vm, true, started(&vm, Step::Applied, BOOT), Processes::Live));
    assert_eq!(verdict, Verdict::Adopt { shim: SHIM, vmm: VMM });
    assert_eq!(actions, [Action::Adopt(vm)]);
}

#[test]
fn a_vmm_that_died_or_whose_pid_is_anothers_has_ended() {
    let vm = id(1);
    let (verdict, actions) = decided(facts(&vm, true, started(&vm, Step::Applied, BOOT), Processes::Gone));
    assert_eq!((verdict, actions), (Verdict::Ended { shim: SHIM, vmm: VMM }, undone(&vm, &RUN)));
}

#[test]
fn after_a_reboot_of_the_host_nothing_is_up_whatever_has_its_pids() {
    let vm = id(1);
    for processes in [Processes::Live, Processes::Gone] {
        let (verdict, actions) = decided(facts(&vm, true, started(&vm, Step::Applied, FORMER), processes));
        assert_eq!((verdict, actions), (Verdict::HostRebooted, undone(&vm, &RUN)));
    }
}

#[test]
fn a_start_without_an_answer_is_undone_wherever_it_stopped() {
    let vm = id(1);
    for (step, processes) in
        [(Step::Intent, Processes::Gone), (Step::Applied, Processes::Live), (Step::Applied, Processes::Gone)]
    {
        // Whether somebody started it, or a policy that wants it up.
        for wanted in [false, true] {
            let (verdict, actions) = decided(facts(&vm, wanted, booting(&vm, step), processes));
            assert_eq!((verdict, actions), (Verdict::HalfStarted, undone(&vm, &RUN)), "{step:?}");
        }
    }
    // Before there was a shim.
    let mut journal = made(&vm);
    journal.push(entry(run_directory(&vm), Phase::Start, Step::Intent, BOOT));
    let (verdict, actions) = decided(facts(&vm, false, journal, Processes::Gone));
    assert_eq!((verdict, actions), (Verdict::HalfStarted, undone(&vm, &[Layer::Files])));
}

#[test]
fn a_stop_that_had_begun_is_finished() {
    let vm = id(1);
    for running in [true, false] {
        for boot in [BOOT, FORMER] {
            let (verdict, actions) =
                decided(facts(&vm, running, started(&vm, Step::Undoing, boot), Processes::Live));
            assert_eq!((verdict, actions), (Verdict::HalfStopped, undone(&vm, &RUN)));
        }
        // The shim is gone already.
        let mut journal = made(&vm);
        journal.push(entry(run_directory(&vm), Phase::Start, Step::Applied, BOOT));
        journal.push(entry(tap(1), Phase::Start, Step::Undoing, BOOT));
        let (verdict, actions) = decided(facts(&vm, running, journal, Processes::Gone));
        assert_eq!((verdict, actions), (Verdict::HalfStopped, undone(&vm, &[Layer::Network, Layer::Files])));
    }
}

#[test]
fn a_stop_that_was_asked_for_is_gone_on_with_while_the_guest_still_runs() {
    let vm = id(1);
    let (verdict, actions) = decided(facts(&vm, false, started(&vm, Step::Applied, BOOT), Processes::Live));
    assert_eq!(verdict, Verdict::GoOnStopping { shim: SHIM, vmm: VMM });
    assert_eq!(actions, [Action::Adopt(vm.clone())]);
    // It has gone down meanwhile, by itself or with its host.
    for (boot, processes) in [(BOOT, Processes::Gone), (FORMER, Processes::Live)] {
        let (verdict, actions) = decided(facts(&vm, false, started(&vm, Step::Applied, boot), processes));
        assert_eq!((verdict, actions), (Verdict::HalfStopped, undone(&vm, &RUN)));
    }
}

#[test]
fn a_vm_that_was_cleaned_up_after_and_not_yet_started_again_is_due() {
    let vm = id(1);
    let (verdict, actions) = decided(facts(&vm, true, made(&vm), Processes::Gone));
    assert_eq!((verdict, actions), (Verdict::Due, undone(&vm, &[])));
    let mut journal = made(&vm);
    journal.push(entry(run_directory(&vm), Phase::Start, Step::Applied, BOOT));
    let (verdict, actions) = decided(facts(&vm, true, journal, Processes::Gone));
    assert_eq!((verdict, actions), (Verdict::Due, undone(&vm, &[Layer::Files])));
}

#[test]
fn what_is_half_made_or_half_deleted_goes_with_all_it_has() {
    let vm = id(1);
    let journal = started(&vm, Step::Applied, BOOT);
    let half = VmFacts {
        id: vm.clone(),
        record: Some(Wish { complete: false, running: true }),
        journal: journal.clone(),
        processes: Processes::Live,
    };
    let all = [Layer::Vmm, Layer::Block, Layer::Network, Layer::Files];
    let (verdict, actions) = decided(half.clone());
    assert_eq!((verdict, actions), (Verdict::Remove, undone(&vm, &all)));
    // A record is written before the first effect.
    let (verdict, actions) = decided(VmFacts { journal: Vec::new(), ..half.clone() });
    assert_eq!((verdict, actions), (Verdict::Remove, undone(&vm, &[])));
    let (verdict, actions) = decided(VmFacts { record: None, ..half });
    assert_eq!((verdict, actions), (Verdict::Discard, undone(&vm, &all)));
}

#[test]
fn layers_are_taken_one_after_the_other_over_all_vms() {
    let vms: Vec<_> = (1..=3)
        .map(|number| facts(&id(number), true, started(&id(number), Step::Applied, BOOT), Processes::Gone))
        .chain([facts(&id(9), true, started(&id(9), Step::Applied, BOOT), Processes::Live)])
        .collect();
    let plan = plan(&vms, &HostFacts::default());
    assert_eq!(plan.actions[0], Action::Adopt(id(9)));
    let layers: Vec<_> = plan
        .actions
        .iter()
        .filter_map(|action| match action {
            Action::Undo(_, layer) => Some(*layer),
            _ => None,
        })
        .collect();
    assert_eq!(layers.len(), 9);
    assert!(layers.is_sorted(), "{layers:?}");
    assert!(plan.actions[plan.actions.len() - 3..].iter().all(|action| matches!(action, Action::Settle(_))));
}

fn bridge() -> Effect {
    Effect::Bridge { name: "vmbr-3f2a".into(), address: "10.9.0.1/24".parse().unwrap() }
}

#[test]
fn a_network_that_is_half_made_or_of_a_former_boot_goes_unless_a_vm_stands_on_it() {
    let vm = id(1);
    for (step, boot, goes) in [
        (Step::Applied, BOOT, false),
        (Step::Intent, BOOT, true),
        (Step::Undoing, BOOT, true),
        (Step::Applied, FORMER, true),
    ] {
        let host =
            HostFacts { journal: vec![entry(bridge(), Phase::Host, step, boot)], ..Default::default() };
        assert_eq!(plan(&[], &host).actions.contains(&Action::UndoHost), goes, "{step:?} {boot}");
        let live = facts(&vm, true, started(&vm, Step::Applied, BOOT), Processes::Live);
        assert!(!plan(&[live], &host).actions.contains(&Action::UndoHost));
    }
}

#[test]
fn a_tap_on_its_way_from_the_pool_is_the_vms() {
    let vm = id(1);
    let live = facts(&vm, true, started(&vm, Step::Applied, BOOT), Processes::Live);
    let pool = [1, 2].map(|number| entry(tap(number), Phase::Host, Step::Applied, BOOT));
    let host = HostFacts { journal: pool.into(), ..Default::default() };
    assert_eq!(plan(&[live], &host).actions, [Action::Forget(tap(1)), Action::Adopt(vm)]);
}

#[test]
fn a_tap_of_the_pool_that_is_half_done_goes_also_under_a_vm_that_is_up() {
    let vm = id(1);
    let live = facts(&vm, true, started(&vm, Step::Applied, BOOT), Processes::Live);
    let pool = [(2, Step::Applied), (3, Step::Intent), (4, Step::Undoing)];
    let journal = pool.map(|(number, step)| entry(tap(number), Phase::Host, step, BOOT));
    let host = HostFacts { journal: journal.into(), ..Default::default() };
    let expected = [Action::Adopt(vm), Action::Reclaim(tap(3)), Action::Reclaim(tap(4))];
    assert_eq!(plan(&[live], &host).actions, expected);
}

fn device(vm: &VmId) -> Effect {
    let paths = layout().vm(vm);
    let (delta, node) = (paths.disk_delta(), paths.disk_node());
    Effect::DmSnapshot { name: format!("vmd-3f2a-{vm}"), base: "/base".into(), delta, node, size_bytes: 1 }
}

fn cgroup(vm: &VmId, memory: &str) -> Effect {
    let name = format!("vmd-3f2a-{vm}");
    let settings = vec![("memory.max".to_owned(), memory.to_owned())];
    Effect::Cgroup {
        groups: vec![vm_types::Cgroup { path: format!("/sys/fs/cgroup/{name}").into(), settings }],
        name,
    }
}

fn reclaimed(vms: &[VmFacts], found: Found) -> Vec<Effect> {
    let host = HostFacts { found, ..Default::default() };
    let actions = plan(vms, &host).actions.into_iter();
    actions
        .filter_map(|action| match action {
            Action::Reclaim(effect) => Some(effect),
            _ => None,
        })
        .collect()
}

#[test]
fn what_no_journal_has_is_reclaimed_and_what_one_has_is_not() {
    let (live, off, gone) = (id(1), id(2), id(3));
    let mut journal = started(&live, Step::Applied, BOOT);
    journal.push(entry(cgroup(&live, "1000"), Phase::Start, Step::Applied, BOOT));
    let vms = [facts(&live, true, journal, Processes::Live), facts(&off, false, made(&off), Processes::Gone)];
    let found = Found {
        cgroups: [&live, &gone].map(|vm| cgroup(vm, "max")).into(),
        network: vec![bridge(), tap(1), tap(7)],
        disks: [&live, &off, &gone].map(|vm| (vm.clone(), device(vm))).into(),
        shims: [&live, &gone].map(|vm| layout().vm(vm).run).into(),
        run_directories: vec![live.clone(), off.clone(), gone.clone()],
        state_directories: vec![live, off.clone(), gone.clone()],
    };
    // The bridge stays, unknown as it is: a VM that is up stands on it.
    let expected = [
        shim(&gone),
        cgroup(&gone, "max"),
        device(&off),
        device(&gone),
        tap(7),
        run_directory(&off),
        run_directory(&gone),
        state_directory(&gone),
    ];
    assert_eq!(reclaimed(&vms, found.clone()), expected);
    // With nobody up, it goes too, after its ports.
    let taps_then_bridge = [tap(1), tap(7), bridge()];
    let found = Found { network: found.network, ..Default::default() };
    assert_eq!(reclaimed(&vms[1..], found), taps_then_bridge);
}

#[test]
fn another_daemons_shims_are_not_looked_at() {
    let shims = ["/run/other/vms/000000000001", "/run/vmd/vms", "/run/vmd/vms/a/b"].map(Into::into);
    assert!(reclaimed(&[], Found { shims: shims.into(), ..Default::default() }).is_empty());
}

#[test]
fn every_start_phase_entry_is_in_some_layer_that_is_undone() {
    // Whatever a verdict undoes, no entry of those phases is left out.
    let vm = id(1);
    let journal = started(&vm, Step::Applied, BOOT);
    let half = VmFacts { id: vm, record: None, journal: journal.clone(), processes: Processes::Gone };
    let (verdict, actions) = decided(half);
    for entry in journal {
        assert!(verdict.undone().contains(&entry.phase));
        let layer = entry.effect.layer();
        assert!(
            actions.iter().any(|action| matches!(action, Action::Undo(_, l) if *l == layer)),
            "{layer:?}"
        );
    }
}
