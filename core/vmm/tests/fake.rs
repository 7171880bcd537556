//! What a fake's parent and the holder of its channel see of the behaviour it was given.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{os::unix::process::ExitStatusExt, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::timeout,
};
use vm_channel::{ChannelStream, HostChannel, Service};
use vm_types::{
    VmPaths,
    guest::control::{Phase, Reply, Request, ShutdownKind},
    machine::{Drive, MachineSpec},
    shim::GuestEnd,
};
use vm_vmm::{
    FakeBehaviour, FakeDriver, Vmm,
    contract::{PATIENCE, Running, listen},
    fake::{Boot, Crash, CrashAt, End},
};

struct Fake {
    _dir: tempfile::TempDir,
    driver: FakeDriver,
    paths: VmPaths,
    machine: MachineSpec,
}

impl Fake {
    fn new(behaviour: FakeBehaviour) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = VmPaths { run: dir.path().into(), state: dir.path().into() };
        let machine = MachineSpec {
            vm: "0123456789ab".parse().unwrap(),
            cpus: 1,
            memory_mib: 1,
            kernel: "/none".into(),
            initramfs: "/none".into(),
            kernel_args: Vec::new(),
            drives: Vec::new(),
            nics: Vec::new(),
            vsock_cid: None,
        };
        let driver = FakeDriver::new(env!("CARGO_BIN_EXE_vm-fake-vmm"), []).with_behaviour(behaviour);
        Self { _dir: dir, driver, paths, machine }
    }

    async fn launch(&self) -> Running {
        Running::launch(&self.driver.plan(&self.machine, &self.paths).await.unwrap())
    }

    /// How the guest ends, if it tells.
    async fn listen(&self) -> tokio::task::JoinHandle<Option<GuestEnd>> {
        listen(&self.driver.plan(&self.machine, &self.paths).await.unwrap()).await
    }

    async fn up(&self) -> (Running, Control) {
        let running = self.launch().await;
        self.driver.wait_up(&self.paths, PATIENCE).await.unwrap();
        let carrier = UnixStream::connect(self.paths.channel_sock()).await.unwrap();
        let channel = HostChannel::connect(carrier).await.unwrap();
        let stream = BufReader::new(channel.open(Service::Control).await.unwrap());
        (running, Control { channel, stream })
    }
}

struct Control {
    channel: HostChannel,
    stream: BufReader<ChannelStream>,
}

impl Control {
    async fn ask(&mut self, request: &Request) -> Reply {
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        self.stream.write_all(&line).await.unwrap();
        self.stream.flush().await.unwrap();
        let mut reply = String::new();
        timeout(PATIENCE, self.stream.read_line(&mut reply)).await.unwrap().unwrap();
        serde_json::from_str(&reply).unwrap()
    }
}

const WAIT: Request = Request::WaitReady { phase: Phase::Agent };
const OFF: Request = Request::Shutdown { kind: ShutdownKind::PowerOff, grace_ms: 0 };

#[tokio::test]
async fn a_flawless_guest_answers_everything_and_goes_down_when_asked() {
    let fake = Fake::new(FakeBehaviour::default());
    let (mut running, mut control) = fake.up().await;
    assert!(matches!(control.ask(&Request::Hello).await, Reply::Hello { .. }));
    assert!(matches!(control.ask(&WAIT).await, Reply::Ready { phase: Phase::Agent, .. }));
    assert_eq!(control.ask(&Request::Sync).await, Reply::Done);
    let mut ssh = control.channel.open(Service::Ssh).await.unwrap();
    assert_eq!(
        timeout(PATIENCE, ssh.read_u8()).await.unwrap().unwrap_err().kind(),
        std::io::ErrorKind::UnexpectedEof
    );
    assert_eq!(control.ask(&OFF).await, Reply::ShuttingDown);
    assert_eq!(running.ended().await.code(), Some(0));
    // Its end may be seen before the last that it said.
    running.shows("going down").await;
}

