//! `vm workspace plan`

use std::path::PathBuf;

use clap::Args;
use vm_api::{WorkspaceFacts, WorkspacePlan, rpc::WorkspacesClient};

use super::{ImportArgs, count};
use crate::{
    context::Context,
    errors::CliError,
    operations::{Done, OnSignal, follow},
    output::{facts, printable, table},
    progress::PATIENCE,
    size::human,
};

/// Show what a directory is and how it would be brought into a VM
///
/// Nothing is brought, and no VM is needed. With --vm it counts what that VM has already.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// The directory, or one below it
    #[arg(default_value = ".")]
    path: PathBuf,
    /// For this VM
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
    #[command(flatten)]
    import: ImportArgs,
    /// Have it belong to this user of the guest
    #[arg(short, long)]
    user: Option<String>,
}

impl PlanArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let mut request = self.import.request(&self.path)?;
        (request.vm, request.user) = (self.vm, self.user);
        let (client, mut interrupts) = context.client_and_interrupts().await?;
        let begun = WorkspacesClient::plan(&client, request).await?;
        let Done { result: plan, .. } = follow::<WorkspacePlan>(
            &client,
            begun,
            context.output,
            PATIENCE,
            OnSignal::CancelAsOurs,
            &mut interrupts,
        )
        .await?;
        context.output.show(&plan, || shown(&plan, context.output.quiet))?;
        Ok(0)
    }
}

fn shown(plan: &WorkspacePlan, quiet: bool) -> String {
    let chosen = plan.chosen.clone().unwrap_or_default();
    if quiet {
        return chosen;
    }
    let about = &plan.facts;
    let mut text = facts([
        ("workspace", Some(about.path.display().to_string())),
        ("git", about.is_git.then(|| git(about))),
        ("changes", about.is_git.then(|| changes(about))),
        ("submodules", (!about.submodules.is_empty()).then(|| about.submodules.join(", "))),
        ("special", special(about)),
        ("size", Some(format!("{}, {}", count(about.files, "file"), human(about.bytes)))),
        ("settings", plan.settings.as_ref().map(|path| path.display().to_string())),
        ("guest path", Some(plan.to.clone())),
        ("guest user", plan.user.clone()),
        (
            "importer",
            Some(match &plan.chosen {
                Some(chosen) => format!("{chosen} ({})", plan.why),
                None => format!("none: {}", plan.why),
            }),
        ),
    ]);
    if !plan.offers.is_empty() {
        text.push('\n');
        text += &table(
            ["IMPORTER", "SCORE", "WHAT IT BRINGS"],
            plan.offers.iter().map(|offer| {
                let mark = if Some(offer.way()) == plan.chosen { " *" } else { "" };
                [format!("{}{mark}", offer.way()), offer.score.to_string(), offer.description.clone()]
            }),
        );
    }
    let warned = plan.offers.iter().filter(|offer| Some(offer.way()) == plan.chosen);
    let warnings =
        about.warnings.iter().chain(warned.flat_map(|offer| &offer.warnings)).chain(&plan.failures);
    for (at, warning) in warnings.enumerate() {
        if at == 0 {
            text.push('\n');
        }
        text += &format!("warning: {warning}\n");
    }
    printable(&text)
}

fn git(about: &WorkspaceFacts) -> String {
    let head = about.head.as_deref().map(|head| head.get(..12).unwrap_or(head));
    match (&about.branch, head) {
        (Some(branch), Some(head)) => format!("{branch} at {head}"),
        (Some(branch), None) => format!("{branch}, without a commit yet"),
        (None, head) => format!("detached at {}", head.unwrap_or("nothing")),
    }
}

fn changes(about: &WorkspaceFacts) -> String {
    let all = [(about.modified, "modified"), (about.deleted, "deleted"), (about.untracked, "untracked")];
    let some: Vec<_> =
        all.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    if some.is_empty() { "none".to_owned() } else { some.join(", ") }
}

fn special(about: &WorkspaceFacts) -> Option<String> {
    let all = [
        (about.lfs, "Git LFS"),
        (about.worktree, "linked worktree"),
        (about.sparse, "sparse checkout"),
        (about.shallow, "shallow"),
    ];
    let some: Vec<_> = all.iter().filter(|(is, _)| *is).map(|(_, what)| *what).collect();
    (!some.is_empty()).then(|| some.join(", "))
}
