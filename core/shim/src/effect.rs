//! `Effect::Shim`: how the engine applies, observes and undoes a shim with its VMM.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::signal::Signal;
use tokio::time::{Instant, timeout, timeout_at};
use vm_host::process::{self, PidFd};
use vm_types::{Handle, Observed, ProcessRef, VmPaths};

use crate::{client, error::ShimError, identity::verify, jail};

/// How long a shim is given to end by itself after it was asked to, before it is killed: time for the console's rest and
/// the exit record.
const GENTLE: Duration = Duration::from_secs(5);
/// How long the answer of a shim is waited for that was found by its command line.
const LOOK: Duration = Duration::from_secs(2);
/// Pause between two looks at the process table.
const PAUSE: Duration = Duration::from_millis(20);

/// Starts a shim; see [`client::launch`].
///
/// # Errors
/// As [`client::launch`].
pub async fn apply(
    vmd_program: &Path,
    run_dir: &Path,
    spec: &Path,
    limit: Duration,
) -> Result<Handle, ShimError> {
    let started = client::launch(vmd_program, spec, run_dir, limit).await?;
    Ok(Handle::Processes { shim: started.shim, vmm: started.vmm, answered: false })
}

/// What there is of the shim of `run_dir`, known by its command line and so also where only its intent was journaled.
/// A shim that has no VMM yet, or none any longer, is present with [`Handle::None`].
pub async fn observe(run_dir: &Path) -> Observed {
    let found = client::find(run_dir);
    let Some(&shim) = found.first() else { return Observed::Absent };
    if let Ok(Ok(status)) = timeout(LOOK, client::status(&sockets(run_dir))).await
        // One that has ended meanwhile, or that somebody else plays, is not what was found.
        && status.shim == shim
        && matches!(verify(&sockets(run_dir), shim, status.vmm), Ok(true))
    {
        return Observed::Present(Handle::Processes { shim: status.shim, vmm: status.vmm, answered: false });
    }
    match children(shim).first() {
        Some(&vmm) => Observed::Present(Handle::Processes { shim, vmm, answered: false }),
        None if process::alive(shim) => Observed::Present(Handle::None),
        None => Observed::Absent,
    }
}

/// Ends the shim of `run_dir` and its VMM: asks it to, then kills both. Idempotent; returns when neither runs.
/// Each process is known by its start time and held by a pidfd, so no other is ever signalled. Taps that a jail was given, and that a
/// killed shim could not take back, are this process's user's again.
///
/// # Errors
/// No permission to signal, or a process that has not ended within `limit`.
pub async fn undo(run_dir: &Path, handle: &Handle, limit: Duration) -> Result<(), ShimError> {
    end(run_dir, handle, limit).await?;
    // One that cannot be read was not started from.
    let jail = client::spec(&sockets(run_dir)).ok().flatten().and_then(|spec| spec.launch.jail);
    let Some(jail) = jail.filter(|jail| !jail.taps.is_empty()) else { return Ok(()) };
    // It may wait for the kernel's network lock.
    let _ = tokio::task::spawn_blocking(move || jail::take_back(&jail.taps)).await;
    Ok(())
}

async fn end(run_dir: &Path, handle: &Handle, limit: Duration) -> Result<(), ShimError> {
    let deadline = Instant::now() + limit;
    let gentle = deadline.min(Instant::now() + GENTLE.min(limit / 2));
    let mut held: Vec<PidFd> = Vec::new();
    hold(&mut held, run_dir, handle)?;
    if held.is_empty() {
        return Ok(());
    }
    // Whatever keeps it from obeying is settled by force below.
    let asked = timeout_at(gentle, client::kill(&sockets(run_dir))).await;
    if matches!(asked, Ok(Ok(()))) {
        let _ = timeout_at(gentle, all_ended(&held)).await;
    }
    loop {
        hold(&mut held, run_dir, handle)?;
        if held.is_empty() {
            return Ok(());
        }
        for process in &held {
            process
                .kill(Signal::SIGKILL)
                .map_err(|source| ShimError::Signal { pid: process.process().pid, source })?;
        }
        // A shim caught between fork and exec of its VMM shows a new process only after it is gone: look again.
        let _ = timeout_at(deadline, all_ended(&held)).await;
        if let Some(survivor) = held.iter().find(|held| process::alive(held.process())) {
            return Err(ShimError::StillRunning { pid: survivor.process().pid, seconds: limit.as_secs() });
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Forgets processes that have ended and takes hold of all that belong to the run directory.
fn hold(held: &mut Vec<PidFd>, run_dir: &Path, handle: &Handle) -> Result<(), ShimError> {
    held.retain(|held| process::alive(held.process()));
    let mut wanted = client::find(run_dir);
    for shim in wanted.clone() {
        wanted.extend(children(shim));
    }
    if let Handle::Processes { shim, vmm, .. } = handle {
        wanted.extend([*shim, *vmm]);
    }
    for process in wanted {
        if held.iter().any(|held| held.process() == process) {
            continue;
        }
        let opened = PidFd::open(process).map_err(|source| ShimError::Signal { pid: process.pid, source })?;
        held.extend(opened);
    }
    Ok(())
}

async fn all_ended(held: &[PidFd]) {
    for process in held {
        let _ = process.ended().await;
    }
}

/// Children of a shim, which has one thread (proc_pid_task(5)). Read before the shim's identity is checked, so that they
/// are not those of a later process with its pid.
fn children(shim: ProcessRef) -> Vec<ProcessRef> {
    let path = format!("/proc/{pid}/task/{pid}/children", pid = shim.pid);
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let children: Vec<ProcessRef> =
        text.split_ascii_whitespace().filter_map(|pid| process::identify(pid.parse().ok()?)).collect();
    if process::alive(shim) { children } else { Vec::new() }
}

/// What is in the run directory is all that is used of these paths.
fn sockets(run_dir: &Path) -> VmPaths {
    VmPaths { run: run_dir.to_owned(), state: PathBuf::new() }
}
