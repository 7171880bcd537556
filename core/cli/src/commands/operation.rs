//! `vm operation`

use clap::{Args, Subcommand};
use jsonrpsee::core::client::Client;
use serde_json::Value;
use vm_api::{
    Begun, ErrorKind, OperationId, OperationInfo, OperationProgress, OperationStatus, Problem,
    rpc::OperationClient,
};

use crate::{
    context::Context,
    duration,
    errors::CliError,
    operations::{OnSignal, follow},
    output::{ago, for_stdout, table},
    progress::PATIENCE,
};

/// List, await or cancel what the daemon is at
///
/// Without a verb, lists the operations at work. Ended ones are kept for a while, but not beyond the daemon's end.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct OperationArgs {
    /// List those that have ended too
    #[arg(short, long)]
    all: bool,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List operations
    #[command(visible_alias = "list")]
    Ls {
        /// Those that have ended too
        #[arg(short, long)]
        all: bool,
    },
    /// Wait for the end of one; exits as the command that began it would
    Wait {
        /// Its id
        #[arg(value_parser = id)]
        id: OperationId,
    },
    /// Cancel operations, and wait until what they had made is undone
    Cancel {
        /// Their ids
        #[arg(required = true, value_name = "ID", value_parser = id)]
        ids: Vec<OperationId>,
    },
}

fn id(text: &str) -> Result<OperationId, String> {
    text.parse().map(OperationId).map_err(|_| "an operation's id is a number; see vm operations".to_owned())
}

impl OperationArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        match self.verb {
            None => ls(context, self.all).await,
            Some(Verb::Ls { all }) => ls(context, all).await,
            Some(Verb::Wait { id }) => wait(context, id).await,
            Some(Verb::Cancel { ids }) => cancel(context, &ids).await,
        }
    }
}

async fn ls(context: &Context, all: bool) -> Result<u8, CliError> {
    let client = context.client().await?;
    let mut operations = OperationClient::list(&client).await?;
    operations.retain(|operation| all || is_running(operation));
    context.output.show(&operations, || {
        if context.output.quiet {
            return operations.iter().map(|operation| format!("{}\n", operation.id)).collect();
        }
        for_stdout(table(
            ["ID", "WHAT", "OF", "STATUS", "BEGUN", "TOOK"],
            operations.iter().map(|operation| {
                [
                    operation.id.to_string(),
                    what(operation),
                    operation.subject.clone(),
                    status(&operation.status),
                    ago(operation.begun_at),
                    operation.ended_at.map(|end| took(operation.begun_at, end)).unwrap_or_default(),
                ]
            }),
        ))
    })?;
    Ok(0)
}

async fn wait(context: &Context, id: OperationId) -> Result<u8, CliError> {
    let (client, mut interrupts) = context.client_and_interrupts().await?;
    let begun = Begun { operation: id };
    let done =
        follow::<Value>(&client, begun, context.output, PATIENCE, OnSignal::Leave, &mut interrupts).await?;
    context.output.show(&done.result, || format!("operation {id} succeeded"))?;
    Ok(0)
}

async fn cancel(context: &Context, ids: &[OperationId]) -> Result<u8, CliError> {
    let client = context.client().await?;
    let mut ended = Vec::new();
    let mut failures = Vec::new();
    for id in ids {
        match cancel_one(&client, *id).await {
            Ok(operation) => {
                if !context.output.json {
                    context.output.raw(format!("{id}\n").as_bytes())?;
                }
                ended.push(operation);
            }
            Err(error) => failures.push((*id, error)),
        }
    }
    if context.output.json {
        context.output.show(&ended, String::new)?;
    }
    match failures.len() {
        0 => Ok(0),
        1 if ids.len() == 1 => Err(failures.swap_remove(0).1),
        failed => {
            let causes: String =
                failures.iter().map(|(id, error)| format!("\n  {id}: {}", error.message())).collect();
            let (_, first) = failures.swap_remove(0);
            let summary = format!("{failed} of {} failed:{causes}", ids.len());
            Err(CliError::Partly { summary, hint: first.hint(), kind: first.kind() })
        }
    }
}

/// Cancels one and waits for its end. Being cancelled, and a failure on the way, is what was wanted; success is not.
async fn cancel_one(client: &Client, id: OperationId) -> Result<OperationInfo, CliError> {
    let refuse = |message: String| {
        CliError::from(Problem::new(ErrorKind::WrongState, message).hint("see `vm operations --all`"))
    };
    if !is_running(&OperationClient::get(client, id).await?) {
        return Err(refuse(format!("operation {id} has already ended")));
    }
    let mut changes = OperationClient::watch(client, id, Some(false)).await?;
    OperationClient::cancel(client, id).await?;
    loop {
        let operation = match changes.next().await {
            Some(Ok(operation)) => operation,
            // As when following: the next call tells whether the daemon is gone.
            Some(Err(_)) | None => {
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                OperationClient::get(client, id).await?
            }
        };
        match operation.status {
            OperationStatus::Running { .. } => {}
            OperationStatus::Failed { .. } => return Ok(operation),
            OperationStatus::Succeeded { .. } => {
                return Err(refuse(format!("operation {id} succeeded before it could be cancelled")));
            }
        }
    }
}

fn is_running(operation: &OperationInfo) -> bool {
    matches!(operation.status, OperationStatus::Running { .. })
}

/// Its kind as in JSON, e.g. `vm_create`.
fn what(operation: &OperationInfo) -> String {
    serde_json::to_value(operation.kind)
        .ok()
        .and_then(|word| word.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn took(begun_at: u64, ended_at: u64) -> String {
    duration::human(ended_at.saturating_sub(begun_at))
}

/// On one line.
fn status(status: &OperationStatus) -> String {
    match status {
        OperationStatus::Running { progress } => running(progress),
        OperationStatus::Succeeded { .. } => "succeeded".to_owned(),
        OperationStatus::Failed { error } if error.kind == ErrorKind::Cancelled => "cancelled".to_owned(),
        OperationStatus::Failed { error } => {
            format!("failed: {}", error.message.lines().next().unwrap_or_default())
        }
    }
}

fn running(progress: &OperationProgress) -> String {
    match progress.total {
        Some(total) if total > 0 => {
            let percent = u128::from(progress.done) * 100 / u128::from(total);
            format!("{}, {percent}%", progress.stage)
        }
        _ => progress.stage.clone(),
    }
}
