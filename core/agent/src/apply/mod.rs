//! Making the guest what its [`GuestConfig`] says. Every step can be repeated; one that fails is a warning
//! and keeps no other from being done.

mod etc;
mod mounts;
mod net;

use std::{
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};
use tokio::process::Command;
use vm_types::guest::config::GuestConfig;

/// A clock that is off by less is left alone.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(1);

/// Applies all but the boot commands; the result says what did not work.
pub(crate) async fn apply(config: &GuestConfig) -> Vec<String> {
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
    let root = std::path::Path::new("/");
    note("/etc/hostname", etc::hostname(root, config).map_err(|error| error.to_string()));
    note("/etc/hosts", etc::hosts(root, config).map_err(|error| error.to_string()));
    note("/etc/resolv.conf", etc::resolv_conf(root, config).map_err(|error| error.to_string()));
    note("/etc/machine-id", etc::machine_id(root, config).map_err(|error| error.to_string()));
    warnings.extend(net::apply(config).await);
    warnings.extend(mounts::apply(&config.mounts));
    // After the mounts: a file may belong on one of them.
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

/// Runs the boot commands in order; the result says which failed and how.
pub(crate) async fn run_boot_commands(config: &GuestConfig) -> Vec<String> {
    let mut warnings = Vec::new();
    for words in &config.boot_commands {
        let Some((program, arguments)) = words.split_first() else { continue };
        let output = Command::new(program)
            .args(arguments)
            .env_clear()
            .env("PATH", crate::ssh::DEFAULT_PATH)
            .env("HOME", "/root")
            .envs(&config.environment)
            .current_dir("/")
            .stdin(Stdio::null())
            .output()
            .await;
        match output {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                let last = text.trim_end().lines().next_back().unwrap_or_default();
                warnings.push(format!("boot command {words:?}: {}: {last}", output.status));
            }
            Err(error) => warnings.push(format!("boot command {words:?}: {error}")),
        }
    }
    warnings
}
