//! Where a VMM is locked into: a process between the shim's fork and the VMM's exec.
//!
//! ```text
//!   shim ──fork, exec──> `jail` mode of the same program ──exec──> VMM          one process, one pid
//!                          control groups, namespaces
//!                          root: a tmpfs with what `Jail::files` names, and nothing else
//!                          user, no capabilities, no_new_privs, PDEATHSIG once more
//! ```
//!
//! A mode of its own, since hardly any of this may be done by a process that has forked and not yet run a program. What fails is
//! told on a pipe that the exec closes ([`Report`]). The network namespace is empty where taps come as open descriptors; a VMM that
//! attaches to its taps itself stays in the host's, and its user owns them. The pid namespace is the host's, because a process cannot
//! leave its own.
//!
//! Firecracker's own `jailer` is not used: it becomes another user without asking again to die with its parent, so that a
//! killed shim would leave a Firecracker behind, and it makes control groups, directories and nodes that no journal knows of. What it
//! does beside that, this does for every VMM.

use std::{
    convert::Infallible,
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{MetadataExt, PermissionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use nix::{
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::Signal,
        stat::{Mode, SFlag, mknod},
    },
    unistd::{self, Gid, Pid, Uid},
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use vm_host::tap::Tap;
use vm_types::shim::{FIRST_INHERITED, Jail, JailAccess, JailFile, ShimFailed, ShimSpec};

use crate::inherit;

/// The descriptor on which a jail tells its shim that it cannot be.
pub(crate) const REPORT: i32 = FIRST_INHERITED - 1;
/// Room for the root's directories and device nodes.
const ROOT_OPTIONS: &str = "mode=0755,size=1M,nr_inodes=4096";
/// The namespaces of its own, beside that of the network. Not the one of pids, which only a child would be in.
const NAMESPACES: CloneFlags =
    CloneFlags::CLONE_NEWNS.union(CloneFlags::CLONE_NEWIPC).union(CloneFlags::CLONE_NEWUTS);

/// How long a VMM that was killed may hold a tap, and how often it is asked for.
const RELEASE: Duration = Duration::from_secs(2);
const RELEASE_RETRY: Duration = Duration::from_millis(5);

/// Why there is no jail.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The specification could not be read.
    #[error("could not read {}", path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It has no jail in it.
    #[error("{} describes no jail", path.display())]
    NoJail {
        /// The file.
        path: PathBuf,
    },
    /// A step failed.
    #[error("could not {what}")]
    Step {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A tap could not be given to the jail's user.
    #[error("could not give the tap {name} to the VM's user")]
    Tap {
        /// The device.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A step with a file failed.
    #[error("could not {what} {}", path.display())]
    Place {
        /// Which.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl JailError {
    /// How to mend it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Spec { .. } | Self::NoJail { .. } => {
                Some("vmd writes this file before it starts a shim; start the VM with `vm start`".into())
            }
            Self::Step { .. } => Some(
                "run vmd as root with all capabilities, or set vmm.jail to \"off\"; see `vm doctor`".into(),
            ),
            Self::Tap { .. } => {
                Some("stop and start the VM, which makes its tap anew; see `vm doctor`".into())
            }
            Self::Place { .. } => {
                Some("see `vm doctor`; without a jail (vmm.jail = \"off\") the VMM sees all files".into())
            }
        }
    }
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError::Step { what, source: error.into() }
}

fn place<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> JailError {
    move |error| JailError::Place { what, path: path.to_owned(), source: error.into() }
}

/// The `jail` mode: becomes the VMM of a specification. To be called on the main thread of a process with no other.
pub fn main(spec: &Path) -> ExitCode {
    // Taken first: the exec is to close it.
    let report = report();
    let Err(error) = become_vmm(spec);
    let failed = ShimFailed { error: vm_types::report::chain(&error), hint: error.hint() };
    match report.map(|mut report| report.write_all(&serde_json::to_vec(&failed)?)) {
        Some(Ok(())) => {}
        // Somebody tries it by hand, or there is nobody left to tell.
        _ => eprintln!("vmd: {}", failed.error),
    }
    ExitCode::FAILURE
}

#[expect(unsafe_code, reason = "an inherited descriptor is known by its number alone")]
fn report() -> Option<fs::File> {
    use std::os::fd::FromRawFd;
    if !Path::new(&format!("/proc/self/fd/{REPORT}")).exists() {
        return None;
    }
    // SAFETY: it is open, and nothing in this process, which has just begun, owns it.
    let report = unsafe { fs::File::from_raw_fd(REPORT) };
    rustix::io::fcntl_setfd(&report, rustix::io::FdFlags::CLOEXEC).ok()?;
    Some(report)
}

/// The shim's end of [`REPORT`].
pub(crate) struct Report(io::PipeReader);

impl Report {
    /// A pipe, with its other end to be inherited as [`REPORT`].
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        let (reader, writer) = io::pipe()?;
        Ok((Self(reader), inherit::at(REPORT, writer.as_fd())?))
    }

    /// Waits until the jail has become the VMM, or has said why it cannot. Blocks, for as long as a few system calls take; the
    /// write end must be closed here.
    pub(crate) fn wait(mut self) -> io::Result<Option<ShimFailed>> {
        let mut said = Vec::new();
        self.0.read_to_end(&mut said)?;
        if said.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_slice(&said)?)) }
    }
}

