//! What a VMM sees in its jail, whichever it is: its own program's libraries, the machine's files, the devices it needs.

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
    vm::VmmKind,
};

use crate::VmmError;

/// Debian's directory of libraries, below `lib`.
const TRIPLET: &str = if cfg!(target_arch = "aarch64") { "aarch64-linux-gnu" } else { "x86_64-linux-gnu" };
/// Page tables for the guest's memory, the host's and the processor's own, are charged too: one part of this many.
const PAGE_TABLES: u64 = 128;

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

/// What comes of that for one program.
#[derive(Debug)]
pub(crate) enum Locking<'a> {
    /// It is not to be locked in.
    Off,
    /// It cannot be, for this reason, and need not be.
    Impossible(String),
    /// It is.
    In(&'a Jailing),
}

impl<'a> Locking<'a> {
    /// What comes of it.
    ///
    /// # Errors
    /// [`VmmError::NoJail`] for one that has to be locked in and cannot be.
    pub(crate) fn of(jailing: Option<&'a Jailing>, vmm: VmmKind, program: &Path) -> Result<Self, VmmError> {
        let Some(jailing) = jailing else { return Ok(Self::Off) };
        match jailing.obstacle(program) {
            None => Ok(Self::In(jailing)),
            Some(reason) if jailing.required => Err(VmmError::NoJail { vmm, reason }),
            Some(reason) => Ok(Self::Impossible(reason)),
        }
    }

    /// How it is locked in, if it is.
    pub(crate) fn jailing(&self) -> Option<&'a Jailing> {
        match self {
            Self::In(jailing) => Some(jailing),
            Self::Off | Self::Impossible(_) => None,
        }
    }

    /// Why it is not, where it was to be.
    pub(crate) fn obstacle(self) -> Option<String> {
        match self {
            Self::Impossible(reason) => Some(reason),
            Self::Off | Self::In(_) => None,
        }
    }
}

impl Jailing {
    /// Why this program cannot be locked in.
    fn obstacle(&self, program: &Path) -> Option<String> {
        self.obstacle.clone().or_else(|| {
            let mut head = [0; 2];
            let script = fs::File::open(program).and_then(|mut file| file.read_exact(&mut head)).is_ok()
                && head == *b"#!";
            script.then(|| format!("{} is a script, and needs others of the host's files", program.display()))
        })
    }

    /// A jail for this machine, with these files of the VMM's besides the machine's own, whose VMM takes `overhead_mib` beside the
    /// guest's memory and its page tables.
    pub(crate) fn jail(&self, machine: &MachineSpec, mut files: Vec<JailFile>, overhead_mib: u64) -> Jail {
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
        for device in ["/dev/null", "/dev/urandom"] {
            add(Path::new(device), JailAccess::Device);
        }
        Jail {
            user: self.users.of(&machine.vm),
            shared_group: self.users.first,
            files,
            overhead_mib: overhead_mib + machine.memory_mib / PAGE_TABLES,
            cgroups: Vec::new(),
            host_network: false,
            taps: Vec::new(),
        }
    }
}

/// The host's files that a program needs: libraries from where distributions put them and from beside it, and what it has of these names in
/// directories `share` and `libexec`.
pub(crate) fn system(program: &Path, share: &[&str], libexec: &[&str]) -> Vec<JailFile> {
    let real = fs::canonicalize(program).unwrap_or_else(|_| program.to_owned());
    let prefix = real.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let mut paths: Vec<PathBuf> = Vec::new();
    for base in [Path::new("/"), Path::new("/usr"), prefix] {
        for library in ["lib", "lib64"].map(|name| base.join(name)) {
            let own = library.join(TRIPLET);
            // A link is shown as such, and what it leads to for itself.
            paths.push(if !library.is_symlink() && own.is_dir() { own } else { library });
        }
        paths.extend(libexec.iter().map(|name| base.join("libexec").join(name)));
    }
    for base in [Path::new("/usr"), prefix] {
        paths.extend(share.iter().map(|name| base.join("share").join(name)));
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

/// Whether a program is complete: an ELF-64 file that names no dynamic loader (System V ABI, chapter 5). What cannot be understood is not.
pub(crate) fn is_static(program: &Path) -> bool {
    const INTERPRETER: u32 = 3;
    /// Nothing that is run has nearly as much before its program headers' end.
    const HEAD: u64 = 64 * 1024;
    let mut head = Vec::new();
    if fs::File::open(program).and_then(|file| file.take(HEAD).read_to_end(&mut head)).is_err()
        || !head.starts_with(b"\x7fELF\x02\x01")
    {
        return false;
    }
    let half = |at: usize| head.get(at..at + 2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let word = |at: usize| head.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    // Of the headers' place only the lower half: it is within HEAD, or there is no header there.
    let (Some(place), Some(size), Some(count)) = (word(0x20), half(0x36), half(0x38)) else { return false };
    (0..count).all(|number| word(place as usize + number * size).is_some_and(|kind| kind != INTERPRETER))
        && count > 0
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const USERS: JailUsers = JailUsers { first: 1000, last: 1003 };

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
        let shown = system(Path::new("/usr/bin/qemu-system-x86_64"), &["qemu"], &["qemu"]);
        for secret in
            ["/etc", "/etc/passwd", "/root", "/home", "/proc", "/sys", "/dev", "/run", "/var", "/usr"]
        {
            let secret = Path::new(secret);
            assert!(!shown.iter().any(|file| secret.starts_with(&file.path)), "{secret:?} in {shown:?}");
        }
        assert!(shown.iter().any(|file| file.path.starts_with("/usr/lib")), "{shown:?}");
    }

    #[test]
    fn what_cannot_be_locked_in_is_told_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("qemu");
        fs::write(&program, "#!/bin/sh\n").unwrap();
        let mut jailing = Jailing { users: USERS, required: false, obstacle: None };
        let told = Locking::of(Some(&jailing), VmmKind::Qemu, &program).unwrap();
        assert!(told.jailing().is_none() && told.obstacle().unwrap().contains("script"));
        jailing.required = true;
        let error = Locking::of(Some(&jailing), VmmKind::Qemu, &program).unwrap_err();
        assert!(matches!(error, VmmError::NoJail { .. }) && error.hint().is_some(), "{error}");
        fs::write(&program, "\x7fELF").unwrap();
        let locked = Locking::of(Some(&jailing), VmmKind::Qemu, &program).unwrap();
        assert!(locked.jailing().is_some() && locked.obstacle().is_none());
        jailing.obstacle = Some("no namespaces".to_owned());
        Locking::of(Some(&jailing), VmmKind::Qemu, &program).unwrap_err();
        assert!(matches!(Locking::of(None, VmmKind::Qemu, &program), Ok(Locking::Off)));
    }

    #[test]
    fn a_program_is_complete_only_if_it_says_so() {
        assert!(!is_static(&std::env::current_exe().unwrap()), "tests are linked dynamically");
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("p");
        fs::write(&program, "#!/bin/sh\n").unwrap();
        assert!(!is_static(&program));
        #[cfg(feature = "contract")]
        {
            fs::write(&program, crate::contract::tiny::kernel_64()).unwrap();
            assert!(is_static(&program));
        }
    }
}
