//! What a daemon that comes back does with what a dead one has left, over fakes of the host.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    sync::Arc,
    time::Duration,
};

use vm_disk::{Cow, FakeCow};
use vm_engine::{
    Engine, Parts, Settings, SubnetChoice,
    effects::{FakeShims, Host, Scope, Shims},
    journal::Phase,
    ports::{NoHooks, NoImporters, NoNames},
};
use vm_host::HostRunner;
use vm_locks::LockTable;
use vm_net::{FakeNet, Net};
use vm_store::Store;
use vm_types::{
    Effect, EventKind, Handle, Layout, VmId,
    image::{ImageConfig, ImageRecord, KernelRecord},
    vm::{NetworkMode, VmRecord, VmSpec, VmState},
};
use vm_vmm::{FakeDriver, Vmms};

const IMAGE: &str = "sha256:1111111111111111111111111111111111111111111111111111111111111111";

/// May use the daemon that comes back; the former knew of none.
const GROUP: u32 = 7;

struct Bench {
    dir: tempfile::TempDir,
    net: Arc<FakeNet>,
    cow: Arc<FakeCow>,
    shims: Arc<FakeShims>,
    boot_id: String,
}

fn bench() -> Bench {
    let bench = Bench {
        dir: tempfile::tempdir().unwrap(),
        net: Arc::new(FakeNet::new()),
        cow: Arc::new(FakeCow::new()),
        shims: Arc::new(FakeShims::new()),
        boot_id: vm_host::process::boot_id().unwrap(),
    };
    let layout = bench.layout();
    for directory in [layout.journals(), layout.state.join("vms"), layout.run.join("vms")] {
        std::fs::create_dir_all(directory).unwrap();
    }
    bench
}

impl Bench {
    fn layout(&self) -> Layout {
        let root = self.dir.path();
        Layout { run: root.join("run"), state: root.join("state"), config: root.join("config") }
    }

    fn host(&self) -> Host {
        let (net, cow, shims) = (self.net.clone(), self.cow.clone(), self.shims.clone());
        Host::new(net, cow, shims, [self.dir.path().to_owned()], Arc::new(HostRunner))
    }

    async fn store(&self) -> Store {
        let store = Store::open(&self.layout().database()).unwrap();
        store.meta().set(vm_store::meta::INSTANCE_ID, "3f2a").await.unwrap();
        let image = ImageRecord {
            digest: IMAGE.parse().unwrap(),
            references: vec!["debian:bookworm".into()],
            size_bytes: 1 << 20,
            used_bytes: 1,
            created_at: 1,
            source: "test".into(),
            config: ImageConfig::default(),
            origin: None,
            registered: None,
            kernel: None,
        };
        store.images().put(image).await.unwrap();
        let kernel = KernelRecord {
            id: kernel(),
            release: "6.1".into(),
            source: "test".into(),
            created_at: 1,
            default: true,
            of_image: false,
        };
        store.kernels().put(kernel).await.unwrap();
        store
    }

    fn scope(&self, vm: &VmId, boot_id: &str) -> Scope {
        Scope::vm(&self.host(), &self.layout(), vm, None, boot_id).unwrap()
    }

    async fn engine(&self, store: Store) -> Engine {
        let settings = Settings {
            default_image: "debian:bookworm".into(),
            default_cpus: 1,
            default_memory_mib: 128,
            default_disk_bytes: 1 << 20,
            default_disk_limits: Default::default(),
            registries: Default::default(),
            start_timeout: Duration::from_secs(10),
            stop_grace: Duration::from_secs(1),
            console_log_bytes: 1 << 16,
            subnet: SubnetChoice::Auto,
            resolvers: Vec::new(),
            tap_pool: 2,
            socket_group: Some(GROUP),
            agent: "/nonexistent".into(),
            limits: Default::default(),
        };
        let vmm = Vmms::only(FakeDriver::new("/nonexistent", []));
        let runner = Arc::new(HostRunner);
        let layout = self.layout();
        let (host, hooks, names) = (self.host(), Arc::new(NoHooks), Arc::new(NoNames));
        let importers = Arc::new(NoImporters);
        let parts = Parts { layout, settings, store, host, vmm, runner, hooks, importers, names };
        Engine::start(parts).await.unwrap()
    }
}

fn kernel() -> vm_types::KernelId {
    "0123456789ab".parse().unwrap()
}

fn id(number: u32) -> VmId {
    format!("{number:012x}").parse().unwrap()
}

fn record(number: u32, complete: bool, wanted_running: bool) -> VmRecord {
    VmRecord {
        id: id(number),
        spec: VmSpec {
            name: format!("vm-{number}").parse().unwrap(),
            image_reference: "debian:bookworm".into(),
            image: IMAGE.parse().unwrap(),
            kernel: kernel(),
            cpus: 1,
            memory_mib: 128,
            disk_bytes: 1 << 20,
            disk_limits: Default::default(),
            network: NetworkMode::Nat,
            labels: Default::default(),
            owner: None,
            restart: Default::default(),
            idle_stop_seconds: None,
            expires_at: None,
            vmm: None,
        },
        address: None,
        created_at: 1,
        complete,
        wanted_running,
        failure: None,
    }
}

