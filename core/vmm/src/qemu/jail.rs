//! What QEMU sees in its jail: its own program with libraries and firmware, the machine's files and devices.

use std::{
    fs,
    io::Read,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use vm_types::{
    VmId,
    machine::MachineSpec,
    shim::{Jail, JailAccess, JailFile},
};

use crate::Accelerator;

/// Debian's directory of libraries, below `lib`.
const TRIPLET: &str = if cfg!(target_arch = "aarch64") { "aarch64-linux-gnu" } else { "x86_64-linux-gnu" };
/// Where QEMU's firmware is, below `share`; links lead from the first to the others.
const FIRMWARE: [&str; 3] = ["qemu", "seabios", "ipxe"];
/// What QEMU takes beyond the guest's memory, in MiB, at most: its own, devices' buffers, threads' stacks. Measured with the
/// guest idle: 40 under TCG.
const OVERHEAD: u64 = 256;
/// Page tables for the guest's memory, the host's and the processor's own, are charged too: one part of this many.
const PAGE_TABLES: u64 = 128;
/// What software emulation takes for translated code, in MiB, at most (QEMU's own limit; accel/tcg/region.c).
const TRANSLATED: u64 = 1024;

/// User ids for VMs: the first is the group of what VMs share, each other one may be a VM's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JailUsers {
    /// The first.
    pub first: u32,
    /// The last, above the first.
    pub last: u32,
}

impl JailUsers {
    /// A VM's: always the same, and hardly ever another's. Even then the two see different files.
    pub fn of(&self, vm: &VmId) -> u32 {
        let number = u64::from_str_radix(vm.as_str(), 16).unwrap_or_default();
        let count = u64::from(self.last.saturating_sub(self.first)).max(1);
        // Less than the count, which is below 2^32.
        self.first + 1 + (number % count) as u32
    }
}

/// Whether and how VMMs are locked in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Jailing {
    /// Users for VMs.
    pub users: JailUsers,
    /// Whether a VM that cannot be locked in is not started.
    pub required: bool,
    /// Why this host has no jails, where that is so.
    pub obstacle: Option<String>,
}

impl Jailing {
    /// Why this program cannot be locked in.
    pub(super) fn obstacle(&self, program: &Path) -> Option<String> {
        self.obstacle.clone().or_else(|| {
            let mut head = [0; 2];
            let script = fs::File::open(program).and_then(|mut file| file.read_exact(&mut head)).is_ok()
                && head == *b"#!";
            script.then(|| format!("{} is a script, and needs others of the host's files", program.display()))
        })
    }

    pub(super) fn jail(&self, program: &Path, machine: &MachineSpec, accelerator: Accelerator) -> Jail {
        let mut files = system(program);
        let mut add = |path: &Path, access| files.push(JailFile { path: path.to_owned(), access });
        add(&machine.kernel, JailAccess::Shared);
        add(&machine.initramfs, JailAccess::Own);
        for drive in &machine.drives {
            let device = fs::metadata(&drive.path).is_ok_and(|about| about.file_type().is_block_device());
            add(
                &drive.path,
                match (device, drive.read_only) {
                    (true, _) => JailAccess::Device,
                    (false, true) => JailAccess::Shared,
                    (false, false) => JailAccess::Own,
                },
            );
        }
        add(Path::new("/dev/null"), JailAccess::Device);
        add(Path::new("/dev/urandom"), JailAccess::Device);
        if accelerator == Accelerator::Kvm {
            add(Path::new("/dev/kvm"), JailAccess::Device);
        }
        if machine.vsock_cid.is_some() {
            add(Path::new("/dev/vhost-vsock"), JailAccess::Device);
        }
        Jail {
            user: self.users.of(&machine.vm),
            shared_group: self.users.first,
            files,
            overhead_mib: OVERHEAD
                + machine.memory_mib / PAGE_TABLES
                + if accelerator == Accelerator::Tcg { TRANSLATED } else { 0 },
            cgroups: Vec::new(),
        }
    }
}

