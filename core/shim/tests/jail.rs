//! VMMs that are locked in, and what they inherit.

use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use nix::sys::signal::Signal;
use tokio::{io::AsyncReadExt, net::UnixStream};
use vm_host::process::{PidFd, alive};
use vm_shim::{ShimError, client};
use vm_types::{
    Handle,
    shim::{ApiRequest, Inherited, Jail, JailAccess, JailFile, OwnDir, Setup, Told, VmmPipe},
};

use super::{LIMIT, Vm, helper, in_time, until};

/// Whoever cannot make jails cannot test them.
fn may_lock_in() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("not run: only root can lock a VMM in");
    }
    root
}

const USER: u32 = 0x7000_1234;

impl Vm {
    /// One that sees the libraries of the test's own program, and these.
    fn locked_in(self, files: &[(&Path, JailAccess)]) -> Self {
        let libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"].map(Path::new);
        let libraries = libraries.into_iter().filter(|path| path.exists());
        let files = libraries.map(|path| (path, JailAccess::System)).chain(files.iter().copied());
        let files = files.map(|(path, access)| JailFile { path: path.to_owned(), access }).collect();
        let (shared_group, overhead_mib) = (USER - 1, 0);
        let (cgroups, taps) = (Vec::new(), Vec::new());
        let jail = Jail { user: USER, shared_group, files, overhead_mib, cgroups, host_network: false, taps };
        self.planned(|launch| launch.jail = Some(jail))
    }

    /// What its console has said, once that is so many lines.
    async fn lines(&self, count: usize) -> Vec<String> {
        until("the console's lines", || {
            let text = String::from_utf8(client::console_tail(&self.paths, 10_000).unwrap()).unwrap();
            let lines: Vec<_> = text.lines().map(str::to_owned).collect();
            (lines.len() >= count).then_some(lines)
        })
        .await
    }
}

#[tokio::test]
async fn a_vmm_that_is_locked_in_sees_its_own_files_and_can_do_nothing_else() {
    if !may_lock_in() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = files.path().join(name);
        std::fs::write(&path, "0123").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let (own, shared, secret) = (file("own"), file("shared"), file("secret"));
    let null = Path::new("/dev/null");
    let step = |verb: &str, path: &Path| format!("{verb}={}", path.display());
    let steps = [
        step("see", &secret),
        step("see", Path::new("/etc/passwd")),
        step("see", Path::new("/proc/1")),
        step("write", &own),
        step("write", &shared),
        step("write", null),
        step("write", Path::new("/new")),
        "hang".to_owned(),
    ];
    let steps: Vec<_> = steps.iter().map(String::as_str).collect();
    let vm = Vm::new(&steps).locked_in(&[
        (&own, JailAccess::Own),
        (&shared, JailAccess::Shared),
        (null, JailAccess::Device),
    ]);
    let started = vm.start().await;
    let expected = [
        format!("{}: false", secret.display()),
        "/etc/passwd: false".to_owned(),
        "/proc/1: false".to_owned(),
        format!("write {}: Ok(1)", own.display()),
        format!("write {}: Err(PermissionDenied)", shared.display()),
        "write /dev/null: Ok(1)".to_owned(),
        "write /new: Err(NotFound)".to_owned(),
    ];
    assert_eq!(vm.lines(expected.len()).await, expected);
    assert_eq!(std::fs::read_to_string(&own).unwrap(), "x123");

    let status = std::fs::read_to_string(format!("/proc/{}/status", started.vmm.pid)).unwrap();
    let value = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_ascii_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    let user = vec![USER.to_string(); 4].join(" ");
    assert_eq!((value("Uid:"), value("Gid:")), (user.clone(), user));
    assert_eq!(value("Groups:"), (USER - 1).to_string());
    assert_eq!(value("NoNewPrivs:"), "1");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&value(set), 16).unwrap(), 0, "{set}");
    }
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&started.vmm.pid.to_string()), of("self"), "{namespace}");
    }
    let environment = std::fs::read(format!("/proc/{}/environ", started.vmm.pid)).unwrap();
    assert!(environment.is_empty(), "{}", String::from_utf8_lossy(&environment));
    assert!(vm_shim::verify(&vm.paths, started.shim, started.vmm).unwrap());
    client::kill(&vm.paths).await.unwrap();
    vm.record().await;
    until("the shim's end", || (!alive(started.shim)).then_some(())).await;
    let left: Vec<_> = std::fs::read_dir(&vm.paths.run).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["shim.json"]);
}