fn bridge() -> Effect {
    Effect::Bridge { name: "vmbr-3f2a".into(), address: "10.9.0.1/24".parse().unwrap() }
}

fn tap(number: u32) -> Effect {
    Effect::Tap { name: format!("vt3f2a{number:04x}"), bridge: "vmbr-3f2a".into() }
}

async fn apply(scope: &Scope, effect: Effect, phase: Phase) {
    let locks = LockTable::default();
    locks.root("test", async |mut ctx| scope.apply(&mut ctx, effect, phase).await.unwrap()).await;
}

async fn make(bench: &Bench, number: u32, boot_id: &str) -> Scope {
    let (scope, paths) = (bench.scope(&id(number), boot_id), bench.layout().vm(&id(number)));
    let disk =
        Effect::CowDisk { base: "/base".into(), path: paths.disk(), size_bytes: 1 << 20, delta: false };
    for effect in [Effect::Directory { path: paths.state.clone(), mode: 0o700 }, disk] {
        apply(&scope, effect, Phase::Create).await;
    }
    scope
}

async fn bring_up(bench: &Bench, number: u32, boot_id: &str) -> Scope {
    let scope = make(bench, number, boot_id).await;
    let run_dir = bench.layout().vm(&id(number)).run;
    let shim = Effect::Shim { spec: run_dir.join("shim.json"), run_dir: run_dir.clone() };
    for effect in [Effect::Directory { path: run_dir, mode: 0o711 }, tap(number), shim] {
        apply(&scope, effect, Phase::Start).await;
    }
    scope
}

/// The guest of a VM that was brought up has answered.
async fn answer(scope: &Scope) {
    let locks = LockTable::default();
    locks.root("test", async |mut ctx| scope.answered(&mut ctx).await.unwrap()).await;
}

fn exists(path: &Path) -> bool {
    path.exists()
}

