//! The contract, against the fakes and against QEMU and, where `VM_FIRECRACKER` names it, Firecracker themselves.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use nix::sys::signal::Signal;
use vm_host::{
    HostRunner,
    process::{PidFd, alive},
};
use vm_types::{ProcessRef, VmPaths, machine::MachineSpec};
use vm_vmm::{
    Accelerator, FakeDriver, FirecrackerDriver, JailUsers, Jailing, QemuDriver, Vmm,
    contract::{self, PATIENCE, Subject, tiny},
};

struct Place {
    _dir: tempfile::TempDir,
    paths: VmPaths,
    machine: MachineSpec,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    // A comma in a path must not end an option of QEMU's.
    let paths = VmPaths { run: dir.path().join("run,a"), state: dir.path().join("state,b") };
    for directory in paths.directories() {
        std::fs::create_dir(directory).unwrap();
    }
    let file = |name: &str, content: &[u8]| -> PathBuf {
        let path = paths.state.join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    // QEMU takes the initramfs of a multiboot kernel for a list with commas; that of a Linux kernel is a plain path.
    let initramfs = dir.path().join("initramfs");
    std::fs::write(&initramfs, b"nothing in it").unwrap();
    let machine = MachineSpec {
        vm: "0123456789ab".parse().unwrap(),
        cpus: 2,
        memory_mib: 64,
        kernel: file("kernel", &tiny::kernel()),
        initramfs,
        kernel_args: vec!["quiet".to_owned(), "some.list=a,b".to_owned()],
        drives: vec![vm_types::machine::Drive {
            serial: "root".to_owned(),
            path: file("disk,d", &[0; 4096]),
            read_only: false,
            limits: Default::default(),
        }],
        nics: Vec::new(),
        vsock_cid: None,
    };
    Place { _dir: dir, paths, machine }
}

async fn holds(vmm: &dyn Vmm, greeting: &'static str) {
    let Place { _dir, paths, machine } = place();
    contract::everything(&Subject { vmm, machine, paths, greeting, jailer: None }).await;
}

/// What locks VMMs in: the tests' own shim, or what `VM_JAILER` names. `None` where nobody may.
fn jailer() -> Option<PathBuf> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: only root can lock a VMM in");
        return None;
    }
    let own = || {
        let path = std::env::current_exe().ok()?;
        Some(path.parent()?.parent()?.join("examples/vmm-test-shim"))
    };
    let path = std::env::var_os("VM_JAILER").map(PathBuf::from).or_else(own)?;
    assert!(path.exists(), "`cargo test -p vm-vmm` without a target builds {}", path.display());
    Some(path)
}

fn jailing() -> Option<Jailing> {
    let users = JailUsers { first: 0x7000_0000, last: 0x7000_FFFF };
    Some(Jailing { users, required: true, obstacle: None })
}

#[tokio::test]
async fn the_fake_keeps_the_contract() {
    holds(&FakeDriver::new(env!("CARGO_BIN_EXE_vm-fake-vmm"), []), "fake guest 0123456789ab booting").await;
}

/// A machine that Firecracker boots.
fn unpacked(place: &mut Place) {
    std::fs::write(&place.machine.kernel, tiny::kernel_64()).unwrap();
    // It has no room for less, and no use for what is left of a former start.
    place.machine.memory_mib = 128;
}

#[cfg(target_arch = "x86_64")]
mod firecracker {
    use super::*;

    const BOOTING: &str = "fake guest 0123456789ab booting";

    fn driver(program: impl Into<PathBuf>) -> FirecrackerDriver {
        FirecrackerDriver::new(Arc::new(HostRunner), Some(program.into())).whatever_the_cpu()
    }

    fn fake() -> FirecrackerDriver {
        driver(env!("CARGO_BIN_EXE_vm-fake-vmm"))
    }

    /// Wherever `/dev/kvm` opens: guests as small as this one run also where Linux would not.
    pub(super) fn real() -> Option<FirecrackerDriver> {
        let program = std::env::var_os("VM_FIRECRACKER").map(driver);
        if program.is_none() {
            eprintln!("not run: VM_FIRECRACKER names no firecracker");
        }
        program
    }

    pub(super) async fn holds(vmm: FirecrackerDriver, greeting: &'static str, jailer: Option<PathBuf>) {
        let mut place = place();
        unpacked(&mut place);
        let Place { _dir, paths, machine } = place;
        let vmm = if jailer.is_some() { vmm.jailed(jailing()) } else { vmm };
        contract::everything(&Subject { vmm: &vmm, machine, paths, greeting, jailer }).await;
    }

    #[tokio::test]
    async fn a_fake_keeps_the_contract() {
        holds(fake(), BOOTING, None).await;
    }

    #[tokio::test]
    async fn a_fake_keeps_the_contract_in_a_jail() {
        if let Some(jailer) = jailer() {
            holds(fake(), BOOTING, Some(jailer)).await;
        }
    }

