//! Making the guest what its [`GuestConfig`] says. Every step can be repeated; one that fails is a warning
//! and keeps no other from being done.

mod etc;
mod mounts;
mod net;
mod units;

use std::{
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::{
        signal::{Signal, killpg},
        time::TimeSpec,
    },
    time::{ClockId, clock_settime},
    unistd::Pid,
};
use tokio::{
    io::AsyncReadExt,
    process::{ChildStderr, Command},
};
use vm_archive::Replaced;
use vm_types::guest::config::GuestConfig;

pub(crate) use units::Systemd;

use crate::kmod;

/// A clock that is off by less is left alone.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(1);

/// What of the files that [`apply`] writes below `root` an image must not have, or not as it is.
pub(crate) fn generalized(root: &Path) -> Replaced {
    let mut files = Replaced::new();
    let hostname = nix::unistd::gethostname().unwrap_or_default();
    etc::generalized(root, &hostname.to_string_lossy(), &mut files);
    units::generalized(root, &mut files);
    files
}

/// Applies all but the boot commands; the result says what did not work.
pub(crate) async fn apply(config: &GuestConfig, systemd: Systemd) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut note = |what: &str, result: Result<(), String>| {
        if let Err(error) = result {
            warnings.push(format!("{what}: {error}"));
        }
    };
    if let Some(nanos) = config.clock_unix_nanos {
        note("clock", set_clock(nanos));
    }
    note("host name", nix::unistd::sethostname(&config.hostname).map_err(|error| error.to_string()));
    let root = Path::new("/");
    note("/etc/hostname", etc::hostname(root, config).map_err(|error| error.to_string()));
    note("/etc/hosts", etc::hosts(root, config).map_err(|error| error.to_string()));
    note("/etc/resolv.conf", etc::resolv_conf(root, config).map_err(|error| error.to_string()));
    note("/etc/machine-id", etc::machine_id(root, config).map_err(|error| error.to_string()));
    warnings.extend(net::apply(config).await);
    if !(config.modules.is_empty() && config.mounts.is_empty() && config.files.is_empty()) {
        let config = config.clone();
        // Drives are waited for and modules take their time; other sessions go on meanwhile.
        let contents = tokio::task::spawn_blocking(move || contents(root, &config));
        warnings.extend(contents.await.unwrap_or_default());
    }
    let wanted = config.units.clone();
    let units = tokio::task::spawn_blocking(move || units::apply(root, &wanted, systemd));
    warnings.extend(units.await.unwrap_or_default());
    warnings
}

/// Modules, which a mount may need, mounts, then files, which may belong on one of them.
fn contents(root: &Path, config: &GuestConfig) -> Vec<String> {
    let mut warnings = kmod::load_named(&config.modules);
    warnings.extend(mounts::apply(&config.mounts));
    for file in &config.files {
        if let Err(error) = etc::file(root, file) {
            warnings.push(format!("file {}: {error}", file.path));
        }
    }
    warnings
}

fn set_clock(nanos: u64) -> Result<(), String> {
    let wanted = Duration::from_nanos(nanos);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if wanted.abs_diff(now) <= CLOCK_TOLERANCE {
        return Ok(());
    }
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(wanted)).map_err(|error| error.to_string())
}

/// How long one boot command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(600);
/// What is kept of the end of its standard error, in bytes.
const TAIL: usize = 4096;

/// Runs the boot commands in order; the result says which failed and how.
pub(crate) async fn run_boot_commands(config: &GuestConfig) -> Vec<String> {
    let mut warnings = Vec::new();
    for words in &config.boot_commands {
        if let Err(why) = boot_command(words, config, COMMAND_LIMIT).await {
            warnings.push(format!("boot command {words:?}: {why}"));
        }
    }
    warnings
}

/// Waits for the command itself only: a daemon that it leaves behind may keep its standard error.
async fn boot_command(words: &[String], config: &GuestConfig, limit: Duration) -> Result<(), String> {
    let Some((program, arguments)) = words.split_first() else { return Ok(()) };
    let home = crate::ssh::home_of_root();
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", crate::ssh::DEFAULT_PATH)
        .env("HOME", home)
        .envs(&config.environment)
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let tail = Arc::<Mutex<Vec<u8>>>::default();
    // Reads on for as long as anybody writes.
    let mut reader = tokio::spawn(keep_tail(child.stderr.take(), Arc::clone(&tail)));
    let ended = tokio::time::timeout(limit, child.wait()).await;
    let what = match ended {
        Ok(Ok(status)) if status.success() => return Ok(()),
        Ok(Ok(status)) => status.to_string(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => {
            if let Some(id) = child.id() {
                let _ = killpg(Pid::from_raw(id.cast_signed()), Signal::SIGKILL);
            }
            let _ = child.wait().await;
            format!("not done after {limit:?}, killed")
        }
    };
    // What it wrote is in the pipe, at most a few reads away; on a busy machine these take their time.
    let _ = tokio::time::timeout(Duration::from_secs(1), &mut reader).await;
    let tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
    let text = String::from_utf8_lossy(&tail);
    Err(format!("{what}: {}", text.trim_end().lines().next_back().unwrap_or_default()))
}

async fn keep_tail(from: Option<ChildStderr>, tail: Arc<Mutex<Vec<u8>>>) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; TAIL];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(&buffer[..length]);
        let surplus = tail.len().saturating_sub(TAIL);
        tail.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn boot_commands_are_waited_for_but_not_their_daemons_nor_for_ever() {
        let config: GuestConfig = serde_json::from_value(serde_json::json!({
            "version": 1, "hostname": "box", "machine_id": "0123456789abcdef0123456789abcdef",
            "clock_unix_nanos": null, "resolvers": [], "search": [], "hosts": [],
            "ssh": {"host_key": "", "authorized_keys": []},
            "environment": {"GREETING": "well met", "PATH": "/opt/none:/usr/bin:/bin"},
            "root": {"serial": "root", "fstype": "ext4", "grow": false},
        }))
        .unwrap();
        let run = async |script: &str, limit| {
            let words = ["/bin/sh", "-c", script].map(str::to_owned);
            tokio::time::timeout(Duration::from_secs(20), boot_command(&words, &config, limit)).await.unwrap()
        };
        let long = Duration::from_secs(15);
        assert_eq!(run("sleep 30 & exit 0", long).await, Ok(()));
        let environment =
            "test \"$GREETING|$PATH|$PWD\" = 'well met|/opt/none:/usr/bin:/bin|/' && test -n \"$HOME\"";
        assert_eq!(run(environment, long).await, Ok(()));
        let why = run("sleep 30 & seq 100000 >&2; echo last words >&2; exit 3", long).await.unwrap_err();
        assert!(why.contains("exit status: 3") && why.ends_with("last words"), "{why}");
        let why = run("sleep 30", Duration::from_millis(50)).await.unwrap_err();
        assert!(why.contains("not done"), "{why}");
    }
}
