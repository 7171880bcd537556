//! The image's own init: finding it, knowing when it has started, and asking it to shut down.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::sys::signal::Signal;
use tokio::process::Command;
use vm_types::guest::control::ShutdownKind;

/// As the kernel looks for it (init/main.c), then where systemd is without a link.
const CANDIDATES: [&str; 4] = ["/sbin/init", "/etc/init", "/bin/init", "/lib/systemd/systemd"];

/// The path of an executable init in the image at `root`, as seen from inside.
pub(crate) fn find(root: &Path) -> Option<PathBuf> {
    CANDIDATES
        .iter()
        .map(Path::new)
        .find(|path| resolve(root, path).is_some_and(|path| is_executable(&path)))
        .map(Into::into)
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Follows symbolic links as they would be with `root` as `/`; the result is the file's place outside.
pub(crate) fn resolve(root: &Path, path: &Path) -> Option<PathBuf> {
    follow(root, path, false)
}

/// As [`resolve`], for a path of which a tail may not exist yet. `None` if links lead in a circle.
pub(crate) fn place(root: &Path, path: &Path) -> Option<PathBuf> {
    follow(root, path, true)
}

fn follow(root: &Path, path: &Path, may_lack: bool) -> Option<PathBuf> {
    let mut left: Vec<_> = path.components().rev().map(|part| part.as_os_str().to_owned()).collect();
    let mut inside = PathBuf::new();
    let mut links = 0;
    while let Some(part) = left.pop() {
        match Path::new(&part).components().next()? {
            Component::ParentDir => {
                inside.pop();
            }
            Component::Normal(name) => {
                let next = root.join(&inside).join(name);
                let meta = match fs::symlink_metadata(&next) {
                    Ok(meta) => Some(meta),
                    Err(error) if may_lack && error.kind() == std::io::ErrorKind::NotFound => None,
                    Err(_) => return None,
                };
                if meta.is_some_and(|meta| meta.is_symlink()) {
                    links += 1;
                    if links > 40 {
                        return None;
                    }
                    let target = fs::read_link(&next).ok()?;
                    if target.is_absolute() {
                        inside.clear();
                    }
                    left.extend(target.components().rev().map(|part| part.as_os_str().to_owned()));
                } else {
                    inside.push(name);
                }
            }
            _ => {}
        }
    }
    Some(root.join(inside))
}

/// What an init understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// Takes real-time signals; has a notion of having started.
    Systemd,
    /// Takes SIGUSR2 and SIGTERM.
    Busybox,
    /// Has commands of its own.
    Other,
}

/// The family of the init at `path`.
pub(crate) fn family(path: &Path) -> Family {
    let file = resolve(Path::new("/"), path).unwrap_or_else(|| path.to_owned());
    match file.file_name().and_then(|name| name.to_str()) {
        Some("systemd") => Family::Systemd,
        Some("busybox" | "busybox.static" | "busybox-suid") => Family::Busybox,
        _ => Family::Other,
    }
}

/// Spares systemd the 90 seconds that it waits for the console's device where no udev will announce it.
pub(crate) fn prepare(path: &Path) {
    let udev =
        ["/lib/systemd/systemd-udevd", "/usr/lib/systemd/systemd-udevd", "/sbin/udevd", "/usr/sbin/udevd"];
    if family(path) != Family::Systemd || udev.iter().any(|path| Path::new(path).exists()) {
        return;
    }
    let units = Path::new("/run/systemd/system");
    let consoles = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    if fs::create_dir_all(units).is_ok() {
        for console in consoles.split_ascii_whitespace() {
            // A unit masked for this boot only: systemd.unit(5).
            let _ = std::os::unix::fs::symlink(
                "/dev/null",
                units.join(format!("serial-getty@{console}.service")),
            );
        }
    }
}