/// Tries on this host all that a jail needs, in this process, which is good for nothing afterwards.
///
/// # Errors
/// The first step that the host does not allow.
pub fn try_out(user: u32) -> Result<(), JailError> {
    let root = Path::new("/sys");
    leave_namespaces(false)?;
    mount_root(root)?;
    let device = Path::new("/dev/null");
    make_node(device, &root.join("null"), user)?;
    give_up_privileges(user, &[])?;
    fs::File::open(root.join("null")).map(drop).map_err(place("open a node of", device))
}

fn become_vmm(spec_path: &Path) -> Result<Infallible, JailError> {
    let shim = unistd::getppid();
    let read = vm_host::files::read_json(spec_path);
    let spec: Option<ShimSpec> = read.map_err(place_spec(spec_path))?;
    let Some((spec, jail)) = spec.and_then(|spec| spec.launch.jail.clone().map(|jail| (spec, jail))) else {
        return Err(JailError::NoJail { path: spec_path.to_owned() });
    };
    for group in &jail.cgroups {
        let processes = group.join("cgroup.procs");
        // 0 is whoever writes it.
        fs::write(&processes, "0").map_err(place("join the control group", group))?;
    }
    for tap in &jail.taps {
        give_tap(tap, jail.user).map_err(|source| JailError::Tap { name: tap.clone(), source })?;
    }
    leave_namespaces(jail.host_network)?;
    build_root(&spec, &jail)?;
    let shared = jail.files.iter().find(|file| file.access == JailAccess::Shared);
    let groups: Vec<_> = shared.map(|_| jail.shared_group).into_iter().collect();
    give_up_privileges(jail.user, &groups)?;
    die_with(shim)?;
    let program = &spec.launch.program;
    let error = Command::new(program).args(&spec.launch.args).env_clear().exec();
    Err(JailError::Place { what: "run the VMM", path: program.clone(), source: error })
}

fn place_spec(path: &Path) -> impl FnOnce(io::Error) -> JailError {
    move |source| JailError::Spec { path: path.to_owned(), source }
}

/// The taps are again this process's own user's, as far as they are there. Blocks while a VMM that was killed still holds one, for a
/// while: it gives its memory back first.
pub(crate) fn take_back(taps: &[String]) {
    for tap in taps {
        let deadline = Instant::now() + RELEASE;
        while let Err(error) = give_tap(tap, Uid::effective().as_raw()) {
            if error.raw_os_error() != Some(libc::EBUSY) || Instant::now() > deadline {
                break;
            }
            std::thread::sleep(RELEASE_RETRY);
        }
    }
}

/// From then on only this user, or one who may configure the network, attaches to it. What it was set to before is of no matter, and what
/// it is set to now not to the next jail.
fn give_tap(name: &str, user: u32) -> io::Result<()> {
    Tap::attach(name)?.give_to(user)
}

fn leave_namespaces(host_network: bool) -> Result<(), JailError> {
    let namespaces = match host_network {
        true => NAMESPACES,
        false => NAMESPACES | CloneFlags::CLONE_NEWNET,
    };
    unshare(namespaces).map_err(step("leave the host's namespaces"))?;
    // What is mounted from here on is nobody else's.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(step("make mounts private"))
}

fn mount_root(at: &Path) -> Result<(), JailError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("vmd-jail"), at, Some("tmpfs"), flags, Some(ROOT_OPTIONS))
        .map_err(place("mount the jail's root on", at))
}

/// Where a jail's root is put together. Empty for everybody else.
pub(crate) fn root(run_dir: &Path) -> PathBuf {
    run_dir.join("jail")
}