#[tokio::test]
async fn a_vmm_that_attaches_to_its_taps_itself_may_have_those_and_no_others() {
    if !may_lock_in() {
        return;
    }
    // Of this thread, and of what it starts. The test's other threads stay where they are.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    for (tap, user) in [("own0", None), ("other0", Some(USER + 1))] {
        let user = user.map(|user: u32| user.to_string());
        let mut ip = std::process::Command::new("ip");
        ip.args(["tuntap", "add", "dev", tap, "mode", "tap"]);
        ip.args(user.iter().flat_map(|user| ["user", user]));
        assert!(ip.status().unwrap().success());
    }
    let tun = Path::new("/dev/net/tun");
    let steps = ["tap=own0", "tap=other0", "tap=new0", "hang"];
    let vm = Vm::new(&steps).locked_in(&[(tun, JailAccess::Device)]).planned(|launch| {
        let jail = launch.jail.as_mut().unwrap();
        (jail.host_network, jail.taps) = (true, vec!["own0".to_owned()]);
    });
    for killed in [false, true] {
        let started = vm.start().await;
        let denied = |tap| format!("tap {tap}: Err(PermissionDenied)");
        assert_eq!(vm.lines(3).await, ["tap own0: Ok(())".to_owned(), denied("other0"), denied("new0")]);
        let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).unwrap();
        assert_eq!(of(&started.vmm.pid.to_string()), of("thread-self"));
        if killed {
            // Whoever sees to what is left of it takes the tap back.
            PidFd::open(started.shim).unwrap().unwrap().kill(Signal::SIGKILL).unwrap();
            let handle = Handle::Processes { shim: started.shim, vmm: started.vmm, answered: true };
            vm_shim::effect::undo(&vm.paths.run, &handle, LIMIT).await.unwrap();
        } else {
            client::kill(&vm.paths).await.unwrap();
        }
        until("the shim's end", || (!alive(started.shim)).then_some(())).await;
        let shown = std::process::Command::new("ip").args(["-d", "link", "show", "own0"]).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        assert!(shown.contains(" user root "), "it is taken back: {shown}");
    }
    // A tap that is not there is not made.
    let vm = vm.planned(|launch| launch.jail.as_mut().unwrap().taps.push("none0".to_owned()));
    let launched = client::launch(&helper(), &vm.paths.shim_spec(), &vm.paths.run, LIMIT).await;
    let Err(ShimError::Refused { error, hint }) = launched else { panic!("{launched:?}") };
    assert!(error.contains("tap none0") && hint.is_some(), "{error}");
}

