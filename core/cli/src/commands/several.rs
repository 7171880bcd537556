//! The same operation on several VMs, one after the other; a failure does not spare the others.

use jsonrpsee::core::client::{Client, Error};
use serde_json::Value;
use vm_api::Begun;

use crate::{
    context::Context,
    errors::CliError,
    interrupts::Interrupts,
    operations::{Done, OnSignal, follow},
    progress::PATIENCE,
};

/// Runs `begin` for each name and follows the operation; shows the names that went well, and reports each failure.
pub(crate) async fn each(
    context: &Context,
    names: &[String],
    on_signal: OnSignal,
    begin: impl AsyncFn(&Client, String) -> Result<Begun, Error>,
) -> Result<(), CliError> {
    let (client, mut interrupts) = context.client_and_interrupts().await?;
    let mut results: Vec<Value> = Vec::new();
    let mut failures = Vec::new();
    for name in names {
        match one(context, &client, name, on_signal, &begin, &mut interrupts).await {
            Ok(done) => {
                results.push(if done.result.is_null() {
                    serde_json::json!({"name": name})
                } else {
                    done.result
                });
                if !context.output.json {
                    context.output.raw(format!("{name}\n").as_bytes())?;
                }
                if let Some(signal) = done.interrupted {
                    let what = "interrupted; this VM's operation had already ended".to_owned();
                    return Err(CliError::Interrupted { signal, what });
                }
            }
            Err(error @ (CliError::Interrupted { .. } | CliError::Output { .. })) => return Err(error),
            Err(error) => failures.push((name, error)),
        }
    }
    if context.output.json {
        context.output.show(&results, String::new)?;
    }
    match failures.len() {
        0 => Ok(()),
        1 if names.len() == 1 => failures.pop().map_or(Ok(()), |(_, error)| Err(error)),
        failed => {
            let causes: String =
                failures.iter().map(|(name, error)| format!("\n  {name}: {}", error.message())).collect();
            let (_, first) = failures.swap_remove(0);
            let summary = format!("{failed} of {} failed:{causes}", names.len());
            Err(CliError::Partly { summary, hint: first.hint(), kind: first.kind() })
        }
    }
}

async fn one(
    context: &Context,
    client: &Client,
    name: &str,
    on_signal: OnSignal,
    begin: &impl AsyncFn(&Client, String) -> Result<Begun, Error>,
    interrupts: &mut Interrupts,
) -> Result<Done<Value>, CliError> {
    let begun = begin(client, name.to_owned()).await?;
    follow(client, begun, context.output, PATIENCE, on_signal, interrupts).await
}