/// Puts the root together and enters it.
fn build_root(spec: &ShimSpec, jail: &Jail) -> Result<(), JailError> {
    let root = root(&spec.run_dir);
    match fs::create_dir(&root) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(place("create", &root)(error));
        }
        _ => {}
    }
    mount_root(&root)?;
    let program = JailFile { path: spec.launch.program.clone(), access: JailAccess::System };
    for file in jail.files.iter().chain([&program]) {
        show(file, &root, jail)?;
    }
    unistd::chdir(&root).map_err(place("enter", &root))?;
    // The old root comes to lie on top of the new one (pivot_root(2)), and is taken off.
    unistd::pivot_root(".", ".").map_err(step("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("take the host's root away"))?;
    unistd::chdir("/").map_err(step("enter the new root"))?;
    let fixed =
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(None::<&str>, "/", None::<&str>, fixed, None::<&str>).map_err(step("make the root read-only"))
}

/// Makes one file seen, at its own path.
fn show(file: &JailFile, root: &Path, jail: &Jail) -> Result<(), JailError> {
    let JailFile { path, access } = file;
    let inside = root.join(path.strip_prefix("/").unwrap_or(path));
    if let Some(above) = inside.parent() {
        // Modes are as the process's umask leaves them, and the jail's user has to get through.
        make_directories(above, root)?;
    }
    match access {
        JailAccess::Device => return make_node(path, &inside, jail.user),
        JailAccess::System => {}
        JailAccess::Shared => {
            let mode = fs::metadata(path).map_err(place("look at", path))?.mode() & 0o7777;
            if mode & 0o004 == 0 {
                std::os::unix::fs::chown(path, None, Some(jail.shared_group))
                    .map_err(place("share", path))?;
                fs::set_permissions(path, fs::Permissions::from_mode(mode | 0o040))
                    .map_err(place("share", path))?;
            }
        }
        JailAccess::Own => {
            std::os::unix::fs::chown(path, Some(jail.user), Some(jail.user))
                .map_err(place("hand over", path))?;
        }
    }
    let about = fs::symlink_metadata(path).map_err(place("look at", path))?;
    if about.is_symlink() && path.is_dir() {
        // /lib is a link to usr/lib on most hosts, and has to lead somewhere that is seen too.
        let to = fs::read_link(path).map_err(place("look at", path))?;
        return match std::os::unix::fs::symlink(to, &inside) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(place("show", path)(error)),
            _ => Ok(()),
        };
    }
    let mut fixed = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    match access {
        JailAccess::System => fixed |= MsFlags::MS_RDONLY,
        JailAccess::Shared => fixed |= MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC,
        _ => fixed |= MsFlags::MS_NOEXEC,
    }
    if path.is_dir() {
        make_directories(&inside, root)?;
    } else {
        // Never one that is there: it may be the file itself, shown already.
        match fs::File::options().write(true).create_new(true).open(&inside) {
            Ok(_) => {}
            // Below a directory of the system's that is shown.
            Err(error)
                if matches!(access, JailAccess::System) && error.kind() == io::ErrorKind::AlreadyExists =>
            {
                return Ok(());
            }
            Err(error) => return Err(place("show", path)(error)),
        }
    }
    mount(Some(path), &inside, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(place("show", path))?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | fixed;
    mount(None::<&str>, &inside, None::<&str>, flags, None::<&str>).map_err(place("restrict", path))
}

/// All of a path below the root that is not there yet.
fn make_directories(path: &Path, root: &Path) -> Result<(), JailError> {
    if path == root || path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent() {
        make_directories(above, root)?;
    }
    fs::create_dir(path).map_err(place("create", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(place("open up", path))
}

/// A node of the device that `device` is a node of.
fn make_node(device: &Path, node: &Path, user: u32) -> Result<(), JailError> {
    let about = fs::metadata(device).map_err(place("look at", device))?;
    let kind = SFlag::from_bits_truncate(about.mode()) & SFlag::S_IFMT;
    if !matches!(kind, SFlag::S_IFCHR | SFlag::S_IFBLK) {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "it is no device");
        return Err(place("make a node of", device)(source));
    }
    mknod(node, kind, Mode::S_IRUSR | Mode::S_IWUSR, about.rdev())
        .map_err(place("make a node of", device))?;
    std::os::unix::fs::chown(node, Some(user), Some(user)).map_err(place("hand over", device))
}

/// Becomes a user that can do nothing but what is its own.
fn give_up_privileges(user: u32, groups: &[u32]) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // This kernel has none of this number, nor of a higher one.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(step("give up capabilities")(error)),
        }
    }
    rustix::thread::clear_ambient_capability_set().map_err(step("give up capabilities"))?;
    let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
    unistd::setgroups(&groups).map_err(step("leave the daemon's groups"))?;
    unistd::setresgid(gid, gid, gid).map_err(step("become the VM's group"))?;
    unistd::setresuid(uid, uid, uid).map_err(step("become the VM's user"))?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).map_err(step("give up capabilities"))?;
    prctl::set_no_new_privs().map_err(step("refuse new privileges"))
}

/// Asks to die with the shim once more: becoming another user has withdrawn that (PR_SET_PDEATHSIG(2const)).
fn die_with(shim: Pid) -> Result<(), JailError> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("ask to die with the shim"))?;
    match unistd::getppid() == shim {
        true => Ok(()),
        false => Err(step("outlive the shim")(io::Error::from(io::ErrorKind::BrokenPipe))),
    }
}
