//! Processes identified by pid and start time, held by pidfd.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use nix::sys::signal::Signal;
use tokio::io::{Interest, unix::AsyncFd};
use vm_types::ProcessRef;

/// Identifies the process that has `pid` now; `None` where there is none or only a zombie.
pub fn identify(pid: u32) -> Option<ProcessRef> {
    let (state, start_ticks) = stat(pid)?;
    (state != 'Z' && state != 'X').then_some(ProcessRef { pid, start_ticks })
}

/// Identifies a child that its parent has not reaped: even if it has ended, its pid is still its own.
pub fn identify_unreaped(pid: u32) -> Option<ProcessRef> {
    stat(pid).map(|(_, start_ticks)| ProcessRef { pid, start_ticks })
}

/// Whether this very process still runs.
pub fn alive(process: ProcessRef) -> bool {
    identify(process.pid) == Some(process)
}

/// State letter and start time of `/proc/PID/stat` (proc(5), fields 3 and 22). The command name may hold anything,
/// so fields are counted from its last closing parenthesis.
fn stat(pid: u32) -> Option<(char, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The arguments of a process, empty where they cannot be read.
pub fn command_line(pid: u32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes
        .split(|&b| b == 0)
        .filter(|a| !a.is_empty())
        .map(|a| String::from_utf8_lossy(a).into_owned())
        .collect()
}

/// All processes of our own user whose arguments contain both of these, one right after the other. Others can give themselves
/// any arguments.
pub fn find_by_arguments(first: &str, second: &Path) -> Vec<ProcessRef> {
    use std::os::unix::fs::MetadataExt;
    let own = nix::unistd::geteuid().as_raw();
    let second = second.to_string_lossy();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.metadata().is_ok_and(|about| about.uid() == own))
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|&pid| command_line(pid).windows(2).any(|pair| pair[0] == first && pair[1] == second))
        .filter_map(identify)
        .collect()
}

/// The processes of our own user that have `first` among their arguments, with the argument after it.
pub fn values_of(first: &str) -> Vec<(ProcessRef, String)> {
    use std::os::unix::fs::MetadataExt;
    let own = nix::unistd::geteuid().as_raw();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok().map(|pid| (pid, entry)))
        .filter(|(_, entry)| entry.metadata().is_ok_and(|about| about.uid() == own))
        .filter_map(|(pid, _)| {
            let value = command_line(pid).windows(2).find(|pair| pair[0] == first)?[1].clone();
            Some((identify(pid)?, value))
        })
        .collect()
}

/// Identity of the host's current boot.
///
/// # Errors
/// `/proc` not being mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// A process held so that its pid cannot be reused under our hands (pidfd_open(2)).
#[derive(Debug)]
pub struct PidFd {
    fd: AsyncFd<OwnedFd>,
    process: ProcessRef,
}

impl PidFd {
    /// Takes hold of a process; `None` where it is gone or another one has its pid. Needs a tokio runtime with I/O.
    ///
    /// # Errors
    /// pidfd_open(2) failing for another reason than the process being gone.
    pub fn open(process: ProcessRef) -> io::Result<Option<Self>> {
        let Some(fd) = pidfd_open(process.pid)? else { return Ok(None) };
        // Only now that the pid is held can the start time be compared without a race.
        if !alive(process) {
            return Ok(None);
        }
        Ok(Some(Self { fd: watch(fd)?, process }))
    }

    /// Who is held.
    pub fn process(&self) -> ProcessRef {
        self.process
    }

    /// Ends when the process has ended. Cancel-safe.
    ///
    /// # Errors
    /// The runtime's I/O driver being gone.
    pub async fn ended(&self) -> io::Result<()> {
        self.fd.readable().await.map(|_| ())
    }

    /// Sends a signal; a process that has ended meanwhile is no error.
    ///
    /// # Errors
    /// No permission to.
    pub fn kill(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(self.fd.get_ref(), signal) {
            Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(()),
            other => other,
        }
    }
}

#[expect(unsafe_code, reason = "nix has no pidfd_open; the returned descriptor is new and ours alone")]
fn pidfd_open(pid: u32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let result = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid as nix::libc::pid_t, 0) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(nix::libc::ESRCH) { Ok(None) } else { Err(error) };
    }
    // SAFETY: a non-negative result is a fresh descriptor that nobody else owns.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(result as i32) }))
}

#[expect(unsafe_code, reason = "AsyncFd cannot know that its descriptor stays open and the same")]
fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd that nothing else refers to returns the same open descriptor until it is dropped.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(Into::into)
}

#[expect(unsafe_code, reason = "nix has no pidfd_send_signal")]
fn pidfd_send_signal(fd: &OwnedFd, signal: Signal) -> io::Result<()> {
    // SAFETY: a valid descriptor, integers, and the null pointer that pidfd_send_signal(2) allows for siginfo.
    let result = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            signal as i32,
            std::ptr::null::<nix::libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_held_process_is_seen_to_end() {
        let mut child = tokio::process::Command::new("sleep").arg("1000").kill_on_drop(true).spawn().unwrap();
        let process = identify(child.id().unwrap()).unwrap();
        let held = PidFd::open(process).unwrap().unwrap();
        assert!(alive(process));
        held.kill(Signal::SIGKILL).unwrap();
        held.ended().await.unwrap();
        child.wait().await.unwrap();
        assert!(!alive(process));
        assert!(PidFd::open(process).unwrap().is_none());
    }

    #[tokio::test]
    async fn another_start_time_is_another_process() {
        let me = identify(std::process::id()).unwrap();
        let former = ProcessRef { start_ticks: me.start_ticks + 1, ..me };
        assert!(PidFd::open(former).unwrap().is_none());
    }
}