#[tokio::test]
async fn a_vmm_makes_its_sockets_in_a_directory_of_its_own_and_tells_through_pipes() {
    for locked_in in [false, true] {
        if locked_in && !may_lock_in() {
            return;
        }
        let mut vm = Vm::new(&[]);
        let (own, api) = (vm.paths.vmm_dir(), vm.paths.api_sock());
        let pipe = |name: &str, what| VmmPipe { path: own.join(name), what };
        let pipes = vec![pipe("log", Told::Log), pipe("metrics", Told::Metrics)];
        let steps = [
            format!("pipe={} a warning", pipes[0].path.display()),
            format!("pipe={} {{\"count\": 1}}", pipes[1].path.display()),
            format!("pipe={} {{\"count\": 2}}", pipes[1].path.display()),
            "stderr=and its stderr".to_owned(),
            format!("api={} /refused", api.display()),
            "hang".to_owned(),
        ];
        vm = vm.planned(|launch| {
            launch.args.extend(steps);
            launch.own_dir = Some(OwnDir { path: own.clone(), pipes });
            let request = ApiRequest { method: "PUT".into(), path: "/actions".into(), body: true.into() };
            launch.setup = Some(Setup { socket: api.clone(), requests: vec![request] });
        });
        if locked_in {
            vm = vm.locked_in(&[(&own, JailAccess::Own)]);
        }
        // What a shim that was killed has left.
        std::fs::create_dir(&own).unwrap();
        std::fs::write(&api, "").unwrap();
        let started = vm.start().await;
        let about = std::fs::metadata(&api).unwrap();
        assert_eq!(about.uid(), if locked_in { USER } else { nix::unistd::geteuid().as_raw() });
        let above = std::fs::metadata(&own).unwrap();
        // Taken back before the guest runs.
        let own_uid = nix::unistd::geteuid().as_raw();
        assert_eq!((above.uid(), above.mode() & 0o777), (own_uid, 0o700));
        let told = async {
            let last = Some(serde_json::json!({"count": 2}));
            while client::status(&vm.paths).await.unwrap().vmm_metrics != last {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        in_time(told).await;
        until("the log", || {
            let log = std::fs::read_to_string(vm.paths.vmm_log()).unwrap();
            (log.contains("a warning\n") && log.contains("and its stderr\n")).then_some(())
        })
        .await;
        client::kill(&vm.paths).await.unwrap();
        until("the shim's end", || (!alive(started.shim)).then_some(())).await;
        assert!(!own.exists());
    }
}

#[tokio::test]
async fn a_vmm_that_is_locked_in_dies_with_its_shim() {
    if !may_lock_in() {
        return;
    }
    let vm = Vm::new(&["say=up\n", "hang"]).locked_in(&[]);
    let started = vm.start().await;
    vm.lines(1).await;
    PidFd::open(started.shim).unwrap().unwrap().kill(Signal::SIGKILL).unwrap();
    until("the VMM's end", || (!alive(started.vmm)).then_some(())).await;
}

#[tokio::test]
async fn a_file_that_is_named_twice_fails_the_start_and_keeps_what_is_in_it() {
    if !may_lock_in() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let disk = files.path().join("disk");
    std::fs::write(&disk, "of value").unwrap();
    let vm = Vm::new(&["hang"]).locked_in(&[(&disk, JailAccess::Own), (&disk, JailAccess::Own)]);
    let launched = client::launch(&helper(), &vm.paths.shim_spec(), &vm.paths.run, LIMIT).await;
    let Err(ShimError::Refused { error, .. }) = launched else { panic!("{launched:?}") };
    assert!(error.contains("disk"), "{error}");
    assert_eq!(std::fs::read_to_string(&disk).unwrap(), "of value");
}

#[tokio::test]
async fn a_jail_that_cannot_be_made_is_a_start_that_failed_with_its_words() {
    if !may_lock_in() {
        return;
    }
    let vm = Vm::new(&["hang"]).locked_in(&[(Path::new("/no/such/file"), JailAccess::Own)]);
    let launched = client::launch(&helper(), &vm.paths.shim_spec(), &vm.paths.run, LIMIT).await;
    let Err(ShimError::Refused { error, hint }) = launched else { panic!("{launched:?}") };
    assert!(error.contains("could not hand over /no/such/file: "), "{error}");
    assert!(hint.unwrap().contains("vm doctor"));
    until("the shim's end", || client::find(&vm.paths.run).is_empty().then_some(())).await;

    let vm = Vm::new(&["hang"]).locked_in(&[]).planned(|launch| launch.program = "/no/such/vmm".into());
    let launched = client::launch(&helper(), &vm.paths.shim_spec(), &vm.paths.run, LIMIT).await;
    let Err(ShimError::Refused { error, .. }) = launched else { panic!("{launched:?}") };
    assert!(error.contains("/no/such/vmm"), "{error}");
}

#[tokio::test]
async fn a_vmm_inherits_what_its_plan_says() {
    for locked_in in [false, true] {
        if locked_in && !may_lock_in() {
            return;
        }
        let mut vm = Vm::new(&["greet=100", "greet=101", "hang"]);
        let sockets = [vm.paths.run.join("a.sock"), vm.paths.run.join("b.sock")];
        // A former run's.
        std::fs::write(&sockets[0], "").unwrap();
        let listeners = sockets.clone().map(|path| Inherited::Listener { path });
        vm = vm.planned(|launch| launch.inherited = listeners.into());
        if locked_in {
            vm = vm.locked_in(&[]);
        }
        let started = vm.start().await;
        for socket in &sockets {
            let mut client = UnixStream::connect(socket).await.unwrap();
            let mut said = String::new();
            in_time(client.read_to_string(&mut said)).await.unwrap();
            assert_eq!(said, "hello\n");
        }
        client::kill(&vm.paths).await.unwrap();
        until("the shim's end", || (!alive(started.shim)).then_some(())).await;
        // Nobody else has kept them open.
        assert!(sockets.iter().all(|socket| !socket.exists()));
    }
}
