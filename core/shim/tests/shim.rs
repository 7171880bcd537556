//! Real shims with a VMM that is played by `helper/main.rs`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod jail;

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    process::Command,
    time::{Instant, timeout},
};
use vm_host::process::{PidFd, alive};
use vm_shim::{ControlClient, ControlError, ShimError, client, connect_control, effect};
use vm_types::{
    Handle, Observed, ProcessRef, VmPaths,
    guest::control::{Phase, ShutdownKind},
    shim::{
        ApiRequest, ChannelEndpoint, ExitRecord, GuestEnd, LastWords, LaunchPlan, Setup, ShimSpec,
        ShimStarted,
    },
    vm::ExitStatus,
};

const LIMIT: Duration = Duration::from_secs(60);

fn helper() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples/shim-test-helper");
    assert!(path.exists(), "`cargo test -p vm-shim` without a target builds {}", path.display());
    path
}

/// A VM's directories; whatever still runs in them is killed at the end.
struct Vm {
    paths: VmPaths,
    _dir: tempfile::TempDir,
}

impl Vm {
    fn new(steps: &[&str]) -> Self {
        Self::with(steps, 1 << 20, None)
    }

    fn with(steps: &[&str], console_log_bytes: u64, socket_group: Option<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = VmPaths { run: dir.path().join("run"), state: dir.path().join("state") };
        for directory in paths.directories() {
            std::fs::create_dir(directory).unwrap();
        }
        let channel = paths.channel_sock();
        let mut args = vec!["vmm".to_owned()];
        let events = paths.events_sock();
        let control = paths.vmm_sock();
        let places = [('@', &channel), ('%', &events), ('&', &control)];
        let placed = |step: &&str| {
            places
                .iter()
                .fold((*step).to_owned(), |step, (mark, path)| step.replace(*mark, path.to_str().unwrap()))
        };
        args.extend(steps.iter().map(placed));
        let spec = ShimSpec {
            vm: "0123456789ab".parse().unwrap(),
            run_dir: paths.run.clone(),
            state_dir: paths.state.clone(),
            launch: LaunchPlan {
                program: helper(),
                args,
                channel: ChannelEndpoint::VirtioSerial { socket: channel },
                events: Some(events),
                setup: None,
                last_words: None,
                inherited: Vec::new(),
                own_dir: None,
                jail: None,
            },
            vmm: None,
            machine: None,
            console_log_bytes,
            socket_group,
        };
        vm_host::files::write_json(&paths.shim_spec(), 0o600, &spec).unwrap();
        Self { paths, _dir: dir }
    }

    async fn start(&self) -> ShimStarted {
        client::launch(&helper(), &self.paths.shim_spec(), &self.paths.run, LIMIT).await.unwrap()
    }

    /// With another way to start the VMM.
    fn planned(self, change: impl FnOnce(&mut LaunchPlan)) -> Self {
        let mut spec: ShimSpec = vm_host::files::read_json(&self.paths.shim_spec()).unwrap().unwrap();
        change(&mut spec.launch);
        vm_host::files::write_json(&self.paths.shim_spec(), 0o600, &spec).unwrap();
        self
    }

    /// One that takes its machine by requests.
    fn with_setup(steps: &[&str]) -> Self {
        let vm = Self::new(steps);
        let socket = vm.paths.vmm_sock();
        let request = |method: &str, path: &str, body| ApiRequest {
            method: method.to_owned(),
            path: path.to_owned(),
            body,
        };
        let requests = vec![
            request("PUT", "/machine-config", serde_json::json!({"vcpu_count": 2})),
            request("PUT", "/drives/root", serde_json::json!({"drive_id": "root"})),
            request("PUT", "/actions", serde_json::json!({"action_type": "InstanceStart"})),
        ];
        vm.planned(|launch| launch.setup = Some(Setup { socket, requests }))
    }

    async fn record(&self) -> ExitRecord {
        until("an exit record", || client::exit_record(&self.paths).unwrap()).await
    }

    async fn exit_status(&self) -> ExitStatus {
        until("an exit record", || client::exit_record(&self.paths).unwrap()).await.status
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        for shim in client::find(&self.paths.run) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim.pid as i32), Signal::SIGKILL);
        }
    }
}

async fn until<T>(what: &str, mut predicate: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = predicate() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    timeout(LIMIT, future).await.expect("took too long")
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |m| m.len())
}