    #[tokio::test]
    async fn a_fake_is_its_shims_alone() {
        if let Some(jailer) = jailer() {
            is_its_shims(fake(), &jailer, BOOTING).await;
        }
    }

    #[tokio::test]
    async fn is_its_shims_alone() {
        if let (Some(real), Some(jailer)) = (real(), jailer()) {
            is_its_shims(real, &jailer, tiny::GREETING).await;
        }
    }

    /// A loop device, where the host has them.
    struct Loop(String);

    impl Loop {
        fn of(file: &Path) -> Option<Self> {
            let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
            let name = String::from_utf8(made.stdout).ok()?.trim().to_owned();
            (made.status.success() && !name.is_empty()).then_some(Self(name))
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
        }
    }

    /// Under a real shim it starts with a block device, is paused and let go on, tells what it counts, leaves nothing when it is killed, and dies
    /// with its shim.
    async fn is_its_shims(vmm: FirecrackerDriver, jailer: &Path, greeting: &'static str) {
        let mut place = place();
        unpacked(&mut place);
        let Place { _dir, paths, mut machine } = place;
        let file = paths.state.join("device");
        std::fs::write(&file, vec![0; 1 << 20]).unwrap();
        let device = Loop::of(&file);
        match &device {
            Some(Loop(name)) => machine.drives[0].path = name.into(),
            None => eprintln!("without a block device: this host makes no loop device"),
        }
        let vmm = vmm.jailed(jailing());
        let plan = vmm.plan(&machine, &paths).await.unwrap();
        let subject = Subject { vmm: &vmm, machine, paths, greeting, jailer: Some(jailer.to_owned()) };
        let paths = &subject.paths;
        let start = async || {
            let spec = subject.specification(&plan);
            vm_host::files::write_json(&paths.shim_spec(), 0o600, &spec).unwrap();
            let started = vm_shim::launch(jailer, &paths.shim_spec(), &paths.run, PATIENCE).await.unwrap();
            let greeted = || {
                let console = vm_shim::console_tail(paths, 10_000).unwrap();
                String::from_utf8_lossy(&console).contains(greeting).then_some(())
            };
            until("the guest's greeting", greeted).await;
            started
        };

        let started = start().await;
        let counted = async {
            while vm_shim::status(paths).await.unwrap().vmm_metrics.is_none() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, counted).await.expect("it tells what it counts in time");
        let pause = vmm.require_pause().unwrap();
        pause.pause(paths).await.unwrap();
        assert!(pause.is_paused(paths).await.unwrap());
        pause.resume(paths).await.unwrap();
        assert!(!pause.is_paused(paths).await.unwrap());
        vm_shim::kill(paths).await.unwrap();
        gone(&[started.vmm, started.shim]).await;
        let left = std::fs::read_dir(&paths.run).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(left.collect::<Vec<_>>(), ["shim.json"]);

        let started = start().await;
        let shim = PidFd::open(started.shim).unwrap().unwrap();
        shim.kill(Signal::SIGKILL).unwrap();
        gone(&[started.vmm, started.shim]).await;
        // What it could not take away is in nobody's way.
        let started = start().await;
        vm_shim::kill(paths).await.unwrap();
        gone(&[started.vmm, started.shim]).await;
    }
}

#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn firecracker_keeps_the_contract() {
    if let Some(real) = firecracker::real() {
        firecracker::holds(real, tiny::GREETING, None).await;
    }
}

#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn firecracker_keeps_the_contract_in_a_jail() {
    if let (Some(real), Some(jailer)) = (firecracker::real(), jailer()) {
        firecracker::holds(real, tiny::GREETING, Some(jailer)).await;
    }
}

async fn gone(processes: &[ProcessRef]) {
    let gone = || processes.iter().all(|process| !alive(*process)).then_some(());
    until("the processes' end", gone).await;
}

async fn until<T>(what: &str, seen: impl Fn() -> Option<T>) -> T {
    let look = async {
        loop {
            if let Some(seen) = seen() {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, look).await.unwrap_or_else(|_| panic!("{what} is not to be seen"))
}

#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn qemu_keeps_the_contract() {
    let qemu = QemuDriver::new(Arc::new(HostRunner), None, Some(Accelerator::Tcg));
    holds(&qemu, tiny::GREETING).await;
}

#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn qemu_says_why_it_did_not_come_up() {
    let Place { _dir, paths, mut machine } = place();
    machine.drives[0].path = paths.state.join("no-such-disk");
    let qemu = QemuDriver::new(Arc::new(HostRunner), None, Some(Accelerator::Tcg));
    let plan = qemu.plan(&machine, &paths).await.unwrap();
    let output = tokio::process::Command::new(&plan.program).args(&plan.args).output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("no-such-disk"), "{stderr}");
}
