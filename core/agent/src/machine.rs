//! The end of a machine whose init is the agent, and what such an init owes its processes at the beginning.

use std::{ffi::CString, fs, path::Path, time::Duration};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        reboot::{RebootMode, reboot},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use vm_types::guest::{control::ShutdownKind, kernel_args};

use crate::{
    console,
    pid1::{reap, wait_until},
};

/// How long a filesystem may stay busy after all processes have ended: it may be growing.
const BUSY: Duration = Duration::from_secs(5);

/// The cgroup hierarchy, where no init of the image does it.
pub(crate) fn mount_cgroups() {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let _ = mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), flags, Some("nsdelegate"));
}

/// Ends all processes but `agent`, which has still to tell the host and holds nothing, then the machine.
pub(crate) fn take_down(kind: ShutdownKind, grace: Duration, agent: Option<Pid>) -> ! {
    let all = Pid::from_raw(-1);
    let _ = kill(all, Signal::SIGTERM);
    // A stopped process takes its SIGTERM only when it goes on.
    let _ = kill(all, Signal::SIGCONT);
    wait_until(grace, || {
        reap();
        others(agent).is_empty()
    });
    for pid in others(agent) {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        console::note(format_args!("killing process {pid} ({})", name.trim_end()));
    }
    wait_until(Duration::from_secs(2), || {
        let left = others(agent);
        for pid in &left {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        reap();
        left.is_empty()
    });
    swap_off();
    unmount_all();
    nix::unistd::sync();
    let mode = match kind {
        ShutdownKind::PowerOff if off_by_reset() => {
            console::powered_off();
            RebootMode::RB_AUTOBOOT
        }
        ShutdownKind::PowerOff => RebootMode::RB_POWER_OFF,
        ShutdownKind::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let _ = reboot(mode);
    console::error("the machine does not go down");
    loop {
        std::thread::park();
    }
}

/// Whether this machine cannot be switched off from inside, so that a reset has to do.
fn off_by_reset() -> bool {
    crate::cmdline::value(kernel_args::POWER_OFF).as_deref() == Some(kernel_args::POWER_OFF_BY_RESET)
}

/// User processes other than init, this one, its parent and `agent`.
fn others(agent: Option<Pid>) -> Vec<Pid> {
    let own = [1, std::process::id().cast_signed(), nix::unistd::getppid().as_raw()];
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if !own.contains(&pid)
            && agent.is_none_or(|agent| agent.as_raw() != pid)
            && fs::read(entry.path().join("stat")).is_ok_and(|stat| is_alive(&stat))
        {
            pids.push(Pid::from_raw(pid));
        }
    }
    pids
}

/// Whether proc_pid_stat(5) is of a user process that still holds anything. One that is exiting has no command line long
/// before it lets go of its files, so only the state tells.
fn is_alive(stat: &[u8]) -> bool {
    /// <linux/sched.h>
    const PF_KTHREAD: u64 = 0x0020_0000;
    // The name, in brackets, may hold anything.
    let Some(end) = stat.iter().rposition(|byte| *byte == b')') else { return false };
    let rest = String::from_utf8_lossy(&stat[end + 1..]);
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next().unwrap_or("X");
    let flags: u64 = fields.nth(5).and_then(|flags| flags.parse().ok()).unwrap_or(0);
    !matches!(state, "Z" | "X" | "x") && flags & PF_KTHREAD == 0
}

/// Swap files keep their filesystem busy.
fn swap_off() {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for line in swaps.lines().skip(1) {
        let Some(path) = line.split_ascii_whitespace().next() else { continue };
        let Ok(path) = CString::new(unescape(path)) else { continue };
        #[expect(unsafe_code, reason = "nix has no swapoff")]
        // SAFETY: swapoff reads the NUL-terminated path, which outlives the call.
        let result = unsafe { libc::swapoff(path.as_ptr()) };
        if let Err(error) = nix::errno::Errno::result(result) {
            console::error(format_args!("cannot switch off swap {}: {error}", path.to_string_lossy()));
        }
    }
}

/// Unmounts what can be, from the inside out, and makes the rest read-only, above all the root.
fn unmount_all() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for (target, fstype) in mounts.lines().rev().filter_map(parse_mount) {
        let kernel = matches!(
            fstype,
            "proc"
                | "sysfs"
                | "devtmpfs"
                | "devpts"
                | "cgroup2"
                | "cgroup"
                | "rootfs"
                | "tmpfs"
                | "ramfs"
                | "securityfs"
        );
        if kernel {
            continue;
        }
        let Ok(path) = CString::new(target) else { continue };
        if path.as_bytes() != b"/" && umount2(path.as_c_str(), MntFlags::UMOUNT_NOFOLLOW).is_ok() {
            continue;
        }
        let read_only = || {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, path.as_c_str(), None::<&str>, flags, None::<&str>)
        };
        // The kernel closes files of the dead, and frees deleted ones, a little behind their death.
        let mut result = Ok(());
        wait_until(BUSY, || {
            result = read_only();
            result != Err(nix::errno::Errno::EBUSY)
        });
        if let Err(error) = result {
            console::error(format_args!("cannot make {} read-only: {error}", path.to_string_lossy()));
        }
    }
}

/// Mount point and type of a line of proc_pid_mountinfo(5).
pub(crate) fn parse_mount(line: &str) -> Option<(Vec<u8>, &str)> {
    let (head, tail) = line.split_once(" - ")?;
    let target = head.split(' ').nth(4)?;
    Some((unescape(target), tail.split(' ').next()?))
}

/// Whether something is mounted at `path`.
pub(crate) fn is_mount_point(path: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().filter_map(parse_mount).any(|(target, _)| target == path.as_os_str().as_bytes())
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let Some((byte, rest)) = bytes.split_first() {
        if *byte == b'\\'
            && let Some(digits) = rest.get(..3)
            && let Some(value) =
                str::from_utf8(digits).ok().and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            out.push(value);
            bytes = &rest[3..];
        } else {
            out.push(*byte);
            bytes = rest;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exiting_are_alive_and_zombies_and_kernel_threads_are_not() {
        let own = fs::read("/proc/self/stat").unwrap();
        assert!(is_alive(&own));
        assert!(is_alive(b"7 (a) Z (b) D 1 7 7 0 -1 4194564 0"));
        assert!(!is_alive(b"7 (a) R) Z 1 7 7 0 -1 4194564 0"));
        assert!(!is_alive(b"2 (kthreadd) S 0 0 0 0 -1 2129984 0") && !is_alive(b""));
    }

    #[test]
    fn mount_lines_are_read_with_their_escapes() {
        let line = r"36 35 98:0 /mnt1 /mnt\040two rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(parse_mount(line), Some((b"/mnt two".to_vec(), "ext3")));
        assert_eq!(parse_mount("nonsense"), None);
    }
}