#[tokio::test]
async fn a_flooded_console_stays_bounded_and_its_end_is_kept() {
    let vm = Vm::with(&["flood=20000000", "say=the very end", "stderr=vmm speaks", "exit=7"], 64 << 10, None);
    vm.start().await;
    assert_eq!(vm.exit_status().await, ExitStatus::Code(7));
    let log = vm.paths.console_log();
    let older = log.with_extension("log.1");
    assert!(size(&log) + size(&older) <= 64 << 10);
    let tail = client::console_tail(&vm.paths, 40_000).unwrap();
    assert_eq!(tail.len(), 40_000, "the tail reaches into the older file");
    assert!(tail.ends_with(b"x\nthe very end"));
    assert_eq!(std::fs::read_to_string(vm.paths.vmm_log()).unwrap(), "vmm speaks\n");
}

#[tokio::test]
async fn ends_are_recorded_and_nothing_but_files_of_record_is_left() {
    for (step, expected) in [
        ("exit=0", ExitStatus::Code(0)),
        ("exit=42", ExitStatus::Code(42)),
        ("abort", ExitStatus::Signal(Signal::SIGABRT as i32)),
    ] {
        let vm = Vm::new(&[step]);
        let started = vm.start().await;
        assert_eq!(vm.exit_status().await, expected);
        let record = client::exit_record(&vm.paths).unwrap().unwrap();
        assert_eq!(record.vmm, started.vmm);
        assert_eq!(record.boot_id, vm_host::process::boot_id().unwrap());
        until("the shim's end", || (!alive(started.shim)).then_some(())).await;
        let left: Vec<_> =
            std::fs::read_dir(&vm.paths.run).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["shim.json"], "sockets are left behind");
        assert!(matches!(client::status(&vm.paths).await, Err(ShimError::NotRunning { .. })));
    }
}

