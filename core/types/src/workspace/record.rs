//! What was brought into VMs, what would be, and what has become of it: records and answers.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::WorkspaceFacts;

/// A workspace in a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkspaceRecord {
    /// Its directory in the guest, absolute. A VM has one workspace in a directory.
    pub path: String,
    /// The top on the host that it came from.
    pub source: PathBuf,
    /// Whether git knows that.
    pub is_git: bool,
    /// The plugin that brought it.
    pub importer: String,
    /// The plugin's name for the way it did.
    pub strategy: String,
    /// The commit that was checked out on the host.
    pub base: Option<String>,
    /// The branch, without `refs/heads/`.
    pub branch: Option<String>,
    /// The guest's user that it belongs to.
    pub user: String,
    /// The host's user that asked, by number.
    pub by: u32,
    /// When it was brought, or begun to be, seconds since the Unix epoch.
    pub at: u64,
    /// Whether all of it is there.
    #[serde(flatten)]
    pub state: WorkspaceState,
}

/// Whether a workspace is in its VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum WorkspaceState {
    /// All of it, and what was sent is recorded.
    Prepared {
        /// Files and links that were sent, those of earlier times included.
        files: u64,
        /// Their size in bytes.
        bytes: u64,
    },
    /// An import is at work, or has broken off: what is there is of no use until the next one.
    Unfinished {
        /// Why it broke off, for people. Absent while it is at work, and where the daemon ended meanwhile.
        cause: Option<String>,
    },
}

impl WorkspaceRecord {
    /// The importer with its strategy, as people name both: `git/shallow`.
    pub fn way(&self) -> String {
        way(&self.importer, &self.strategy)
    }
}

fn way(importer: &str, strategy: &str) -> String {
    format!("{importer}/{strategy}")
}

/// A way to bring a workspace into a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkspaceOffer {
    /// The plugin that would.
    pub importer: String,
    /// Its name for the way.
    pub strategy: String,
    /// 0 is a last resort, 100 a perfect fit.
    pub score: u32,
    /// What would be brought.
    pub description: String,
    /// What people should know before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl WorkspaceOffer {
    /// As people name it: `git/shallow`.
    pub fn way(&self) -> String {
        way(&self.importer, &self.strategy)
    }
}

/// What would be done with a workspace: the result of `workspace.plan` and `workspace.check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkspacePlan {
    /// The workspace.
    pub facts: WorkspaceFacts,
    /// Where it would be in the guest.
    pub to: String,
    /// Whose it would be there; the VM's own choice if absent.
    pub user: Option<String>,
    /// What importers offer, the best first.
    pub offers: Vec<WorkspaceOffer>,
    /// The one that would be taken, as `IMPORTER/STRATEGY`; none where none is fit.
    pub chosen: Option<String>,
    /// Why, or why none.
    pub why: String,
    /// The workspace's own settings, if it has some.
    pub settings: Option<PathBuf>,
    /// Importers that could not say what they would do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<String>,
    /// What people should know beforehand of bringing the work back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A workspace that was brought into a VM: the result of `workspace.prepare`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PreparedWorkspace {
    /// It.
    pub workspace: WorkspaceRecord,
    /// What was brought this time, bytes of archives.
    pub sent_bytes: u64,
    /// What people should know of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What has become of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkspaceChangeKind {
    /// It is new.
    Added,
    /// It has another content.
    Modified,
    /// It is gone.
    Deleted,
    /// It is another kind of thing: a link in place of a file.
    TypeChanged,
    /// It has other permissions.
    ModeChanged,
}

/// A path of a workspace that has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkspaceChange {
    /// Relative to the top; bytes that are no UTF-8 are replaced.
    pub path: String,
    /// How.
    pub kind: WorkspaceChangeKind,
}

/// What has changed since a workspace was brought: the result of `workspace.status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkspaceStatus {
    /// The workspace.
    pub workspace: WorkspaceRecord,
    /// In the guest.
    pub guest: Vec<WorkspaceChange>,
    /// Paths that the host has changed and would send again.
    pub host: Vec<String>,
    /// Paths that are gone from the host.
    pub host_removed: Vec<String>,
    /// Whether the host has another commit or branch checked out.
    pub host_commits: bool,
    /// Of both, those that the guest has changed, too.
    pub both: Vec<String>,
    /// What people should know of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What came out of a guest: the result of `workspace.export`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkspaceExport {
    /// The workspace.
    pub workspace: WorkspaceRecord,
    /// What was done with it, or would be.
    #[serde(flatten)]
    pub outcome: ExportOutcome,
    /// Nothing was written.
    pub dry_run: bool,
    /// What is not quite as in the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What an export has done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum ExportOutcome {
    /// A patch for `git apply --binary` is ready to be read with `workspace.read_patch`.
    Patch {
        /// Its size; none if the guest changed nothing.
        bytes: u64,
        /// Paths that the host has changed as well, so that there is nothing to compare the guest's with. Only without git.
        left_out: Vec<String>,
    },
    /// A branch of the host's repository.
    Branch {
        /// Its name, without `refs/heads/`.
        branch: String,
        /// The commit it has now, or would have.
        commit: String,
        /// The one it had, if it was there.
        before: Option<String>,
        /// Commits since the workspace was brought, the next one included.
        commits: u64,
        /// Whether the last of them was made now, for what the guest had not committed.
        uncommitted: bool,
        /// Whether the guest's history goes on from where it started, which it does not after, say, a rebase.
        continues: bool,
        /// The same branch of submodules' repositories, where the guest has commits in them that the host had not.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        submodules: Vec<SubmoduleBranch>,
    },
    /// Files of the host, of a directory or of the workspace itself.
    Files {
        /// Where.
        directory: PathBuf,
        /// Paths that were written, or given other permissions.
        written: Vec<String>,
        /// Paths that were removed.
        removed: Vec<String>,
        /// How many were as in the guest already.
        unchanged: u64,
        /// Paths that the host has changed itself, and differently: they were left alone.
        conflicts: Vec<String>,
        /// Paths that the host's system did not let be written or removed, with the reason.
        failed: Vec<(String, String)>,
    },
}

/// A branch of a submodule's repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SubmoduleBranch {
    /// Where the submodule is in the workspace.
    pub path: String,
    /// The commit that the branch has now, or would have.
    pub commit: String,
    /// The one it had, if it was there.
    pub before: Option<String>,
    /// Commits since the workspace was brought.
    pub commits: u64,
}

impl ExportOutcome {
    /// Whether all that was wanted is on the host.
    pub fn whole(&self) -> bool {
        match self {
            Self::Patch { left_out, .. } => left_out.is_empty(),
            Self::Branch { .. } => true,
            Self::Files { conflicts, failed, .. } => conflicts.is_empty() && failed.is_empty(),
        }
    }
}
