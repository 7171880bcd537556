//! What requests about workspaces hold. Answers are in `vm_types::workspace`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use vm_types::workspace::{
    ExportOutcome, PreparedWorkspace, SubmoduleBranch, WorkspaceChange, WorkspaceChangeKind, WorkspaceExport,
    WorkspaceFacts, WorkspaceOffer, WorkspacePlan, WorkspaceRecord, WorkspaceState, WorkspaceStatus,
};

/// A workspace to bring into a VM. What is left out is taken from the workspace's own `vm.toml`, then from what importers
/// offer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PrepareWorkspace {
    /// A directory of the host, absolute; of a repository all of the working tree is meant. It is looked at with the rights of
    /// whoever asks.
    pub path: PathBuf,
    /// The VM. To plan, it is not needed.
    pub vm: Option<String>,
    /// The directory in the guest, absolute; `/work/NAME` if nobody says otherwise.
    pub to: Option<String>,
    /// `IMPORTER` or `IMPORTER/STRATEGY`.
    pub importer: Option<String>,
    /// All of the history.
    pub full: bool,
    /// The guest's user that it shall belong to: name or number, with or without `:GROUP`.
    pub user: Option<String>,
    /// What is at the directory may be thrown away.
    pub replace: bool,
}

/// A workspace that was brought into a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LookAtWorkspace {
    /// The VM.
    pub vm: String,
    /// Its directory in the guest, or that one's name; not needed where there is only one.
    pub at: Option<String>,
    /// Also files that git ignores in the guest.
    pub ignored: bool,
}

/// What a guest has made of a workspace, back to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportWorkspace {
    /// The VM.
    pub vm: String,
    /// Its directory in the guest, or that one's name; not needed where there is only one.
    #[serde(default)]
    pub at: Option<String>,
    /// As what.
    pub to: ExportAs,
    /// Look what would be done, and write nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// As what a guest's work comes back. Everything is written with the rights of whoever asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "how", rename_all = "snake_case", deny_unknown_fields)]
pub enum ExportAs {
    /// A patch against the commit it was brought at, or against the files that were sent where there is no git; to be read with
    /// `workspace.read_patch`.
    Patch,
    /// A branch of the host's repository, which is made or moved forward.
    Branch {
        /// Its name, without `refs/heads/`.
        name: String,
        /// Of the commit for what the guest has not committed.
        #[serde(default)]
        message: Option<String>,
    },
    /// The files that were changed or made, in a directory.
    Files {
        /// It, absolute; made if it is not there.
        directory: PathBuf,
        /// Also files that git ignores in the guest.
        #[serde(default)]
        ignored: bool,
    },
    /// The workspace's own files. What the host has changed meanwhile is left alone.
    Apply,
}

/// A piece of a patch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PatchPiece {
    /// Its bytes in Base64, which are not text everywhere; none at the end.
    pub base64: String,
}