#[tokio::test]
async fn a_second_host_can_connect_after_the_first() {
    let fake = Fake::new(FakeBehaviour::default());
    let (_running, control) = fake.up().await;
    drop(control);
    let carrier = UnixStream::connect(fake.paths.channel_sock()).await.unwrap();
    timeout(PATIENCE, HostChannel::connect(carrier)).await.unwrap().unwrap();
}

#[tokio::test]
async fn crashes_come_when_and_as_told() {
    let crash = |at, end| FakeBehaviour { crash: Some(Crash { at, end }), ..FakeBehaviour::default() };
    let mut running = Fake::new(crash(CrashAt::Launch, End::Code(7))).launch().await;
    assert_eq!(running.ended().await.code(), Some(7));
    let fake = Fake::new(crash(CrashAt::Ready, End::Signal(11)));
    let (mut running, mut control) = fake.up().await;
    assert!(matches!(control.ask(&WAIT).await, Reply::Ready { .. }));
    assert_eq!(running.ended().await.signal(), Some(11));
}

#[tokio::test]
async fn the_guest_ends_in_any_way_at_any_moment() {
    let planned = |at, end| FakeBehaviour { crash: Some(Crash { at, end }), ..FakeBehaviour::default() };
    let panic = End::Guest(GuestEnd::Panic);
    let fake = Fake::new(planned(CrashAt::Up { after_millis: 1 }, End::Signal(6)));
    let mut running = fake.launch().await;
    assert_eq!(running.ended().await.signal(), Some(6));

    let fake = Fake::new(planned(CrashAt::AfterReady { millis: 1 }, panic));
    let (mut running, mut control) = fake.up().await;
    let told = fake.listen().await;
    assert!(matches!(control.ask(&WAIT).await, Reply::Ready { .. }));
    assert_eq!(running.ended().await.code(), Some(0));
    assert_eq!(told.await.unwrap(), Some(GuestEnd::Panic));

    // Asked to, through its agent and through the control socket.
    let again = Request::Shutdown { kind: ShutdownKind::Reboot, grace_ms: 0 };
    for (request, expected) in [(OFF, GuestEnd::PowerOff), (again, GuestEnd::Reboot)] {
        let fake = Fake::new(FakeBehaviour::default());
        let (mut running, mut control) = fake.up().await;
        let told = fake.listen().await;
        assert_eq!(control.ask(&request).await, Reply::ShuttingDown);
        assert_eq!(running.ended().await.code(), Some(0));
        assert_eq!(told.await.unwrap(), Some(expected));
    }
    for (end, code, signal) in
        [(panic, Some(0), None), (End::Code(9), Some(9), None), (End::Signal(9), None, Some(9))]
    {
        let fake = Fake::new(FakeBehaviour::default());
        let (mut running, _control) = fake.up().await;
        let told = fake.listen().await;
        FakeDriver::end(&fake.paths, end).await.unwrap();
        let status = running.ended().await;
        assert_eq!((status.code(), status.signal()), (code, signal));
        assert_eq!(told.await.unwrap(), (end == panic).then_some(GuestEnd::Panic));
    }
    assert!(FakeDriver::end(&fake.paths, panic).await.is_err(), "it is gone");
}

#[tokio::test]
async fn sigterm_ends_it_unless_it_is_told_to_ignore_that() {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    let term = |running: &Running| kill(Pid::from_raw(running.pid() as i32), Signal::SIGTERM).unwrap();
    let (mut running, _control) = Fake::new(FakeBehaviour::default()).up().await;
    term(&running);
    assert_eq!(running.ended().await.signal(), Some(15));
    let fake = Fake::new(FakeBehaviour { ignore_sigterm: true, ..FakeBehaviour::default() });
    let (mut running, mut control) = fake.up().await;
    term(&running);
    assert_eq!(control.ask(&Request::Sync).await, Reply::Done);
    assert!(running.runs());
}

