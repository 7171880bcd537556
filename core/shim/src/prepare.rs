//! Making the process independent of whoever started it, and making its child depend on it.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::Path,
    process::Stdio,
    time::Duration,
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::{
        prctl,
        signal::{SigHandler, SigSet, Signal, signal},
        stat::{Mode, umask},
    },
    unistd,
};
use tokio::process::{Child, Command};
use vm_types::{
    ProcessRef,
    shim::{Inherited, LaunchPlan, ShimFailed, ShimSpec},
    vm::ExitStatus,
};

use crate::{
    error::StartError,
    inherit,
    jail::{self, Report},
    own_dir,
};

/// Badness of the shim for the kernel's out-of-memory killer (proc_pid_oom_score_adj(5)): a few MiB of
/// memory are not worth losing a VM's console and exit status, and with them the VM.
const OOM_SCORE: &str = "-500";
/// How long a shim that is about to end may still hold the run directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Own session and process group, no inherited descriptors or signal settings, private files by default, no directory
/// held. To be called while the process has one thread and has opened nothing yet.
pub(crate) fn detach() -> Result<(), StartError> {
    let failed = |what| move |errno: nix::Error| StartError::Detach { what, source: errno.into() };
    close_inherited().map_err(|source| StartError::Detach { what: "close inherited files", source })?;
    reset_signals().map_err(failed("reset signals"))?;
    if let Err(errno) = unistd::setsid()
        // Someone who tries a shim in a terminal has made it a group leader already.
        && unistd::getpgrp() != unistd::getpid()
    {
        return Err(failed("start a session")(errno));
    }
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    unistd::chdir("/").map_err(failed("leave the working directory"))?;
    // Only for `ps` and `top`.
    let _ = prctl::set_name(c"vmd-shim");
    Ok(())
}

#[expect(unsafe_code, reason = "nix has no close_range")]
fn close_inherited() -> io::Result<()> {
    // SAFETY: closes descriptors that no object of this process owns: the caller has opened none, and 0 to 2 stay.
    let result = unsafe { nix::libc::syscall(nix::libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[expect(unsafe_code, reason = "signal dispositions are global state that nix cannot guard")]
fn reset_signals() -> nix::Result<()> {
    for number in Signal::iterator() {
        if !matches!(number, Signal::SIGKILL | Signal::SIGSTOP | Signal::SIGPIPE) {
            // SAFETY: the default disposition runs no code of ours, and no other thread exists that relied on another.
            unsafe { signal(number, SigHandler::SigDfl) }?;
        }
    }
    SigSet::empty().thread_set_mask()
}

/// Takes the run directory for this process alone, as long as the result lives.
pub(crate) async fn lock(run_dir: &Path) -> Result<Flock<File>, StartError> {
    let failed = |source| StartError::Lock { path: run_dir.to_owned(), source };
    let mut directory = File::open(run_dir).map_err(failed)?;
    let give_up = tokio::time::Instant::now() + LOCK_PATIENCE;
    loop {
        directory = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((directory, nix::Error::EWOULDBLOCK)) => directory,
            Err((_, errno)) => return Err(failed(errno.into())),
        };
        if tokio::time::Instant::now() > give_up {
            return Err(StartError::AlreadyRuns { path: run_dir.to_owned() });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Starts the VMM so that the kernel kills it when this thread ends. To be called on the main thread, which ends last.
pub(crate) fn spawn(spec_path: &Path, launch: &LaunchPlan) -> Result<(Child, ProcessRef), StartError> {
    let failed = |source| StartError::Spawn { program: launch.program.clone(), source };
    let mut inherited = inherit::open(&launch.inherited)?;
    let mut report = None;
    let mut command = match &launch.jail {
        None => {
            let mut command = Command::new(&launch.program);
            command.args(&launch.args);
            command
        }
        Some(_) => {
            let (end, other) = Report::new().map_err(failed)?;
            report = Some(end);
            inherited.push(other);
            // This very program, also where another has been installed in its place.
            let mut command = Command::new("/proc/self/exe");
            command.arg("jail").arg("--spec").arg(spec_path);
            command
        }
    };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    die_with_parent(&mut command, inherited);
    let child = command.spawn().map_err(failed)?;
    // With it go this process's own ends of what the VMM has inherited.
    drop(command);
    let pid = child.id().unwrap_or_default();
    // It is our child and not reaped, so it has a start time even if it has ended already.
    let vmm = vm_host::process::identify_unreaped(pid)
        .ok_or_else(|| failed(io::Error::new(io::ErrorKind::NotFound, "no such process in /proc")))?;
    if let Some(ShimFailed { error, hint }) = report.map(Report::wait).transpose().map_err(failed)?.flatten()
    {
        return Err(StartError::Jail { said: error, hint });
    }
    tune_oom(pid);
    Ok((child, vmm))
}

#[expect(
    unsafe_code,
    reason = "only between fork and exec can a process ask to die with its parent, and keep descriptors"
)]
fn die_with_parent(command: &mut Command, inherited: Vec<OwnedFd>) {
    let shim = unistd::getpid();
    let ask = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The request concerns only a parent that ends from now on; one that has ended shows as another parent.
        if unistd::getppid() != shim {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        inherit::pass_on(&inherited)
    };
    // SAFETY: the closure makes a few system calls and allocates nothing, so it is fit for a forked child.
    unsafe { command.pre_exec(ask) };
}

/// Takes away what was in the run directory for the VMM alone.
pub(crate) fn tidy(spec: &ShimSpec) {
    for inherited in &spec.launch.inherited {
        if let Inherited::Listener { path } = inherited {
            let _ = fs::remove_file(path);
        }
    }
    if let Some(own) = &spec.launch.own_dir {
        let _ = own_dir::remove(own);
    }
    if let Some(jail) = &spec.launch.jail {
        // The next VM with this user is not to have what another VM has by then.
        jail::take_back(&jail.taps);
        let _ = fs::remove_dir(jail::root(&spec.run_dir));
    }
}

/// Protects the shim and not the VMM, which inherited the daemon's value. Lowering needs a privilege; without it
/// everything works as before.
fn tune_oom(vmm: u32) {
    let inherited = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    if inherited.trim().parse::<i32>().is_ok_and(|score| score < 0) {
        let _ = fs::write(format!("/proc/{vmm}/oom_score_adj"), "0");
    }
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
}

/// Lets go of whoever reads our stdout and stderr.
pub(crate) fn close_standard_streams() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    unistd::dup2_stdin(null.as_fd())?;
    unistd::dup2_stdout(null.as_fd())?;
    unistd::dup2_stderr(null.as_fd())?;
    Ok(())
}

/// How a process ended, in our words.
pub(crate) fn exit_status(status: std::process::ExitStatus) -> ExitStatus {
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitStatus::Code(code),
        (None, Some(signal)) => ExitStatus::Signal(signal),
        (None, None) => ExitStatus::Unknown,
    }
}
