//! `vm show`

use clap::Args;
use vm_api::{
    NetworkMode, RestartPolicy, VmInfo, VmState, WorkspaceRecord,
    rpc::{VmClient, WorkspacesClient},
};

use crate::{
    context::Context,
    duration,
    errors::CliError,
    output::{ago, facts, for_stdout, lasting, until},
    size::human,
};

/// Show all about a VM
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// Name or id
    name: String,
}

impl ShowArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        let vm = VmClient::get(&client, self.name).await?;
        // A daemon of before has none.
        let workspaces = match context.output.json {
            true => Vec::new(),
            false => WorkspacesClient::list(&client, vm.id.to_string()).await.unwrap_or_default(),
        };
        // A failure's cause quotes the guest's console.
        context.output.show(&vm, || for_stdout(text(&vm, &workspaces)))?;
        Ok(0)
    }
}

fn text(vm: &VmInfo, workspaces: &[WorkspaceRecord]) -> String {
    let brought = |one: &WorkspaceRecord| format!("{} from {}", one.path, one.source.display());
    let workspaces: Vec<_> = workspaces.iter().map(brought).collect();
    let labels: Vec<_> = vm.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let network = match vm.network {
        NetworkMode::Nat => "nat",
        NetworkMode::None => "none",
    };
    facts([
        ("name", Some(vm.name.to_string())),
        ("id", Some(vm.id.to_string())),
        ("state", Some(state(&vm.state))),
        ("problem", vm.problem.clone()),
        ("image", Some(format!("{} ({})", vm.image, vm.image_digest))),
        ("kernel", Some(vm.kernel.to_string())),
        ("cpus", Some(vm.cpus.to_string())),
        ("memory", Some(human(vm.memory_mib << 20))),
        ("disk", Some(format!("{}, {} used", human(vm.disk_bytes), human(vm.disk_used_bytes)))),
        ("disk limits", disk_limits(vm)),
        ("network", Some(network.to_owned())),
        ("address", vm.address.map(|address| address.to_string())),
        ("labels", (!labels.is_empty()).then(|| labels.join(", "))),
        ("restart", (vm.restart != RestartPolicy::No).then(|| policy(vm.restart).to_owned())),
        ("expires", vm.expires_at.map(until)),
        (
            "idle stop",
            vm.idle_stop_seconds.map(|s| format!("after {} without a connection", duration::human(s))),
        ),
        ("needs restart", needs_restart(vm)),
        ("workspaces", (!workspaces.is_empty()).then(|| workspaces.join("\n"))),
        ("ephemeral", vm.ephemeral.then(|| "yes, deleted with the process that made it".to_owned())),
        ("vmm", Some(vm.vmm.clone())),
        ("created", Some(ago(vm.created_at))),
    ])
}

/// A policy as `--restart` takes it.
pub(crate) fn policy(policy: RestartPolicy) -> &'static str {
    match policy {
        RestartPolicy::No => "no",
        RestartPolicy::OnFailure => "on-failure",
        RestartPolicy::Always => "always",
    }
}

fn disk_limits(vm: &VmInfo) -> Option<String> {
    let bytes = vm.disk_bytes_per_second.map(|bytes| format!("{}/s", human(bytes)));
    let operations = vm.disk_operations_per_second.map(|operations| format!("{operations} operations/s"));
    let limits: Vec<_> = bytes.into_iter().chain(operations).collect();
    (!limits.is_empty()).then(|| limits.join(", "))
}

fn needs_restart(vm: &VmInfo) -> Option<String> {
    let what = vm.needs_restart.join(", ");
    (!what.is_empty()).then(|| format!("for {what}: vm restart {}", vm.name))
}

fn state(state: &VmState) -> String {
    match state {
        VmState::Defined
        | VmState::Creating { .. }
        | VmState::Starting { .. }
        | VmState::Stopping { .. }
        | VmState::Deleting { .. }
        | VmState::Stopped { last_exit: None } => state.word().to_owned(),
        VmState::Stopped { last_exit: Some(exit) } => format!("stopped, its VMM ended with {exit}"),
        VmState::Running { pid, since } => format!("running for {}, process {pid}", lasting(*since)),
        VmState::Paused { pid, since } => format!("paused, up for {}, process {pid}", lasting(*since)),
        VmState::Failed { at, cause } => format!("failed at {}: {cause}", format!("{at:?}").to_lowercase()),
    }
}