/// Waits until the image's init has finished starting, well or not so well.
pub(crate) async fn started(path: &Path) {
    if family(path) != Family::Systemd {
        return;
    }
    loop {
        // Answers once systemd listens; before that it fails at once.
        let output = Command::new("systemctl")
            .args(["is-system-running", "--wait"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .env_clear()
            .env("PATH", crate::ssh::DEFAULT_PATH)
            .kill_on_drop(true)
            .output()
            .await;
        match output {
            Ok(output) => {
                let state = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                if !matches!(state.as_str(), "" | "offline" | "unknown" | "initializing" | "starting") {
                    return;
                }
            }
            // No systemctl in the image: nobody to ask.
            Err(_) => return,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Whether a process with this proc_pid_status(5) catches or blocks (to fetch it otherwise) a signal. Init is spared all others
/// by the kernel.
fn takes(status: &str, signal: i32) -> bool {
    let mask = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .unwrap_or(0)
    };
    (mask("SigBlk:") | mask("SigCgt:")) & 1 << (signal - 1) != 0
}

/// Whether proc_pid_syscall(5) is of a process that waits in sigtimedwait(2). Then the kernel shows the signals that it waits
/// for, which it blocks at all other times, as not blocked.
fn waits_for_signals(syscall: &str) -> bool {
    let number = syscall.split_ascii_whitespace().next().and_then(|number| number.parse().ok());
    number == Some(libc::SYS_rt_sigtimedwait)
}

/// Whether PID 1 listens to a signal now, as far as can be seen.
fn init_listens(signal: i32) -> bool {
    fs::read_to_string("/proc/1/status").is_ok_and(|status| takes(&status, signal))
        || fs::read_to_string("/proc/1/syscall").is_ok_and(|syscall| waits_for_signals(&syscall))
}

/// Sends PID 1 a signal once it takes that, or after [`START`], then again and again: an init that is still starting may
/// yet throw it away. Harmless to one that is going down. Ends with the machine, or when it is of no use.
///
/// # Errors
/// A message, if PID 1 takes no signal.
async fn signal_init(signal: i32) -> Result<(), String> {
    let deadline = tokio::time::Instant::now() + START;
    while !init_listens(signal) && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for pause in AGAIN {
        #[expect(unsafe_code, reason = "nix knows no real-time signals")]
        // SAFETY: kill takes two integers and touches no memory.
        let result = unsafe { libc::kill(1, signal) };
        nix::errno::Errno::result(result).map_err(|error| format!("signal to init: {error}"))?;
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

/// How long an init may take until it listens to signals.
const START: Duration = Duration::from_secs(10);
/// Pauses between signals.
const AGAIN: [Duration; 4] =
    [Duration::from_secs(2), Duration::from_secs(4), Duration::from_secs(8), Duration::from_secs(16)];

/// Asks the image's init to shut down.
///
/// # Errors
/// A message, if it cannot be asked.
pub(crate) async fn shut_down(path: &Path, kind: ShutdownKind) -> Result<(), String> {
    match family(path) {
        Family::Systemd => {
            // systemd(1), "Signals": SIGRTMIN+4 starts poweroff.target, SIGRTMIN+5 reboot.target.
            // By number: systemd's C library counts from 34, while the one of this binary reserves one more for itself.
            let number = 34 + if kind == ShutdownKind::PowerOff { 4 } else { 5 };
            signal_init(number).await
        }
        Family::Busybox => {
            let signal = if kind == ShutdownKind::PowerOff { Signal::SIGUSR2 } else { Signal::SIGTERM };
            signal_init(signal as i32).await
        }
        Family::Other => {
            let name = if kind == ShutdownKind::PowerOff { "poweroff" } else { "reboot" };
            for directory in ["/sbin", "/usr/sbin", "/bin", "/usr/bin"] {
                let status = Command::new(Path::new(directory).join(name))
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .env_clear()
                    .env("PATH", crate::ssh::DEFAULT_PATH)
                    .status()
                    .await;
                if status.is_ok_and(|status| status.success()) {
                    return Ok(());
                }
            }
            Err(format!("the image has no {name} command that works"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_followed_inside_the_image_only() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("usr/lib/systemd")).unwrap();
        fs::create_dir_all(at("usr/sbin")).unwrap();
        symlink("usr/sbin", at("sbin")).unwrap();
        symlink("/lib/systemd/systemd", at("usr/sbin/init")).unwrap();
        symlink("usr/lib", at("lib")).unwrap();
        assert_eq!(find(root.path()), None);
        fs::write(at("usr/lib/systemd/systemd"), "").unwrap();
        assert_eq!(find(root.path()), None, "not executable");
        fs::set_permissions(at("usr/lib/systemd/systemd"), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find(root.path()), Some("/sbin/init".into()));
        assert_eq!(resolve(root.path(), Path::new("/sbin/init")), Some(at("usr/lib/systemd/systemd")));
        symlink("../../../../../../bin/sh", at("escape")).unwrap();
        assert_eq!(resolve(root.path(), Path::new("/escape")), None, "no bin/sh in this image");
        symlink("loop", at("loop")).unwrap();
        assert_eq!(resolve(root.path(), Path::new("/loop")), None);
        assert_eq!(place(root.path(), Path::new("/loop")), None);
        symlink("/var/run", at("run")).unwrap();
        assert_eq!(place(root.path(), Path::new("/run/x")), Some(at("var/run/x")));
    }

    #[test]
    fn signals_are_found_in_the_masks_of_a_process() {
        let status = "Name:\tinit\nSigPnd:\t0000000000000000\nSigBlk:\t0000000000000800\nSigIgn:\t0000000000000001\nSigCgt:\t0000002000004000\n";
        assert!(takes(status, 12) && takes(status, 15) && takes(status, 38), "blocked, caught, real-time");
        assert!(!takes(status, 1) && !takes(status, 10) && !takes("", 12));
    }

    #[test]
    fn one_that_fetches_its_signals_is_seen_to_wait_for_them() {
        let syscall =
            |number: libc::c_long| format!("{number} 0x4c0 0x7ffc 0x0 0x8 0x0 0x0 0x7ffcb3c8 0x4f8e2a\n");
        assert!(waits_for_signals(&syscall(libc::SYS_rt_sigtimedwait)));
        assert!(!waits_for_signals(&syscall(libc::SYS_wait4)));
        assert!(!waits_for_signals("running\n") && !waits_for_signals(""));
    }
}
