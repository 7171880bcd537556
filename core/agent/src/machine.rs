//! The end of a machine whose init is the agent, and what such an init owes its processes at the beginning.

use std::{collections::BTreeSet, ffi::CString, fs, os::unix::fs::MetadataExt, path::Path, time::Duration};

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

/// How long processes may take to go that got a SIGKILL.
const KILLED: Duration = Duration::from_secs(30);
/// The same where the machine goes down, which does not depend on it.
const KILLED_GOING_DOWN: Duration = Duration::from_secs(2);
/// How long a filesystem may stay busy after all processes have ended: it may be growing.
const BUSY: Duration = Duration::from_secs(5);

/// The cgroup hierarchy, where no init of the image does it.
pub(crate) fn mount_cgroups() {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let _ = mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), flags, Some("nsdelegate"));
}

/// Ends all processes but `agent`, which has still to tell the host and holds nothing, then the machine.
pub(crate) fn take_down(kind: ShutdownKind, grace: Duration, agent: Option<Pid>) -> ! {
    let living = || {
        reap();
        others(agent)
    };
    end(living, grace, KILLED_GOING_DOWN, |pid, signal| {
        if signal == Signal::SIGKILL {
            console::note(format_args!("killing process {pid} ({})", name_of(pid)));
        }
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

/// What processes were there before they were ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) count: u64,
    /// Of each name one.
    pub(crate) names: BTreeSet<String>,
}

/// Ends all processes beside an init that is the agent's own, from the agent, with `grace` between SIGTERM and SIGKILL. Blocks
/// until they are gone.
///
/// # Errors
/// Those that stay, by number and name: even SIGKILL waits for a device that does not answer.
pub(crate) fn end_processes(grace: Duration) -> Result<Ended, String> {
    let own = file_of("self");
    // What else is of the agent's program ends by itself, and is nothing that anybody has left behind.
    let is_own = |pid: &Pid| own.is_some() && file_of(&pid.to_string()) == own;
    let living = || others(None).into_iter().filter(|pid| !is_own(pid)).collect();
    let mut ended = Ended::default();
    let left = end(living, grace, KILLED, |pid, signal| {
        if signal == Signal::SIGTERM {
            ended.count += 1;
            ended.names.insert(name_of(pid));
        }
    });
    if left.is_empty() {
        return Ok(ended);
    }
    let left: Vec<_> = left.into_iter().map(|pid| format!("{pid} ({})", name_of(pid))).collect();
    Err(left.join(", "))
}

/// Which program a process runs, as device and inode.
fn file_of(pid: &str) -> Option<(u64, u64)> {
    let about = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    Some((about.dev(), about.ino()))
}

/// A process's own name, or nothing of one that is gone.
fn name_of(pid: Pid) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim_end().to_owned()
}

/// Ends what `living` lists, also what comes meanwhile: each gets one SIGTERM, and what is left after `grace` SIGKILL, for as long
/// as `force`. `before` is told of each before its first signal of either kind. Returns what is still there.
fn end(
    living: impl Fn() -> Vec<Pid>,
    grace: Duration,
    force: Duration,
    mut before: impl FnMut(Pid, Signal),
) -> Vec<Pid> {
    let mut asked = BTreeSet::new();
    let gone = wait_until(grace, || {
        let living = living();
        for pid in living.iter().filter(|pid| asked.insert(**pid)) {
            before(*pid, Signal::SIGTERM);
            let _ = kill(*pid, Signal::SIGTERM);
            // A stopped process takes its SIGTERM only when it goes on.
            let _ = kill(*pid, Signal::SIGCONT);
        }
        living.is_empty()
    });
    let (mut killed, mut left) = (BTreeSet::new(), Vec::new());
    if !gone {
        wait_until(force, || {
            left = living();
            for pid in &left {
                if killed.insert(*pid) {
                    before(*pid, Signal::SIGKILL);
                }
                let _ = kill(*pid, Signal::SIGKILL);
            }
            left.is_empty()
        });
    }
    left
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
/// before it lets go of its files, so only the state tells; and where the first thread has ended, the others may not have.
fn is_alive(stat: &[u8]) -> bool {
    /// <linux/sched.h>
    const PF_KTHREAD: u64 = 0x0020_0000;
    // The name, in brackets, may hold anything.
    let Some(end) = stat.iter().rposition(|byte| *byte == b')') else { return false };
    let rest = String::from_utf8_lossy(&stat[end + 1..]);
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next().unwrap_or("X");
    let flags: u64 = fields.nth(5).and_then(|flags| flags.parse().ok()).unwrap_or(0);
    let threads: u64 = fields.nth(10).and_then(|threads| threads.parse().ok()).unwrap_or(0);
    let ended = match state {
        "Z" => threads <= 1,
        state => matches!(state, "X" | "x"),
    };
    !ended && flags & PF_KTHREAD == 0
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
    use std::{
        io::Read,
        os::unix::process::{CommandExt, ExitStatusExt},
        process::{Child, Command, Stdio},
    };

    use nix::unistd::getpgid;

    use super::*;

    #[test]
    fn the_exiting_are_alive_and_zombies_and_kernel_threads_are_not() {
        let own = fs::read("/proc/self/stat").unwrap();
        assert!(is_alive(&own));
        assert!(is_alive(b"7 (a) Z (b) D 1 7 7 0 -1 4194564 0"));
        assert!(!is_alive(b"7 (a) R) Z 1 7 7 0 -1 4194564 0"));
        assert!(!is_alive(b"2 (kthreadd) S 0 0 0 0 -1 2129984 0") && !is_alive(b""));
        let threads = |number: u32| format!("7 (a) Z 1 7 7 0 -1 4194564 0 0 0 0 0 0 0 0 20 0 {number} 0 9");
        assert!(!is_alive(threads(1).as_bytes()) && is_alive(threads(2).as_bytes()));
    }

    /// Starts a shell in a process group of its own; back when it has said that it runs.
    fn start(script: &str) -> (Child, Pid) {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).process_group(0).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        (child, pid)
    }

    /// Of one group: nobody else's are ended here.
    fn living(group: Pid) -> Vec<Pid> {
        others(None).into_iter().filter(|pid| getpgid(Some(*pid)) == Ok(group)).collect()
    }

    #[test]
    fn what_forks_goes_gently_and_what_is_deaf_by_force() {
        let long = Duration::from_secs(60);
        let (mut forks, group) = start("trap 'exit 9' TERM; echo; while :; do sleep 0.01; done");
        kill(group, Signal::SIGSTOP).unwrap();
        let mut told = Vec::new();
        let left = end(|| living(group), long, long, |pid, signal| told.push((pid, name_of(pid), signal)));
        assert_eq!(left, []);
        assert_eq!(forks.wait().unwrap().code(), Some(9), "{told:?}");
        assert!(told.contains(&(group, "sh".to_owned(), Signal::SIGTERM)), "{told:?}");
        assert!(told.iter().all(|(.., signal)| *signal == Signal::SIGTERM), "{told:?}");

        let (mut deaf, group) = start("trap '' TERM; echo; while :; do sleep 0.01; done");
        let mut told = Vec::new();
        let left = end(|| living(group), Duration::ZERO, long, |pid, signal| told.push((pid, signal)));
        assert_eq!(left, []);
        assert_eq!(deaf.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            assert_eq!(told.iter().filter(|one| **one == (group, signal)).count(), 1, "{told:?}");
        }
        assert_eq!(end(|| living(group), long, long, |pid, _| panic!("{pid}")), []);
    }

    #[test]
    fn what_does_not_go_is_told() {
        let stays = Pid::from_raw(i32::MAX);
        let left = end(|| vec![stays], Duration::ZERO, Duration::ZERO, |_, _| ());
        assert_eq!(left, [stays]);
    }

    #[test]
    fn mount_lines_are_read_with_their_escapes() {
        let line = r"36 35 98:0 /mnt1 /mnt\040two rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(parse_mount(line), Some((b"/mnt two".to_vec(), "ext3")));
        assert_eq!(parse_mount("nonsense"), None);
    }
}
