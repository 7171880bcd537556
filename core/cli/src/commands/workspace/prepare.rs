//! `vm workspace prepare`

use std::{path::PathBuf, time::Duration};

use clap::Args;
use jsonrpsee::core::client::Client;
use vm_api::{PrepareWorkspace, PreparedWorkspace, WorkspacePlan, WorkspaceState, rpc::WorkspacesClient};

use super::{ExportTo, ImportArgs, count};
use crate::{
    context::Context,
    errors::CliError,
    interrupts::Interrupts,
    operations::{Done, OnSignal, follow},
    progress::{PATIENCE, SESSION_PATIENCE},
    size::human,
};

/// Bring a directory into a running VM
///
/// The second time, only what has changed is sent. What the guest has changed itself is not overwritten unless --replace says
/// that it may be. Ctrl-C gives it up; what is in the guest by then is replaced by the next attempt.
#[derive(Debug, Args)]
pub(crate) struct PrepareArgs {
    /// The VM
    vm: String,
    /// The directory, or one below it
    #[arg(default_value = ".")]
    path: PathBuf,
    #[command(flatten)]
    import: ImportArgs,
    /// Have it belong to this user of the guest, with UID, USER:GROUP and UID:GID too [default: the image's, else root]
    #[arg(short, long)]
    user: Option<String>,
    /// Throw away what is at the guest path, the guest's own work included
    #[arg(long)]
    replace: bool,
}

impl PrepareArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let request = PrepareWorkspace {
            vm: Some(self.vm),
            user: self.user,
            replace: self.replace,
            ..self.import.request(&self.path)?
        };
        let (client, mut interrupts) = context.client_and_interrupts().await?;
        let Done { result, interrupted } =
            bring(context, &client, request, PATIENCE, &mut interrupts).await?;
        context.output.show(&result, || {
            if context.output.quiet { result.workspace.path.clone() } else { shown(&result) }
        })?;
        match interrupted {
            Some(signal) => Err(CliError::Interrupted { signal, what: "it was done by then".to_owned() }),
            None => Ok(0),
        }
    }
}

/// Brings a workspace into a VM, and tells what is to be known of it.
pub(crate) async fn bring(
    context: &Context,
    client: &Client,
    request: PrepareWorkspace,
    patience: Duration,
    interrupts: &mut Interrupts,
) -> Result<Done<PreparedWorkspace>, CliError> {
    let begun = WorkspacesClient::prepare(client, request).await?;
    let done = follow::<PreparedWorkspace>(
        client,
        begun,
        context.output,
        patience,
        OnSignal::CancelAsOurs,
        interrupts,
    )
    .await?;
    if !context.output.json {
        done.result.warnings.iter().for_each(|warning| context.output.note(&format!("warning: {warning}")));
    }
    Ok(done)
}

/// Sees whether a workspace could be brought into a VM that is still to be made, and its work back; tells what is to be known of that.
pub(crate) async fn check(
    context: &Context,
    client: &Client,
    request: PrepareWorkspace,
    export: Option<&ExportTo>,
    interrupts: &mut Interrupts,
) -> Result<(), CliError> {
    let export = export.map(ExportTo::as_request).transpose()?;
    let begun = WorkspacesClient::check(client, request, export).await?;
    let Done { result: plan, interrupted } = follow::<WorkspacePlan>(
        client,
        begun,
        context.output,
        SESSION_PATIENCE,
        OnSignal::CancelAsOurs,
        interrupts,
    )
    .await?;
    if let Some(signal) = interrupted {
        return Err(CliError::Interrupted { signal, what: "cancelled".to_owned() });
    }
    if !context.output.json {
        plan.warnings.iter().for_each(|warning| context.output.note(&format!("warning: {warning}")));
    }
    Ok(())
}

fn shown(prepared: &PreparedWorkspace) -> String {
    let workspace = &prepared.workspace;
    let what = match &workspace.state {
        WorkspaceState::Prepared { files, bytes: size } => {
            format!("{}, {}", count(*files, "file"), human(*size))
        }
        WorkspaceState::Unfinished { .. } => "unfinished".to_owned(),
    };
    format!("{} ({what}; {}, {} sent)", workspace.path, workspace.way(), human(prepared.sent_bytes))
}
