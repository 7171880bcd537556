//! `vm workspace ls` and `vm workspace status`

use clap::Args;
use vm_api::{
    LookAtWorkspace, WorkspaceChangeKind, WorkspaceRecord, WorkspaceState, WorkspaceStatus,
    rpc::WorkspacesClient,
};

use super::count;
use crate::{
    context::Context,
    errors::CliError,
    operations::{Done, OnSignal, follow},
    output::{ago, facts, for_stdout, table},
    progress::PATIENCE,
    size::human,
};

/// List the workspaces in a VM
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// The VM
    vm: String,
}

impl LsArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        let workspaces = WorkspacesClient::list(&client, self.vm).await?;
        context.output.show(&workspaces, || {
            if context.output.quiet {
                return for_stdout(workspaces.iter().map(|one| format!("{}\n", one.path)).collect());
            }
            let head = ["GUEST PATH", "FROM", "IMPORTER", "BRANCH", "STATE", "WHEN"];
            for_stdout(table(head, workspaces.iter().map(row)))
        })?;
        Ok(0)
    }
}

fn row(workspace: &WorkspaceRecord) -> [String; 6] {
    [
        workspace.path.clone(),
        workspace.source.display().to_string(),
        workspace.way(),
        workspace.branch.clone().unwrap_or_default(),
        match &workspace.state {
            WorkspaceState::Prepared { files, bytes: size } => {
                format!("{}, {}", count(*files, "file"), human(*size))
            }
            WorkspaceState::Unfinished { .. } => "unfinished".to_owned(),
        },
        ago(workspace.at),
    ]
}

/// Show what has changed since a workspace was brought, in the guest and on the host
///
/// Changes of the guest are marked A (added), M (modified), D (deleted), T (another type) and P (permissions).
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// The VM
    vm: String,
    /// The workspace, by its directory in the guest or that one's name; not needed if there is only one
    #[arg(long, value_name = "GUESTPATH")]
    at: Option<String>,
    /// Also files that git ignores in the guest
    #[arg(long)]
    ignored: bool,
}

impl StatusArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let Self { vm, at, ignored } = self;
        let (client, mut interrupts) = context.client_and_interrupts().await?;
        let begun = WorkspacesClient::status(&client, LookAtWorkspace { vm, at, ignored }).await?;
        let Done { result: status, .. } = follow::<WorkspaceStatus>(
            &client,
            begun,
            context.output,
            PATIENCE,
            OnSignal::CancelAsOurs,
            &mut interrupts,
        )
        .await?;
        context.output.show(&status, || for_stdout(shown(&status, context.output.quiet)))?;
        Ok(0)
    }
}

fn shown(status: &WorkspaceStatus, quiet: bool) -> String {
    let guest: String =
        status.guest.iter().map(|change| format!("{} {}\n", letter(change.kind), change.path)).collect();
    if quiet {
        return guest;
    }
    let workspace = &status.workspace;
    let mut text = facts([
        ("workspace", Some(workspace.path.clone())),
        ("from", Some(workspace.source.display().to_string())),
        ("brought", Some(format!("{} by {}", ago(workspace.at), workspace.way()))),
        ("commit", workspace.base.clone()),
    ]);
    text += "\nChanged in the guest:\n";
    text += &indented(guest.lines(), "nothing");
    text += "\nChanged on the host:\n";
    let host = status.host.iter().map(|path| format!("M {path}"));
    let removed =
        status.host_removed.iter().filter(|path| !status.host.contains(path)).map(|path| format!("D {path}"));
    let commits = status.host_commits.then(|| "another commit or branch is checked out".to_owned());
    text += &indented(commits.into_iter().chain(host).chain(removed), "nothing");
    if !status.both.is_empty() {
        text += "\nChanged on both sides:\n";
        text += &indented(&status.both, "");
    }
    for warning in &status.warnings {
        text += &format!("\nwarning: {warning}\n");
    }
    text
}

fn indented<T: std::fmt::Display>(lines: impl IntoIterator<Item = T>, none: &str) -> String {
    let text: String = lines.into_iter().map(|line| format!("  {line}\n")).collect();
    if text.is_empty() { format!("  {none}\n") } else { text }
}

fn letter(kind: WorkspaceChangeKind) -> char {
    match kind {
        WorkspaceChangeKind::Added => 'A',
        WorkspaceChangeKind::Modified => 'M',
        WorkspaceChangeKind::Deleted => 'D',
        WorkspaceChangeKind::TypeChanged => 'T',
        WorkspaceChangeKind::ModeChanged => 'P',
    }
}
