//! Following a long operation to its end.

use std::time::Duration;

use jsonrpsee::core::client::Client;
use serde::de::DeserializeOwned;
use vm_api::{Begun, ErrorKind, OperationId, OperationInfo, OperationStatus, rpc::OperationClient};

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

/// Follows an operation to its end.
pub(crate) async fn follow<T: DeserializeOwned>(
    client: &Client,
    begun: Begun,
    output: Output,
    patience: Duration,
    on_signal: OnSignal,
    interrupts: &mut Interrupts,
) -> Result<Done<T>, CliError> {
    let id = begun.operation;
    let mut progress = Progress::new(output.quiet || output.json, patience);
    let mut changes = OperationClient::watch(client, id, Some(on_signal == OnSignal::CancelAsOurs)).await?;
    let mut interrupted = None;
    loop {
        // Both branches are cancel-safe: an unread change or signal is kept by its queue.
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
                if let Some(result) = settle(info, &mut progress, interrupted)? {
                    let result = serde_json::from_value(result).map_err(|source| CliError::Answer { source })?;
                    return Ok(Done { result, interrupted });
                }
            }
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