#[tokio::test]
async fn the_guests_part_in_the_end_is_recorded() {
    let shutdown = |guest: bool, reason: &str| {
        format!(r#"tell=% {{"event": "SHUTDOWN", "data": {{"guest": {guest}, "reason": "{reason}"}}}}"#)
    };
    let off = shutdown(true, "guest-shutdown");
    for (steps, status, guest) in [
        (vec![off.as_str(), "exit=0"], ExitStatus::Code(0), Some(GuestEnd::PowerOff)),
        (vec![&shutdown(true, "guest-reset"), "exit=0"], ExitStatus::Code(0), Some(GuestEnd::Reboot)),
        (vec![&shutdown(true, "guest-panic"), "exit=0"], ExitStatus::Code(0), Some(GuestEnd::Panic)),
        (vec![&shutdown(false, "host-qmp-quit"), "exit=0"], ExitStatus::Code(0), None),
        // It could still say so before it was gone.
        (vec![&off, "abort"], ExitStatus::Signal(Signal::SIGABRT as i32), Some(GuestEnd::PowerOff)),
        (vec!["tell=% not what was agreed on", "exit=5"], ExitStatus::Code(5), None),
        // Nobody listens there.
        (vec!["exit=0"], ExitStatus::Code(0), None),
    ] {
        let vm = Vm::new(&steps);
        vm.start().await;
        let record = until("an exit record", || client::exit_record(&vm.paths).unwrap()).await;
        assert_eq!((record.status, record.guest), (status, guest), "{steps:?}");
    }
}

#[tokio::test]
async fn a_vmm_is_given_its_machine_before_it_counts_as_started() {
    let vm = Vm::with_setup(&["api=& /none", "hang"]);
    // What a former run left there must not be taken for the new VMM.
    std::fs::write(vm.paths.vmm_sock(), "").unwrap();
    vm.start().await;
    let told = "PUT /machine-config {\"vcpu_count\":2}\nPUT /drives/root {\"drive_id\":\"root\"}\n\
                PUT /actions {\"action_type\":\"InstanceStart\"}\n";
    until("the requests to be told", || {
        (client::console_tail(&vm.paths, 10_000).unwrap() == told.as_bytes()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_machine_that_is_refused_leaves_no_vmm_and_the_refusals_words() {
    let vm = Vm::with_setup(&["api=& /drives/root", "hang"]);
    let error = client::launch(&helper(), &vm.paths.shim_spec(), &vm.paths.run, LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("PUT /drives/root was refused (400): it is of no use"), "{error}");
    assert!(error.hint().is_some());
    assert!(client::find(&vm.paths.run).is_empty());
    assert_eq!(client::exit_record(&vm.paths).unwrap(), None);
    // The next start is not in its way.
    let again = vm.planned(|launch| launch.setup = None);
    again.start().await;
}

#[tokio::test]
async fn a_vmm_that_ends_while_it_is_given_its_machine_is_told_of_at_once() {
    let vm = Vm::with_setup(&["stderr=no such CPU", "exit=3"]);
    let error = client::launch(&helper(), &vm.paths.shim_spec(), &vm.paths.run, LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("exit code 3"), "{error}");
    assert!(error.hint().unwrap().contains("vmm.log"), "{error:?}");
    assert_eq!(std::fs::read_to_string(vm.paths.vmm_log()).unwrap(), "no such CPU\n");
}

#[tokio::test]
async fn a_console_tells_how_a_guest_ended_whose_vmm_does_not() {
    let listening = |steps: &[&str]| {
        Vm::new(steps).planned(|launch| {
            launch.events = None;
            launch.channel = ChannelEndpoint::Vsock { socket: launch.channel.socket().to_owned(), port: 1 };
            launch.last_words = Some(LastWords {
                power_off: vec!["System halted".to_owned()],
                reboot: vec!["Restarting system".to_owned()],
                panic: vec!["Kernel panic".to_owned()],
                paused: None,
            });
        })
    };
    let code = ExitStatus::Code;
    let killed = ExitStatus::Signal(Signal::SIGKILL as i32);
    for (steps, status, guest) in [
        (&["say=Restarting system\n", "exit=0"][..], code(0), Some(GuestEnd::Reboot)),
        (&["say=Kernel panic\nmore\n", "exit=0"], code(0), Some(GuestEnd::Panic)),
        (&["say=login:", "exit=0"], code(0), Some(GuestEnd::Reboot)),
        (&["say=login:", "exit=1"], code(1), None),
        // The guest is dead and its VMM is not.
        (&["dead=@", "say=System halted\n", "hang"], killed, Some(GuestEnd::PowerOff)),
    ] {
        let vm = listening(steps);
        vm.start().await;
        let record = vm.record().await;
        assert_eq!((record.status, record.guest), (status, guest), "{steps:?}");
    }
    // Whoever kills it does not make a guest's end of it.
    let vm = listening(&["say=login:", "hang"]);
    vm.start().await;
    client::kill(&vm.paths).await.unwrap();
    assert_eq!(vm.record().await.guest, None);
}

#[tokio::test]
async fn only_the_very_processes_are_the_vms() {
    let vm = Vm::new(&["hang"]);
    let ShimStarted { shim, vmm } = vm.start().await;
    let verify = |shim, vmm| vm_shim::verify(&vm.paths, shim, vmm).unwrap();
    // Until it has become the helper, the VMM is a copy of the shim.
    until("the VMM to be known", || verify(shim, vmm).then_some(())).await;

    // Pids that have come to others since: by their start times, and by what they are.
    let later = |process: ProcessRef| ProcessRef { start_ticks: process.start_ticks + 1, ..process };
    assert!(!verify(later(shim), vmm) && !verify(shim, later(vmm)));
    let mut stranger = Command::new("sleep").arg("1000").kill_on_drop(true).spawn().unwrap();
    let other = vm_host::process::identify(stranger.id().unwrap()).unwrap();
    assert!(!verify(other, vmm) && !verify(shim, other));
    stranger.kill().await.unwrap();
    let another = Vm::new(&["hang"]);
    let others = another.start().await;
    assert!(!verify(others.shim, others.vmm) && !verify(shim, others.vmm));

    // The shim's child, but not the program that was to run.
    let mut spec = vm_shim::spec(&vm.paths).unwrap().unwrap();
    spec.launch.program = "/usr/bin/vmm".into();
    spec.launch.args.push("--other".to_owned());
    vm_host::files::write_json(&vm.paths.shim_spec(), 0o600, &spec).unwrap();
    assert!(!verify(shim, vmm));
    std::fs::remove_file(vm.paths.shim_spec()).unwrap();
    assert_eq!(vm_shim::spec(&vm.paths).unwrap(), None);
    assert!(verify(shim, vmm), "a lost specification disowns nobody");
    effect::undo(&vm.paths.run, &Handle::None, LIMIT).await.unwrap();
    assert!(!verify(shim, vmm));
}

#[tokio::test]
async fn it_is_told_who_uses_the_vm_and_since_when_nobody_does() {
    let vm = Vm::new(&["hang"]);
    vm.start().await;
    let status = async || client::status(&vm.paths).await.unwrap();
    let counts = async |ssh, console| loop {
        let status = status().await;
        if (status.ssh_connections, status.console_connections) == (ssh, console) {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let fresh = status().await;
    assert_eq!((fresh.ssh_idle_since, fresh.idle_since), (None, Some(fresh.started_at)));
    let ssh = UnixStream::connect(vm.paths.ssh_sock()).await.unwrap();
    let console = UnixStream::connect(vm.paths.console_sock()).await.unwrap();
    let used = in_time(counts(1, 1)).await;
    assert_eq!((used.ssh_idle_since, used.idle_since), (None, None));
    drop(ssh);
    let watched = in_time(counts(0, 1)).await;
    assert!(watched.ssh_idle_since >= Some(fresh.started_at), "{watched:?}");
    assert_eq!(watched.idle_since, None);
    drop(console);
    let idle = in_time(counts(0, 0)).await;
    assert!(idle.idle_since >= watched.ssh_idle_since, "{idle:?}");
}

#[tokio::test]
async fn a_vmm_that_is_not_installed_is_told_with_a_hint() {
    let vm = Vm::new(&[]);
    let mut spec: ShimSpec = vm_host::files::read_json(&vm.paths.shim_spec()).unwrap().unwrap();
    spec.launch.program = "/no/such/vmm".into();
    vm_host::files::write_json(&vm.paths.shim_spec(), 0o600, &spec).unwrap();
    let error = client::launch(&helper(), &vm.paths.shim_spec(), &vm.paths.run, LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/vmm"), "{error}");
    assert!(error.hint().unwrap().contains("install"), "{error:?}");
    assert!(client::find(&vm.paths.run).is_empty());
    assert!(!vm.paths.ssh_sock().exists());
}

#[tokio::test]
async fn a_vm_is_never_started_twice() {
    let vm = Vm::new(&["hang"]);
    let first = vm.start().await;
    let error = client::launch(&helper(), &vm.paths.shim_spec(), &vm.paths.run, LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("another shim"), "{error}");
    assert_eq!(client::status(&vm.paths).await.unwrap().vmm, first.vmm, "the first shim is still served");
    assert!(alive(first.vmm));
}

#[tokio::test]
async fn a_shim_that_is_killed_takes_its_vmm_along() {
    let vm = Vm::new(&["hang"]);
    let started = vm.start().await;
    assert!(alive(started.vmm));
    let vmm = PidFd::open(started.vmm).unwrap().unwrap();
    PidFd::open(started.shim).unwrap().unwrap().kill(Signal::SIGKILL).unwrap();
    in_time(vmm.ended()).await.unwrap();
    assert_eq!(client::exit_record(&vm.paths).unwrap(), None);
    assert_eq!(effect::observe(&vm.paths.run).await, Observed::Absent);
}

#[tokio::test]
async fn sigterm_ends_both_with_a_record_and_sighup_neither() {
    let vm = Vm::new(&["hang"]);
    let started = vm.start().await;
    let shim = PidFd::open(started.shim).unwrap().unwrap();
    shim.kill(Signal::SIGHUP).unwrap();
    assert!(client::status(&vm.paths).await.is_ok());
    shim.kill(Signal::SIGTERM).unwrap();
    assert_eq!(vm.exit_status().await, ExitStatus::Signal(Signal::SIGKILL as i32));
    in_time(shim.ended()).await.unwrap();
}

#[tokio::test]
async fn undo_ends_a_shim_known_only_by_its_intent_and_is_idempotent() {
    let vm = Vm::new(&["hang"]);
    let started = vm.start().await;
    let handle = Handle::Processes { shim: started.shim, vmm: started.vmm, answered: false };
    assert_eq!(effect::observe(&vm.paths.run).await, Observed::Present(handle.clone()));
    effect::undo(&vm.paths.run, &Handle::None, LIMIT).await.unwrap();
    assert!(!alive(started.shim) && !alive(started.vmm));
    assert_eq!(vm.exit_status().await, ExitStatus::Signal(Signal::SIGKILL as i32));
    effect::undo(&vm.paths.run, &handle, LIMIT).await.unwrap();
    assert_eq!(effect::observe(&vm.paths.run).await, Observed::Absent);
}

#[tokio::test]
async fn undo_ends_a_shim_that_does_not_answer() {
    let vm = Vm::new(&["hang"]);
    let started = vm.start().await;
    PidFd::open(started.shim).unwrap().unwrap().kill(Signal::SIGSTOP).unwrap();
    // Half of it at most goes by in vain, the rest is for the force.
    effect::undo(&vm.paths.run, &Handle::None, Duration::from_secs(20)).await.unwrap();
    assert!(!alive(started.shim) && !alive(started.vmm));
}

#[tokio::test]
async fn a_shim_outlives_its_daemon_and_keeps_logging() {
    let vm = Vm::new(&["lines"]);
    let mut daemon = Command::new(helper())
        .arg("daemon")
        .args([vm.paths.shim_spec(), vm.paths.run.clone()])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut line = String::new();
    in_time(BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut line)).await.unwrap();
    let started: ShimStarted = serde_json::from_str(&line).unwrap();
    in_time(daemon.kill()).await.unwrap();

    let mut console = UnixStream::connect(vm.paths.console_sock()).await.unwrap();
    for expected in 1..=3 {
        console.write_all(b".").await.unwrap();
        let mut tick = [0; 5];
        in_time(console.read_exact(&mut tick)).await.unwrap();
        assert_eq!(&tick, b"tick\n");
        assert_eq!(client::console_tail(&vm.paths, 1000).unwrap(), b"tick\n".repeat(expected));
    }
    let status = client::status(&vm.paths).await.unwrap();
    assert_eq!((status.shim, status.vmm), (started.shim, started.vmm));
    client::kill(&vm.paths).await.unwrap();
    assert_eq!(vm.exit_status().await, ExitStatus::Signal(Signal::SIGKILL as i32));
}

#[tokio::test]
async fn a_console_client_that_does_not_read_holds_up_nobody() {
    let vm = Vm::new(&["stdin", "flood=20000000", "say=the very end", "exit=0"]);
    vm.start().await;
    let stuck = UnixStream::connect(vm.paths.console_sock()).await.unwrap();
    let mut writer = UnixStream::connect(vm.paths.console_sock()).await.unwrap();
    writer.write_all(b"go\n").await.unwrap();
    // The reader shuts its own direction and still sees all to the end.
    writer.shutdown().await.unwrap();
    let mut seen = Vec::new();
    in_time(writer.read_to_end(&mut seen)).await.unwrap();
    assert_eq!(vm.exit_status().await, ExitStatus::Code(0));
    assert!(seen.ends_with(b"the very end"), "a reader was cut off after {} bytes", seen.len());
    drop(stuck);
}

#[tokio::test]
async fn typing_at_a_vmm_that_does_not_listen_takes_nobodys_place() {
    let vm = Vm::new(&["chatter"]);
    vm.start().await;
    for _ in 0..80 {
        let mut typist = UnixStream::connect(vm.paths.console_sock()).await.unwrap();
        // More than the VMM's stdin takes together with the others'; the rest stays in the socket.
        in_time(typist.write_all(&[b'x'; 100_000])).await.unwrap();
    }
    let mut reader = UnixStream::connect(vm.paths.console_sock()).await.unwrap();
    let mut tick = [0; 5];
    in_time(reader.read_exact(&mut tick)).await.unwrap();
}

#[tokio::test]
async fn ten_mebibytes_pass_both_ways_and_each_direction_ends_on_its_own() {
    let vm = Vm::new(&["guest=@"]);
    vm.start().await;
    let (mut read, mut write) = UnixStream::connect(vm.paths.ssh_sock()).await.unwrap().into_split();
    let data: Vec<u8> = (0..10u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let send = async {
        write.write_all(&data).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut back = Vec::new();
    let ((), got) = in_time(async { tokio::join!(send, read.read_to_end(&mut back)) }).await;
    got.unwrap();
    let (echoed, rest) = back.split_at(data.len());
    assert!(echoed == data, "the bytes differ");
    assert_eq!(rest, format!("\nafter eof: {}", data.len()).as_bytes());
}

#[tokio::test]
async fn connections_wait_for_the_guest_and_survive_the_end_of_a_session() {
    // Deaf: the first hello is lost; the shim must say another one.
    let vm = Vm::new(&["deaf=@", "guest=@"]);
    vm.start().await;
    assert!(!client::status(&vm.paths).await.unwrap().guest_connected);
    for _ in 0..3 {
        let mut stream = UnixStream::connect(vm.paths.ssh_sock()).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut back = String::new();
        in_time(stream.read_to_string(&mut back)).await.unwrap();
        assert_eq!(back, "hello\nafter eof: 5");
        // The guest drops its session, as by a reset. The connection is seen to end, and the next one to work.
        let mut stream = UnixStream::connect(vm.paths.ssh_sock()).await.unwrap();
        stream.write_all(b"!").await.unwrap();
        let _ = in_time(stream.read_to_string(&mut String::new())).await;
    }
    let (mut control, agent) = connect_control(&vm.paths, LIMIT).await.unwrap();
    assert_eq!(agent.kernel_release, "6.0-test");
    control.sync(LIMIT).await.unwrap();
    assert_eq!(control.grow_root(4096, LIMIT).await.unwrap(), 4095);
    assert!(client::status(&vm.paths).await.unwrap().guest_connected);
}

#[tokio::test]
async fn the_agent_is_asked_with_limits() {
    let vm = Vm::new(&["guest=@"]);
    assert!(matches!(ControlClient::connect(&vm.paths).await, Err(ControlError::NotRunning { .. })));
    vm.start().await;
    let (mut control, _) = connect_control(&vm.paths, LIMIT).await.unwrap();
    let late = control.wait_ready(Phase::Init, Duration::from_millis(50)).await;
    assert!(matches!(late, Err(ControlError::TimedOut { .. })), "{late:?}");
    assert!(matches!(control.sync(LIMIT).await, Err(ControlError::OutOfStep)));
    let (mut control, _) = connect_control(&vm.paths, LIMIT).await.unwrap();
    control.shutdown(ShutdownKind::PowerOff, Duration::from_secs(1), LIMIT).await.unwrap();
    assert_eq!(vm.exit_status().await, ExitStatus::Code(0));
    assert!(matches!(connect_control(&vm.paths, LIMIT).await, Err(ControlError::NotRunning { .. })));
}

#[tokio::test]
async fn sockets_are_open_to_whom_they_should_be() {
    let vm = Vm::with(&["hang"], 4096, Some(12345));
    vm.start().await;
    let owner_and_mode = |path: PathBuf| {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(path).unwrap();
        (metadata.gid(), metadata.permissions().mode() & 0o777)
    };
    assert_eq!(owner_and_mode(vm.paths.ssh_sock()), (12345, 0o660));
    assert_eq!(owner_and_mode(vm.paths.console_sock()), (12345, 0o660));
    assert_eq!(owner_and_mode(vm.paths.shim_sock()).1, 0o600);
    assert_eq!(owner_and_mode(vm.paths.control_sock()).1, 0o600);
}

#[tokio::test]
async fn nothing_of_the_daemon_reaches_the_vmm() {
    let vm = Vm::new(&["hang"]);
    let started = vm.start().await;
    // Its own loader has a library open for a moment.
    until("the VMM to hold its standard streams only", || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", started.vmm.pid)).unwrap().count();
        (fds == 3).then_some(())
    })
    .await;
    let field = |pid: u32, name: &str| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        text.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim_matches([':', '\t', ' ']).to_owned()
    };
    assert_eq!(field(started.vmm.pid, "SigBlk"), "0000000000000000");
    // Signals 1 to 31; 32 and 33 belong to the C library, which resets them for nobody. SIGPIPE (13) is sooner or later ignored
    // by the played VMM's own runtime.
    let ignored = u64::from_str_radix(&field(started.vmm.pid, "SigIgn"), 16).unwrap() & 0x7fff_ffff;
    assert_eq!(ignored & !(1 << 12), 0);
    assert!(std::fs::read_link(format!("/proc/{}/cwd", started.shim.pid)).unwrap() == Path::new("/"));
    let kib: u64 = field(started.shim.pid, "RssAnon").trim_end_matches(" kB").parse().unwrap();
    println!("idle shim: VmRSS {}, RssAnon {kib} kB", field(started.shim.pid, "VmRSS"));
    assert!(kib < 3 * 1024, "an idle shim holds {kib} KiB of memory of its own");
}
