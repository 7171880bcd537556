//! `vm daemon`

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use vm_api::{DaemonStatus, LockInfo, LockState, rpc::DaemonClient};
use vm_host::process::{PidFd, identify};

use crate::{
    context::Context,
    daemon::{self, DaemonError},
    errors::CliError,
    output::{facts, lasting, table},
    size::human,
};

/// How long a daemon may take to end.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// Exit code of `status` where no daemon runs: not found.
const EXIT_NOT_RUNNING: u8 = 3;

/// Start, stop or show the daemon
///
/// It is started by any command that needs it where the caller is root, so this is seldom needed.
#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start it in the background
    Start,
    /// End it; VMs go on
    Stop,
    /// Show how it is; exits with 3 if it does not run
    Status {
        /// Show too who holds or waits for which lock, and for how long
        #[arg(long)]
        locks: bool,
    },
}

impl DaemonArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        match self.verb {
            Verb::Start => start(context).await,
            Verb::Stop => stop(context).await,
            Verb::Status { locks } => status(context, locks).await,
        }
    }
}

async fn start(context: &Context) -> Result<u8, CliError> {
    let client = daemon::connect_or_start(&context.layout, true).await?;
    let status = daemon::status(&context.layout, &client).await?;
    show(context, &status, None)
}

async fn status(context: &Context, locks: bool) -> Result<u8, CliError> {
    let Some(client) = daemon::connect(&context.layout).await? else {
        context.output.show(&json!({"running": false}), || "the daemon is not running".to_owned())?;
        return Ok(EXIT_NOT_RUNNING);
    };
    let status = daemon::status(&context.layout, &client).await?;
    let locks = if locks { Some(client.locks().await?) } else { None };
    show(context, &status, locks.as_deref())
}

async fn stop(context: &Context) -> Result<u8, CliError> {
    let stopped = |was_running: bool| json!({"running": false, "was_running": was_running});
    let Some(client) = daemon::connect(&context.layout).await? else {
        context.output.show(&stopped(false), || "the daemon was not running".to_owned())?;
        return Ok(0);
    };
    let pid = daemon::status(&context.layout, &client).await?.pid;
    // Held before it is told to end, so that its pid cannot be another's by then.
    let setup = |source| CliError::Setup { what: "waiting for the daemon", source };
    let process = identify(pid).map(PidFd::open).transpose().map_err(setup)?.flatten();
    DaemonClient::stop(&client).await?;
    if let Some(process) = process {
        match tokio::time::timeout(STOP_DEADLINE, process.ended()).await {
            Ok(ended) => ended.map_err(setup)?,
            Err(_) => return Err(DaemonError::DidNotStop { pid, seconds: STOP_DEADLINE.as_secs() }.into()),
        }
    }
    context.output.show(&stopped(true), || "the daemon has ended; VMs go on".to_owned())?;
    Ok(0)
}

fn show(context: &Context, status: &DaemonStatus, locks: Option<&[LockInfo]>) -> Result<u8, CliError> {
    let mut document = serde_json::to_value(status).map_err(|source| CliError::Answer { source })?;
    if let Some(fields) = document.as_object_mut() {
        fields.insert("running_vms".to_owned(), json!(status.running));
        fields.insert("running".to_owned(), json!(true));
        if let Some(locks) = locks {
            fields.insert("locks".to_owned(), json!(locks));
        }
    }
    context.output.show(&document, || match locks {
        Some(locks) => format!("{}\n{}", text(status), locks_text(locks)),
        None => text(status),
    })?;
    Ok(0)
}

fn text(status: &DaemonStatus) -> String {
    let resources = &status.resources;
    let allowed = match resources.disk_limit_bytes {
        Some(limit) => format!("of {} allowed", human(limit)),
        None => "no quota".to_owned(),
    };
    let memory =
        format!("{} of {}", human(resources.memory_mib << 20), human(resources.memory_limit_mib << 20));
    facts([
        ("daemon", Some(format!("running for {}, process {}", lasting(status.started_at), status.pid))),
        ("version", Some(format!("{} (interface {})", status.version, status.api_version))),
        ("vms", Some(format!("{}, {} running", status.vms, status.running))),
        ("memory", Some(format!("{memory} committed"))),
        ("disks", Some(format!("{} when full, {allowed}", human(resources.disk_bytes)))),
        ("taps", Some(format!("{} ready", resources.taps_ready))),
        ("instance", Some(status.instance.clone())),
        ("run directory", Some(status.run_dir.display().to_string())),
        ("state directory", Some(status.state_dir.display().to_string())),
        ("configuration", Some(status.config_file.display().to_string())),
    ])
}

fn locks_text(locks: &[LockInfo]) -> String {
    if locks.is_empty() {
        return "no lock is held\n".to_owned();
    }
    table(
        ["LOCK", "LEVEL", "STATE", "HOLDER", "AGE"],
        locks.iter().map(|lock| {
            let state = match lock.state {
                LockState::Held => "held",
                LockState::Waiting => "waiting",
            };
            let holder = match lock.operation {
                Some(id) => format!("{} (operation {id})", lock.holder),
                None => lock.holder.clone(),
            };
            [lock.lock.clone(), lock.level.clone(), state.to_owned(), holder, age(lock.age_ms)]
        }),
    )
}

/// Locks are held for milliseconds; one that is not should stand out.
fn age(ms: u64) -> String {
    if ms < 1000 { format!("{ms} ms") } else { format!("{}.{} s", ms / 1000, ms % 1000 / 100) }
}