#[tokio::test]
async fn each_vm_is_recovered_by_what_it_was_in_and_the_host_agrees_afterwards() {
    let bench = bench();
    let store = bench.store().await;
    let layout = bench.layout();
    bench.net.apply(&bridge()).await.unwrap();
    let boot = bench.boot_id.clone();
    // Up; died; of the host's former boot; half started; half made; without a record; off.
    for (number, complete, wanted) in [
        (1, true, true),
        (2, true, true),
        (3, true, true),
        (4, true, false),
        (5, false, false),
        (7, true, false),
    ] {
        store.vms().insert(record(number, complete, wanted)).await.unwrap();
    }
    for number in [4, 5, 6] {
        bring_up(&bench, number, &boot).await;
    }
    for number in [1, 2] {
        answer(&bring_up(&bench, number, &boot).await).await;
    }
    answer(&bring_up(&bench, 3, "former boot").await).await;
    let up = layout.vm(&id(1));
    let sockets = [up.ssh_sock(), up.console_sock()];
    for socket in &sockets {
        std::fs::write(socket, "").unwrap();
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    make(&bench, 7, &boot).await;
    for number in [2, 3] {
        bench.shims.die(&layout.vm(&id(number)).run);
    }
    // Nobody's: a tap and a directory. Somebody else's: a tap.
    bench.net.apply(&tap(99)).await.unwrap();
    std::fs::create_dir(layout.vm(&id(98)).state).unwrap();
    let others = Effect::Tap { name: "vt3f2b0001".into(), bridge: "vmbr-3f2a".into() };
    bench.net.apply(&others).await.unwrap();
    // A tap that would have been gone with its boot.
    bench.net.undo(&tap(3), &Handle::None).await.unwrap();

    // The former daemon died while it wrote.
    let half = layout.journals().join("000000000007.handles.json.tmp644-22");
    std::fs::write(&half, "{").unwrap();

    let engine = bench.engine(store).await;
    assert!(!half.exists());
    let state = |number: u32| engine.find(id(number).as_str()).map(|cell| cell.state());
    assert!(matches!(state(1), Ok(VmState::Running { .. })));
    for socket in &sockets {
        let about = std::fs::metadata(socket).unwrap();
        assert_eq!((about.mode() & 0o777, about.gid()), (0o660, GROUP), "{}", socket.display());
    }
    for number in [2, 3, 4] {
        assert!(matches!(state(number), Ok(VmState::Failed { .. })), "{number}: {:?}", state(number));
    }
    assert!(matches!(state(7), Ok(VmState::Stopped { .. })));
    assert!(state(5).is_err() && state(6).is_err());

    assert_eq!(bench.shims.running(), [layout.vm(&id(1)).run]);
    let mut applied: Vec<_> = bench.net.applied().into_iter().map(|id| id.0).collect();
    applied.sort();
    assert_eq!(applied, ["bridge:vmbr-3f2a", "tap:vt3f2a0001", "tap:vt3f2b0001"]);
    let disks: Vec<_> = [1, 2, 3, 4, 7].iter().map(|number| layout.vm(&id(*number)).disk()).collect();
    assert_eq!(bench.cow.disks(), disks);
    for (number, run, state) in
        [(1, true, true), (2, false, true), (5, false, false), (6, false, false), (98, false, false)]
    {
        let paths = layout.vm(&id(number));
        assert_eq!((exists(&paths.run), exists(&paths.state)), (run, state), "{number}");
    }
    let recovery = engine.recovery().unwrap();
    let counts = (recovery.adopted, recovery.undone, recovery.removed, recovery.reclaimed, recovery.failed);
    assert_eq!(counts, (1, 3, 2, 2, 0), "{recovery:?}");
    assert!(engine.events().list(0).iter().any(|event| event.kind == EventKind::Recovered));
    let locks = engine.locks();
    let left = locks.root("test", async |mut ctx| engine.leftovers(&mut ctx).await).await;
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_vm_that_cannot_be_recovered_is_shown_and_stops_no_other() {
    let bench = bench();
    let store = bench.store().await;
    bench.net.apply(&bridge()).await.unwrap();
    for number in [1, 2] {
        store.vms().insert(record(number, true, number == 2)).await.unwrap();
    }
    bring_up(&bench, 1, &bench.boot_id.clone()).await;
    answer(&bring_up(&bench, 2, &bench.boot_id.clone()).await).await;
    bench.net.fail_undo(true);
    let engine = bench.engine(store.clone()).await;
    let state = |engine: &Engine, number: u32| engine.find(id(number).as_str()).map(|cell| cell.state());
    assert!(matches!(state(&engine, 1), Ok(VmState::Failed { .. })));
    assert!(matches!(state(&engine, 2), Ok(VmState::Running { .. })));
    assert_eq!(engine.recovery().unwrap().failed, 1);
    // Its VMM went before its tap could not; its directory stays for the next attempt.
    assert_eq!(bench.shims.running(), [bench.layout().vm(&id(2)).run]);
    assert!(bench.layout().vm(&id(1)).run.exists());

    bench.net.fail_undo(false);
    let engine = bench.engine(store).await;
    assert_eq!(engine.recovery().unwrap().failed, 0);
    assert!(!bench.layout().vm(&id(1)).run.exists());
}

#[tokio::test]
async fn a_disk_that_is_put_together_for_nobody_is_taken_apart() {
    let bench = bench();
    let store = bench.store().await;
    let paths = bench.layout().vm(&id(8));
    let (base, delta) = (std::path::PathBuf::from("/base"), paths.disk_delta());
    let file = Effect::CowDisk { base: base.clone(), path: delta.clone(), size_bytes: 1 << 20, delta: true };
    bench.cow.apply(&file).await.unwrap();
    // Of this daemon and of another.
    for (instance, node) in [("3f2a", paths.disk_node()), ("3f2b", "/elsewhere/disk.dev".into())] {
        let name = vm_disk::dm::device_name(&instance.parse().unwrap(), &id(8));
        let (base, delta) = (base.clone(), delta.clone());
        bench.cow.apply(&Effect::DmSnapshot { name, base, delta, node, size_bytes: 1 << 20 }).await.unwrap();
    }
    bench.engine(store).await;
    assert_eq!(bench.cow.disks(), ["/elsewhere/disk.dev".into(), delta]);
}

#[tokio::test]
async fn a_journal_that_cannot_be_read_costs_no_other_vm() {
    let bench = bench();
    let store = bench.store().await;
    for number in [1, 2] {
        store.vms().insert(record(number, true, false)).await.unwrap();
        make(&bench, number, &bench.boot_id.clone()).await;
    }
    // A directory where the journal should be cannot be read by anybody, not even root.
    let journal = bench.layout().vm_journal(&id(1));
    std::fs::remove_file(&journal).unwrap();
    std::fs::create_dir(&journal).unwrap();
    let engine = bench.engine(store).await;
    for number in [1, 2] {
        assert!(engine.find(id(number).as_str()).is_ok(), "{number} is lost");
        assert!(bench.layout().vm(&id(number)).state.exists(), "the files of {number} are lost");
    }
}

/// For people: how long a start takes over many VMs that are off.
#[tokio::test]
#[ignore = "measures"]
async fn many_vms_that_are_off_cost_little() {
    let bench = bench();
    let store = bench.store().await;
    for number in 1..=1000 {
        store.vms().insert(record(number, true, false)).await.unwrap();
        make(&bench, number, &bench.boot_id.clone()).await;
    }
    let began = std::time::Instant::now();
    let engine = bench.engine(store).await;
    println!("start over {} VMs: {:?}", engine.all().len(), began.elapsed());
}
