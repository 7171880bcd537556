//! Following a long operation to its end.

use std::time::Duration;

use jsonrpsee::core::client::{Client, Subscription};
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use vm_api::{
    Begun, ErrorKind, OperationId, OperationInfo, OperationStatus, OutputChunk, rpc::OperationClient,
};

use crate::{errors::CliError, interrupts::Interrupts, output::Output, progress::Progress};

/// What an operation made, and whether a signal came meanwhile: it may have been too late to cancel.
#[derive(Debug)]
pub(crate) struct Done<T> {
    /// The operation's result.
    pub(crate) result: T,
    /// The signal.
    pub(crate) interrupted: Option<i32>,
}

/// What a signal does to an operation that is being followed. The end of `vm` by other means (`kill -9`) leaves it alone,
/// unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnSignal {
    /// The first one cancels it, and its end is awaited; the second leaves it alone.
    Cancel,
    /// The same, and it is cancelled too where `vm` ends without a word: without `vm` nobody wants its result.
    CancelAsOurs,
    /// The first one leaves it alone: half of it would be worse than all of it.
    Leave,
}

/// How long what an operation has said at last may take to come.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Follows an operation to its end.
pub(crate) async fn follow<T: DeserializeOwned>(
    client: &Client,
    begun: Begun,
    output: Output,
    patience: Duration,
    on_signal: OnSignal,
    interrupts: &mut Interrupts,
) -> Result<Done<T>, CliError> {
    let progress = Progress::new(output.quiet || output.json, patience);
    followed(client, begun, progress, None, on_signal, interrupts).await
}

/// The same, and shows on stderr what it says, unless quiet.
pub(crate) async fn listen<T: DeserializeOwned>(
    client: &Client,
    begun: Begun,
    output: Output,
    on_signal: OnSignal,
    interrupts: &mut Interrupts,
) -> Result<Done<T>, CliError> {
    let silent = output.quiet || output.json;
    let said = match silent {
        true => None,
        false => Some(OperationClient::output(client, begun.operation).await?),
    };
    // It says itself what it is at; what is beside that is of interest where it can be drawn over.
    let progress = Progress::live(silent);
    followed(client, begun, progress, said, on_signal, interrupts).await
}

type Said = Subscription<OutputChunk>;

/// What comes next; for ever nothing where there is nobody to listen to, or no more to hear.
async fn heard(said: &mut Option<Said>) -> Option<OutputChunk> {
    let Some(listening) = said else { return std::future::pending().await };
    let chunk = listening.next().await.and_then(Result::ok);
    if chunk.as_ref().is_none_or(|chunk| chunk.end) {
        *said = None;
    }
    chunk
}

fn say(progress: &Progress, chunk: &OutputChunk) {
    if chunk.lost > 0 {
        progress.say(&format!("\n({} bytes are left out)\n", chunk.lost));
    }
    progress.say(&chunk.text);
}

async fn followed<T: DeserializeOwned>(
    client: &Client,
    begun: Begun,
    mut progress: Progress,
    mut said: Option<Said>,
    on_signal: OnSignal,
    interrupts: &mut Interrupts,
) -> Result<Done<T>, CliError> {
    let id = begun.operation;
    let mut changes = OperationClient::watch(client, id, Some(on_signal == OnSignal::CancelAsOurs)).await?;
    let mut interrupted = None;
    loop {
        // All branches are cancel-safe: what is unread is kept by its queue.
        tokio::select! {
            change = changes.next() => {
                let info = match change {
                    Some(Ok(info)) => info,
                    // The stream ended early: the daemon is gone, which the next call tells, or it dropped us.
                    Some(Err(_)) | None => {
                        tokio::time::sleep(Duration::from_millis(200)).await;
                        OperationClient::get(client, id).await?
                    }
                };
                if !matches!(info.status, OperationStatus::Running { .. }) {
                    // Its last words are on their way.
                    while said.is_some()
                        && let Ok(Some(chunk)) = timeout(LAST_WORDS, heard(&mut said)).await
                    {
                        say(&progress, &chunk);
                    }
                }
                if let Some(result) = settle(info, &mut progress, interrupted)? {
                    let result = serde_json::from_value(result).map_err(|source| CliError::Answer { source })?;
                    return Ok(Done { result, interrupted });
                }
            }
            Some(chunk) = heard(&mut said) => say(&progress, &chunk),
            signal = interrupts.next() => {
                if interrupted.is_some() || on_signal == OnSignal::Leave {
                    return Err(left_alone(id, signal));
                }
                interrupted = Some(signal);
                cancel(client, id).await?;
            }
        }
    }
}

/// The result of an operation that succeeded, `None` while it runs.
fn settle(
    info: OperationInfo,
    progress: &mut Progress,
    interrupted: Option<i32>,
) -> Result<Option<serde_json::Value>, CliError> {
    match (info.status, interrupted) {
        (OperationStatus::Running { progress: state }, _) => {
            progress.show(&state);
            Ok(None)
        }
        (OperationStatus::Succeeded { result }, _) => Ok(Some(result)),
        (OperationStatus::Failed { error }, Some(signal)) if error.kind == ErrorKind::Cancelled => {
            Err(CliError::Interrupted { signal, what: "cancelled".to_owned() })
        }
        (OperationStatus::Failed { error }, _) => Err(error.into()),
    }
}

async fn cancel(client: &Client, id: OperationId) -> Result<(), CliError> {
    match OperationClient::cancel(client, id).await.map_err(|error| vm_api::client::problem(&error)) {
        Ok(()) => Ok(()),
        // It has just ended, or is of a sort that goes on to its end.
        Err(problem)
            if matches!(
                problem.kind,
                ErrorKind::NotFound | ErrorKind::WrongState | ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        Err(problem) => Err(problem.into()),
    }
}

fn left_alone(id: OperationId, signal: i32) -> CliError {
    CliError::Interrupted {
        signal,
        what: format!("interrupted; operation {id} goes on in the daemon (vm operation wait {id})"),
    }
}
