//! The contract, against the fakes and against QEMU and, where `VM_FIRECRACKER` names it, Firecracker themselves.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::PathBuf, sync::Arc};

use vm_host::HostRunner;
use vm_types::{VmPaths, machine::MachineSpec};
use vm_vmm::{
    Accelerator, FakeDriver, FirecrackerDriver, QemuDriver, Vmm,
    contract::{self, Subject, tiny},
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
    contract::everything(&Subject { vmm, machine, paths, greeting }).await;
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
#[tokio::test]
async fn the_fake_as_firecracker_keeps_the_contract() {
    let fake = Some(env!("CARGO_BIN_EXE_vm-fake-vmm").into());
    let vmm = FirecrackerDriver::new(Arc::new(HostRunner), fake).whatever_the_cpu();
    let mut place = place();
    unpacked(&mut place);
    let Place { _dir, paths, machine } = place;
    contract::everything(&Subject { vmm: &vmm, machine, paths, greeting: "fake guest 0123456789ab booting" })
        .await;
}

/// Wherever `/dev/kvm` opens: guests as small as this one run also where Linux would not.
#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn firecracker_keeps_the_contract() {
    let Some(program) = std::env::var_os("VM_FIRECRACKER") else {
        return eprintln!("not run: VM_FIRECRACKER names no firecracker");
    };
    let vmm = FirecrackerDriver::new(Arc::new(HostRunner), Some(program.into())).whatever_the_cpu();
    let mut place = place();
    unpacked(&mut place);
    let Place { _dir, paths, machine } = place;
    contract::everything(&Subject { vmm: &vmm, machine, paths, greeting: tiny::GREETING }).await;
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
