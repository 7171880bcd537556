//! `vm prune`

use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use jsonrpsee::core::client::Client;
use vm_api::{Problem, PruneVms, Pruned, VmInfo, rpc::VmClient};

use super::machine::label;
use crate::{
    confirm,
    context::Context,
    duration,
    errors::CliError,
    interrupts::Interrupts,
    operations::{Done, OnSignal, follow},
    output::{ago, table},
    progress::PATIENCE,
    size::human,
};

/// Delete VMs that are off
///
/// Deletes all that fit every option given, and without any all that are off, with their disks. On a terminal it lists
/// them and asks first; elsewhere it needs --yes.
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Only those that have been off for so long, e.g. 24h
    #[arg(long, value_name = "DURATION", value_parser = duration::seconds)]
    older_than: Option<u64>,
    /// Only those with this label; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Only those that failed
    #[arg(long)]
    failed: bool,
    /// Say which, delete none
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

impl PruneArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        if !self.yes && !self.dry_run && !confirm::can_ask(context.output) {
            return Err(CliError::Usage {
                message: "cannot ask whether VMs may be deleted: there is no terminal, or --json is given"
                    .to_owned(),
                hint: "see which by --dry-run, then say --yes".to_owned(),
            });
        }
        let params = PruneVms {
            older_than_seconds: self.older_than,
            labels: self.labels.into_iter().collect(),
            failed: self.failed,
            dry_run: self.dry_run,
        };
        let (client, mut interrupts) = context.client_and_interrupts().await?;
        let (pruned, interrupted) = if self.yes || self.dry_run {
            prune(context, &client, params, &mut interrupts).await?
        } else {
            let candidates = candidates(context, &client, params, &mut interrupts).await?;
            if !candidates.is_empty() && !ask(&candidates, &mut interrupts).await? {
                context.output.note("nothing was deleted");
                return Ok(0);
            }
            delete(context, &client, candidates, &mut interrupts).await
        };
        context.output.show(&pruned, || text(&pruned, self.dry_run, context.output.quiet))?;
        match (interrupted, pruned.failed.values().next()) {
            (Some(signal), _) => Err(CliError::Interrupted { signal, what: "interrupted".to_owned() }),
            (None, Some(first)) => Err(partly(&pruned, first)),
            (None, None) => Ok(0),
        }
    }
}

async fn prune(
    context: &Context,
    client: &Client,
    params: PruneVms,
    interrupts: &mut Interrupts,
) -> Result<(Pruned, Option<i32>), CliError> {
    let begun = VmClient::prune(client, params).await?;
    let Done { result, interrupted } =
        follow(client, begun, context.output, PATIENCE, OnSignal::Cancel, interrupts).await?;
    Ok((result, interrupted))
}

/// The VMs that would be deleted now.
async fn candidates(
    context: &Context,
    client: &Client,
    params: PruneVms,
    interrupts: &mut Interrupts,
) -> Result<Vec<VmInfo>, CliError> {
    let (dry, _) = prune(context, client, PruneVms { dry_run: true, ..params }, interrupts).await?;
    let names: BTreeSet<_> = dry.deleted.into_iter().collect();
    let mut vms = VmClient::list(client).await?.into_vec();
    vms.retain(|vm| names.contains(&vm.name));
    Ok(vms)
}

/// Shows them, on stderr as the question itself, and waits for the answer.
async fn ask(candidates: &[VmInfo], interrupts: &mut Interrupts) -> Result<bool, CliError> {
    let list = table(
        ["NAME", "STATE", "IMAGE", "DISK", "CREATED"],
        candidates.iter().map(|vm| {
            [
                vm.name.to_string(),
                vm.state.word().to_owned(),
                vm.image.clone(),
                human(vm.disk_used_bytes),
                ago(vm.created_at),
            ]
        }),
    );
    let bytes = candidates.iter().map(|vm| vm.disk_used_bytes).sum();
    let question = format!("{list}Delete {} with {} on disk?", count(candidates.len()), human(bytes));
    confirm::ask(&question, "nothing was deleted", interrupts).await
}

/// Deletes these and no others, however many more are off by now; one that was started meanwhile is refused. A signal ends it,
/// with the deletion at hand going on in the daemon, and is told.
async fn delete(
    context: &Context,
    client: &Client,
    candidates: Vec<VmInfo>,
    interrupts: &mut Interrupts,
) -> (Pruned, Option<i32>) {
    let mut pruned = Pruned { deleted: Vec::new(), failed: BTreeMap::new(), freed_bytes: 0 };
    for vm in candidates {
        let deleted = async {
            let begun = VmClient::delete(client, vm.id.to_string(), false).await?;
            let quiet = crate::output::Output { quiet: true, ..context.output };
            follow::<serde_json::Value>(client, begun, quiet, PATIENCE, OnSignal::Leave, interrupts).await
        };
        match deleted.await {
            Ok(_) => {
                pruned.freed_bytes += vm.disk_used_bytes;
                pruned.deleted.push(vm.name);
            }
            // Somebody else did it.
            Err(error) if error.kind() == vm_api::ErrorKind::NotFound => {}
            Err(CliError::Interrupted { signal, .. }) => return (pruned, Some(signal)),
            Err(error) => {
                let problem = Problem { kind: error.kind(), message: error.message(), hint: error.hint() };
                pruned.failed.insert(vm.name, problem);
            }
        }
    }
    (pruned, None)
}

fn text(pruned: &Pruned, dry_run: bool, quiet: bool) -> String {
    let mut text: String = pruned.deleted.iter().map(|name| format!("{name}\n")).collect();
    if !quiet {
        let (count, bytes) = (count(pruned.deleted.len()), human(pruned.freed_bytes));
        text.push_str(&match (pruned.deleted.is_empty(), dry_run) {
            (true, _) if pruned.failed.is_empty() => "no VM fits\n".to_owned(),
            (_, true) => format!("{count} would be deleted, {bytes} freed\n"),
            (_, false) => format!("{count} deleted, {bytes} freed\n"),
        });
    }
    text
}

fn count(vms: usize) -> String {
    format!("{vms} VM{}", if vms == 1 { "" } else { "s" })
}

fn partly(pruned: &Pruned, first: &Problem) -> CliError {
    let causes: String = pruned.failed.iter().map(|(name, why)| format!("\n  {name}: {why}")).collect();
    let all = pruned.failed.len() + pruned.deleted.len();
    let summary = format!("{} of {all} could not be deleted:{causes}", pruned.failed.len());
    CliError::Partly { summary, hint: first.hint.clone(), kind: first.kind }
}
