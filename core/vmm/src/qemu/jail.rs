//! What QEMU sees in its jail beside the machine's files: its own libraries and firmware, and devices.

use std::path::Path;

use vm_types::{
    machine::MachineSpec,
    shim::{Jail, JailAccess, JailFile},
};

use crate::{
    Accelerator,
    jail::{self, Jailing},
};

/// Where QEMU's firmware is, below `share`; links lead from the first to the others.
const FIRMWARE: [&str; 3] = ["qemu", "seabios", "ipxe"];
/// What QEMU takes beyond the guest's memory, in MiB, at most: its own, devices' buffers, threads' stacks. Measured with the
/// guest idle: 40 under TCG.
const OVERHEAD: u64 = 256;
/// What software emulation takes for translated code, in MiB, at most (QEMU's own limit; accel/tcg/region.c).
const TRANSLATED: u64 = 1024;

pub(super) fn jail(
    jailing: &Jailing,
    program: &Path,
    machine: &MachineSpec,
    accelerator: Accelerator,
) -> Jail {
    let mut files = jail::system(program, &FIRMWARE, &["qemu"]);
    let mut add = |path: &str| files.push(JailFile { path: path.into(), access: JailAccess::Device });
    let mut overhead = OVERHEAD;
    match accelerator {
        Accelerator::Kvm => add("/dev/kvm"),
        Accelerator::Tcg => overhead += TRANSLATED,
    }
    if machine.vsock_cid.is_some() {
        add("/dev/vhost-vsock");
    }
    jailing.jail(machine, files, overhead)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::tests::USERS;

    #[test]
    fn a_machines_files_are_its_users_and_what_vms_share_is_not() {
        let jailing = Jailing { users: USERS, required: false, obstacle: None };
        let machine: MachineSpec = serde_json::from_value(serde_json::json!({
            "vm": "000000000001", "cpus": 1, "memory_mib": 64, "kernel": "/k/vmlinuz",
            "initramfs": "/r/initramfs.cpio", "kernel_args": [], "nics": [],
            "drives": [
                {"serial": "x", "path": "/s/disk.raw", "read_only": false},
                {"serial": "y", "path": "/s/shared.img", "read_only": true},
            ],
        }))
        .unwrap();
        let jail = jail(&jailing, Path::new("/usr/bin/q"), &machine, Accelerator::Tcg);
        let access =
            |path: &str| jail.files.iter().find(|file| file.path == Path::new(path)).map(|file| file.access);
        assert_eq!(access("/s/disk.raw"), Some(JailAccess::Own));
        assert_eq!(access("/s/shared.img"), Some(JailAccess::Shared));
        assert_eq!(access("/k/vmlinuz"), Some(JailAccess::Shared));
        assert_eq!(access("/r/initramfs.cpio"), Some(JailAccess::Own));
        assert_eq!(access("/dev/kvm"), None);
        assert_eq!((jail.user, jail.shared_group, jail.host_network), (1002, 1000, false));
    }
}
