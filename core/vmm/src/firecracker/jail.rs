//! What Firecracker sees in its jail beside the machine's files: a directory for its sockets, and devices.

use std::path::Path;

use vm_types::{
    machine::MachineSpec,
    shim::{Jail, JailAccess, JailFile, OwnDir},
};

use crate::jail::{self, Jailing};

/// What Firecracker takes beyond the guest's memory, in MiB, at most: code, threads' stacks, requests, virtio queues and the buffers of a
/// few devices. Measured with a guest that does nothing: 3, of which most is its program.
const OVERHEAD: u64 = 64;

/// What Firecracker reads of the host's processor on arm64, as its `jailer` has it, too.
const PROCESSOR: &[&str] = if cfg!(target_arch = "aarch64") {
    &["/sys/devices/system/cpu/cpu0/cache", "/sys/devices/system/cpu/cpu0/regs/identification/midr_el1"]
} else {
    &[]
};

pub(super) fn jail(jailing: &Jailing, program: &Path, machine: &MachineSpec, own: &OwnDir) -> Jail {
    // Its releases are linked statically, distributions' may not be.
    let mut files = if jail::is_static(program) { Vec::new() } else { jail::system(program, &[], &[]) };
    let mut add = |path: &Path, access| files.push(JailFile { path: path.to_owned(), access });
    for path in PROCESSOR.iter().map(Path::new).filter(|path| path.exists()) {
        add(path, JailAccess::System);
    }
    add(&own.path, JailAccess::Own);
    add(Path::new("/dev/kvm"), JailAccess::Device);
    if !machine.nics.is_empty() {
        add(Path::new("/dev/net/tun"), JailAccess::Device);
    }
    Jail {
        // It knows taps by their names, and so has to be where they are.
        host_network: !machine.nics.is_empty(),
        taps: machine.nics.iter().map(|nic| nic.tap.clone()).collect(),
        ..jailing.jail(machine, files, OVERHEAD)
    }
}