/// The host's files that the program needs: libraries and firmware, from where distributions put them and from beside it.
fn system(program: &Path) -> Vec<JailFile> {
    let real = fs::canonicalize(program).unwrap_or_else(|_| program.to_owned());
    let prefix = real.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let mut paths: Vec<PathBuf> = Vec::new();
    for base in [Path::new("/"), Path::new("/usr"), prefix] {
        for library in ["lib", "lib64", "libexec/qemu"].map(|name| base.join(name)) {
            let own = library.join(TRIPLET);
            // A link is shown as such, and what it leads to for itself.
            paths.push(if !library.is_symlink() && own.is_dir() { own } else { library });
        }
    }
    for base in [Path::new("/usr"), prefix] {
        paths.extend(FIRMWARE.map(|name| base.join("share").join(name)));
    }
    paths.push("/etc/ld.so.cache".into());
    // Nix and Guix have each library in a directory of its own there.
    paths.extend(
        ["/nix/store", "/gnu/store"].map(PathBuf::from).into_iter().filter(|store| real.starts_with(store)),
    );
    paths.retain(|path| path.exists());
    paths.sort();
    paths.dedup();
    // What is below another is there already.
    let mut kept: Vec<PathBuf> = Vec::new();
    for path in paths {
        if !kept.iter().any(|kept| path.starts_with(kept)) {
            kept.push(path);
        }
    }
    kept.into_iter().map(|path| JailFile { path, access: JailAccess::System }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: JailUsers = JailUsers { first: 1000, last: 1003 };

    #[test]
    fn every_vm_has_a_user_in_the_range_and_never_the_shared_one() {
        let of = |id: &str| USERS.of(&id.parse().unwrap());
        assert_eq!(of("000000000000"), 1001);
        assert_eq!(of("000000000002"), 1003);
        assert_eq!(of("000000000003"), 1001);
        assert_eq!(of("ffffffffffff"), of("ffffffffffff"));
        let all = JailUsers { first: 1, last: u32::MAX };
        assert!(all.of(&"ffffffffffff".parse().unwrap()) > 1);
    }

    #[test]
    fn the_hosts_own_places_are_not_shown() {
        let shown = system(Path::new("/usr/bin/qemu-system-x86_64"));
        for secret in
            ["/etc", "/etc/passwd", "/root", "/home", "/proc", "/sys", "/dev", "/run", "/var", "/usr"]
        {
            let secret = Path::new(secret);
            assert!(!shown.iter().any(|file| secret.starts_with(&file.path)), "{secret:?} in {shown:?}");
        }
        assert!(shown.iter().any(|file| file.path.starts_with("/usr/lib")), "{shown:?}");
    }

    #[test]
    fn a_machines_files_are_its_users_and_what_vms_share_is_not() {
        let jailing = Jailing { users: USERS, required: false, obstacle: None };
        let drive = |path: &str, read_only| vm_types::machine::Drive {
            serial: "x".to_owned(),
            path: path.into(),
            read_only,
            limits: Default::default(),
        };
        let machine = MachineSpec {
            vm: "000000000001".parse().unwrap(),
            cpus: 1,
            memory_mib: 64,
            kernel: "/k/vmlinuz".into(),
            initramfs: "/r/initramfs.cpio".into(),
            kernel_args: Vec::new(),
            drives: vec![drive("/s/disk.raw", false), drive("/s/shared.img", true)],
            nics: Vec::new(),
            vsock_cid: None,
        };
        let jail = jailing.jail(Path::new("/usr/bin/q"), &machine, Accelerator::Tcg);
        let access =
            |path: &str| jail.files.iter().find(|file| file.path == Path::new(path)).map(|file| file.access);
        assert_eq!(access("/s/disk.raw"), Some(JailAccess::Own));
        assert_eq!(access("/s/shared.img"), Some(JailAccess::Shared));
        assert_eq!(access("/k/vmlinuz"), Some(JailAccess::Shared));
        assert_eq!(access("/r/initramfs.cpio"), Some(JailAccess::Own));
        assert_eq!(access("/dev/kvm"), None);
        assert_eq!((jail.user, jail.shared_group), (1002, 1000));
    }

    #[test]
    fn a_script_is_not_locked_in() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("qemu");
        fs::write(&program, "#!/bin/sh\n").unwrap();
        let jailing = Jailing { users: USERS, required: false, obstacle: None };
        assert!(jailing.obstacle(&program).unwrap().contains("script"));
        fs::write(&program, "\x7fELF").unwrap();
        assert_eq!(jailing.obstacle(&program), None);
    }
}
