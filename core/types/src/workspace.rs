//! Workspaces as people are told of them.

mod record;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::record::*;

/// What a directory of the host is that is to go into a guest. Texts are for people: bytes that are no UTF-8 are replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkspaceFacts {
    /// Its top: of a repository the working tree's, also where a directory below it was named.
    pub path: PathBuf,
    /// The name of that directory.
    pub name: String,
    /// Whether git knows it.
    pub is_git: bool,
    /// The commit checked out; absent before the first one.
    pub head: Option<String>,
    /// The branch checked out, without `refs/heads/`, also one that has no commit yet.
    pub branch: Option<String>,
    /// Whether a commit is checked out, not a branch.
    pub detached: bool,
    /// Files that git keeps and that differ from the commit, those of submodules included.
    pub modified: u64,
    /// Files that git neither keeps nor ignores.
    pub untracked: u64,
    /// Files that git keeps and that are not there.
    pub deleted: u64,
    /// Paths of the submodules, also of those that are not checked out.
    pub submodules: Vec<String>,
    /// Whether Git LFS keeps some of its files.
    pub lfs: bool,
    /// Whether it is a linked working tree (git-worktree(1)).
    pub worktree: bool,
    /// Whether it is a sparse checkout.
    pub sparse: bool,
    /// Whether its history is cut off.
    pub shallow: bool,
    /// Files and links that would be sent.
    pub files: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// What is not sent, or not as one might think.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl WorkspaceFacts {
    /// Whether the files differ from the commit checked out.
    pub fn dirty(&self) -> bool {
        self.modified + self.untracked + self.deleted > 0
    }
}
