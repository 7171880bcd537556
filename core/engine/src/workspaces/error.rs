//! What can go wrong between a workspace and a VM.

use std::path::PathBuf;

use vm_types::VmName;
use vm_workspace::{WorkspaceError, export::ExportError};

use crate::{ports::ImportFailure, vm::cell::Cell};

/// Why a workspace was not brought in or back.
#[derive(Debug, thiserror::Error)]
pub enum WorkspacesError {
    /// On the host's side.
    #[error(transparent)]
    Host(#[from] WorkspaceError),
    /// Bringing back what the guest has.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The VM has to be up.
    #[error("VM {vm} is {state}; {doing} needs it running")]
    NotUp {
        /// The VM.
        vm: VmName,
        /// The state's word.
        state: &'static str,
        /// What was wanted.
        doing: &'static str,
    },
    /// The VM was stopped, restarted, killed or deleted, or has ended by itself.
    #[error("VM {vm} went down, so {doing} was given up")]
    Down {
        /// The VM.
        vm: VmName,
        /// What was being done.
        doing: &'static str,
    },
    /// No importer, or not the one that was asked for, can do it.
    #[error("{message}")]
    NoOffer {
        /// Which, and why.
        message: String,
        /// What there is.
        hint: String,
    },
    /// The workspace's own settings.
    #[error("{}{}: {message}", path.display(), line.map(|line| format!(", line {line}")).unwrap_or_default())]
    Settings {
        /// The file.
        path: PathBuf,
        /// Where in it, the first line being 1; none where it is all of it.
        line: Option<usize>,
        /// What does not fit.
        message: String,
    },
    /// A directory of the guest that cannot be one of a workspace.
    #[error("a workspace cannot be in {path:?}: {reason}")]
    Destination {
        /// It.
        path: String,
        /// Why.
        reason: &'static str,
    },
    /// A path of the host that depends on where its reader is.
    #[error("{} is no absolute path", path.display())]
    Relative {
        /// It.
        path: PathBuf,
    },
    /// An importer.
    #[error(transparent)]
    Import(Box<ImportError>),
    /// Nothing was brought there.
    #[error("VM {vm} has no workspace{}", at.as_ref().map(|at| format!(" {at}")).unwrap_or_default())]
    NotPrepared {
        /// The VM.
        vm: VmName,
        /// Where it was looked for.
        at: Option<String>,
    },
    /// More than one.
    #[error("VM {vm} has several workspaces: {}", paths.join(", "))]
    Several {
        /// The VM.
        vm: VmName,
        /// Where they are.
        paths: Vec<String>,
    },
    /// It was not brought as a whole, or nobody knows what was.
    #[error("the workspace {path} in VM {vm} is not whole{}", cause.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default())]
    Unfinished {
        /// The VM.
        vm: VmName,
        /// Its directory.
        path: String,
        /// Why.
        cause: Option<String>,
    },
    /// There is no such patch any more.
    #[error("operation {operation} has no patch to be read")]
    NoPatch {
        /// Which.
        operation: vm_types::OperationId,
    },
    /// Files of the daemon's own.
    #[error("could not {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// An import that failed.
#[derive(Debug, thiserror::Error)]
#[error("{way} did not bring {} to {to} in VM {vm}{}", workspace.display(), at_step(.step))]
pub struct ImportError {
    /// `IMPORTER/STRATEGY`.
    pub way: String,
    /// The workspace.
    pub workspace: PathBuf,
    /// Where to.
    pub to: String,
    /// The VM.
    pub vm: VmName,
    /// What it was doing.
    pub step: Option<String>,
    /// What the importer says.
    pub source: ImportFailure,
}

fn at_step(step: &Option<String>) -> String {
    step.as_ref().map(|step| format!(", at the step {step:?}")).unwrap_or_default()
}

impl WorkspacesError {
    pub(super) fn down(cell: &Cell, doing: &'static str) -> Self {
        Self::Down { vm: cell.name().clone(), doing }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Host(error) => error.hint(),
            Self::Export(error) => error.hint(),
            Self::NotUp { vm, state, .. } => Some(match *state {
                "paused" => format!("let it run with `vm resume {vm}`"),
                _ => format!("start it with `vm start {vm}`"),
            }),
            Self::Down { vm, .. } => Some(format!("start it with `vm start {vm}` and try again")),
            Self::NoOffer { hint, .. } => Some(hint.clone()),
            Self::Settings { .. } => Some(
                "it may have one table, [workspace], with `importer`, `to` and `user`, each a text; --importer, --to and --user \
                 count more"
                    .into(),
            ),
            Self::Destination { .. } => Some("name another one with --to, for instance /work/project".into()),
            Self::Relative { .. } => Some("begin it with /".into()),
            Self::Import(error) => error
                .source
                .hint
                .clone()
                .or_else(|| Some(format!("`vm plugin logs {}` has what it said", error.source.plugin))),
            Self::NotPrepared { vm, .. } => Some(format!(
                "`vm workspace ls {vm}` lists those it has, `vm workspace prepare {vm} PATH` brings one"
            )),
            Self::Several { .. } => Some("say which one with --at".into()),
            Self::Unfinished { vm, .. } => Some(format!("`vm workspace prepare {vm} PATH` brings it anew")),
            Self::NoPatch { .. } => Some("it is kept for a while only: export it again".into()),
            Self::File { source, .. } => crate::error::io_hint(source),
        }
    }
}
