//! VMMs that are locked in, and what they inherit.

use std::{os::unix::fs::PermissionsExt, path::Path};

use nix::sys::signal::Signal;
use tokio::{io::AsyncReadExt, net::UnixStream};
use vm_host::process::{PidFd, alive};
use vm_shim::{ShimError, client};
use vm_types::shim::{Inherited, Jail, JailAccess, JailFile};

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
        let jail = Jail { user: USER, shared_group, files, overhead_mib, cgroups: Vec::new() };
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