#[tokio::test]
async fn its_root_grows_with_its_drive() {
    let mut fake = Fake::new(FakeBehaviour::default());
    let path = fake.paths.state.join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    fake.machine.drives.push(Drive {
        serial: "root".to_owned(),
        path,
        read_only: false,
        limits: Default::default(),
    });
    let (_running, mut control) = fake.up().await;
    let grow = Request::GrowRoot { drive_bytes: 8192 };
    assert!(matches!(control.ask(&grow).await, Reply::Error { code, .. } if code == "root.grow"));
    fake.driver.require_resize().unwrap().grow_disk(&fake.paths, "root", 8192).await.unwrap();
    assert_eq!(control.ask(&grow).await, Reply::Grown { bytes: 8192 });
}

#[tokio::test]
async fn a_deaf_guest_survives_shutdown_and_power_button_but_not_quit() {
    let fake = Fake::new(FakeBehaviour {
        ignore_shutdown: true,
        ignore_power_button: true,
        ..FakeBehaviour::default()
    });
    let (mut running, mut control) = fake.up().await;
    assert_eq!(control.ask(&OFF).await, Reply::ShuttingDown);
    fake.driver.require_power_button().unwrap().press(&fake.paths).await.unwrap();
    running.shows("power button pressed").await;
    assert_eq!(control.ask(&Request::Sync).await, Reply::Done);
    fake.driver.quit(&fake.paths).await.unwrap();
    assert_eq!(running.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_guest_is_ready_late_never_or_not_at_all() {
    let boot = |boot| Fake::new(FakeBehaviour { boot, ..FakeBehaviour::default() });
    let soon = Duration::from_millis(200);

    let late = boot(Boot::ReadyAfter { millis: 300 });
    let started = std::time::Instant::now();
    let (_running, mut control) = late.up().await;
    assert!(matches!(control.ask(&WAIT).await, Reply::Ready { .. }));
    assert!(started.elapsed() >= Duration::from_millis(300));

    let never = boot(Boot::NeverReady);
    let (_running, mut control) = never.up().await;
    assert!(matches!(control.ask(&Request::Hello).await, Reply::Hello { .. }));
    assert!(timeout(soon, control.ask(&WAIT)).await.is_err());

    let fails = boot(Boot::Fails { code: "root.mount".to_owned(), message: "no root".to_owned() });
    let (_running, mut control) = fails.up().await;
    assert!(matches!(control.ask(&WAIT).await, Reply::Error { code, .. } if code == "root.mount"));

    let silent = boot(Boot::Silent);
    let _running = silent.launch().await;
    silent.driver.wait_up(&silent.paths, PATIENCE).await.unwrap();
    let carrier = UnixStream::connect(silent.paths.channel_sock()).await.unwrap();
    assert!(timeout(soon, HostChannel::connect(carrier)).await.is_err());
}

#[tokio::test]
async fn a_flooding_console_stops_nothing_else() {
    let fake = Fake::new(FakeBehaviour { console_flood_bytes_per_s: 50_000_000, ..FakeBehaviour::default() });
    let (mut running, mut control) = fake.up().await;
    running.shows("flood flood").await;
    assert_eq!(control.ask(&Request::Sync).await, Reply::Done);
    fake.driver.quit(&fake.paths).await.unwrap();
    assert_eq!(running.ended().await.code(), Some(0));
}

#[tokio::test]
async fn one_vm_can_behave_otherwise_than_its_fellows() {
    let fake = Fake::new(FakeBehaviour::default());
    let own = FakeBehaviour { boot: Boot::NeverReady, ..FakeBehaviour::default() };
    let file = fake.paths.state.join(FakeDriver::BEHAVIOUR_FILE);
    std::fs::write(&file, serde_json::to_vec(&own).unwrap()).unwrap();
    let (_running, mut control) = fake.up().await;
    assert!(timeout(Duration::from_millis(200), control.ask(&WAIT)).await.is_err());
    std::fs::write(&file, "{\"typo\": 1}").unwrap();
    let error = fake.driver.plan(&fake.machine, &fake.paths).await.unwrap_err();
    assert!(error.hint().unwrap().contains(FakeDriver::BEHAVIOUR_FILE), "{error}");
}
