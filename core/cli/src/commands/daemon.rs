//! `vm daemon`

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use vm_api::{DaemonStatus, rpc::DaemonClient};
use vm_host::process::{PidFd, identify};

use crate::{
    context::Context,
    daemon::{self, DaemonError},
    errors::CliError,
    output::{ago, facts},
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
    Status,
}

impl DaemonArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        match self.verb {
            Verb::Start => start(context).await,
            Verb::Stop => stop(context).await,
            Verb::Status => status(context).await,
        }
    }
}

async fn start(context: &Context) -> Result<u8, CliError> {
    let client = daemon::connect_or_start(&context.layout, true).await?;
    let status = daemon::status(&context.layout, &client).await?;
    show(context, &status)
}

async fn status(context: &Context) -> Result<u8, CliError> {
    let Some(client) = daemon::connect(&context.layout).await? else {
        context.output.show(&json!({"running": false}), || "the daemon is not running".to_owned())?;
        return Ok(EXIT_NOT_RUNNING);
    };
    let status = daemon::status(&context.layout, &client).await?;
    show(context, &status)
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

fn show(context: &Context, status: &DaemonStatus) -> Result<u8, CliError> {
    let mut document = serde_json::to_value(status).map_err(|source| CliError::Answer { source })?;
    if let Some(fields) = document.as_object_mut() {
        fields.insert("running_vms".to_owned(), json!(status.running));
        fields.insert("running".to_owned(), json!(true));
    }
    context.output.show(&document, || {
        facts([
            ("daemon", Some(format!("running, process {}, since {}", status.pid, ago(status.started_at)))),
            ("version", Some(format!("{} (interface {})", status.version, status.api_version))),
            ("vms", Some(format!("{}, {} running", status.vms, status.running))),
            ("instance", Some(status.instance.clone())),
            ("run directory", Some(status.run_dir.display().to_string())),
            ("state directory", Some(status.state_dir.display().to_string())),
            ("configuration", Some(status.config_file.display().to_string())),
        ])
    })?;
    Ok(0)
}
