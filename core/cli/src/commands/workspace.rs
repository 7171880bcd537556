//! `vm workspace`

mod export;
mod plan;
mod prepare;
mod show;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use vm_api::PrepareWorkspace;

pub(crate) use self::{
    export::{ExportTo, Exported},
    prepare::{bring, check},
};
use crate::{context::Context, errors::CliError};

/// Bring directories of the host into VMs, and the work done there back
///
/// A workspace is a directory of the host, of a git repository all of its working tree, with
/// what is not committed and without what git ignores. Importers are plugins; `vm workspace
/// plan` shows what they offer. A file vm.toml at the top of a workspace may say what is to be
/// taken where nobody says otherwise:
///
///     [workspace]
///     importer = "git/full"
///     to = "/srv/project"
///     user = "dev"
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct WorkspaceArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Plan(plan::PlanArgs),
    Prepare(prepare::PrepareArgs),
    #[command(visible_alias = "list")]
    Ls(show::LsArgs),
    Status(show::StatusArgs),
    Diff(export::DiffArgs),
    Export(export::ExportArgs),
}

impl WorkspaceArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        match self.verb {
            Verb::Plan(args) => args.run(context).await,
            Verb::Prepare(args) => args.run(context).await,
            Verb::Ls(args) => args.run(context).await,
            Verb::Status(args) => args.run(context).await,
            Verb::Diff(args) => args.run(context).await,
            Verb::Export(args) => args.run(context).await,
        }
    }
}

/// How a workspace is brought in, shared by `plan`, `prepare` and `run`.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ImportArgs {
    /// Bring it to this directory of the guest [default: /work/NAME]
    #[arg(long, value_name = "GUESTPATH")]
    pub(crate) to: Option<String>,
    /// Have this importer bring it [default: the one that fits best]
    #[arg(long, value_name = "NAME[/STRATEGY]")]
    pub(crate) importer: Option<String>,
    /// Bring all of the history, not only the last commit
    #[arg(long)]
    pub(crate) full: bool,
}

impl ImportArgs {
    /// Whether any of them is given.
    pub(crate) fn is_given(&self) -> bool {
        self.to.is_some() || self.importer.is_some() || self.full
    }

    /// The request for a directory.
    pub(crate) fn request(self, path: &Path) -> Result<PrepareWorkspace, CliError> {
        let Self { to, importer, full } = self;
        Ok(PrepareWorkspace { path: whole(path)?, to, importer, full, ..PrepareWorkspace::default() })
    }
}

/// A path, which need not be there yet, as the daemon understands it.
fn whole(path: &Path) -> Result<PathBuf, CliError> {
    let path =
        std::path::absolute(path).map_err(|source| CliError::File { path: path.to_owned(), source })?;
    match path.to_str() {
        Some(_) => Ok(path),
        None => Err(CliError::Usage {
            message: format!("the path {} is not UTF-8", path.display()),
            hint: "only what is in a workspace may have such names: give the directory another one"
                .to_owned(),
        }),
    }
}

/// A number of things.
fn count(count: u64, one: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") }
}
