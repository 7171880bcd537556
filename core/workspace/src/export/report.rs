//! What callers are told of a guest's work.

/// How a path differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChangeKind {
    /// It was not there.
    Added,
    /// Its content.
    Modified,
    /// It is not there any more.
    Deleted,
    /// It was a file and is a link, or the other way round.
    TypeChanged,
    /// Its permission bits, with the same content.
    ModeChanged,
}

/// Something that the guest did.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// Relative to the top.
    pub path: Vec<u8>,
    /// What was done to it.
    pub kind: ChangeKind,
}

/// What a guest's work is wanted for, which decides what is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// [`Export::changes`](super::Export::changes), [`Export::files`](super::Export::files) and
    /// [`Export::apply`](super::Export::apply), which are about files that the guest has changed.
    Files {
        /// Also files that git ignores in the guest.
        ignored: bool,
    },
    /// These but for ignored files, and [`Export::patch`](super::Export::patch), which has what the host had not committed as well.
    Patch,
    /// All these, and [`Export::branch`](super::Export::branch), which has the guest's commits.
    Branch,
}

/// What became of a patch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PatchReport {
    /// How many bytes it has; none if the guest changed nothing.
    pub bytes: u64,
    /// Paths that the host has changed since they were sent, so that there is nothing left to compare the guest's with. Only
    /// where there is no git.
    pub left_out: Vec<Vec<u8>>,
}

/// What became of a branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BranchReport {
    /// The commit that the branch has now; in a dry run the one it would have.
    pub commit: String,
    /// The one it had, if it was there.
    pub before: Option<String>,
    /// The commit that the guest started from.
    pub base: Option<String>,
    /// Commits that are new since the guest started, the next one included.
    pub commits: u64,
    /// Whether the last of them was made now, for what the guest had not committed.
    pub uncommitted: bool,
    /// Whether the guest's history goes on from where it started. It does not after, say, a rebase.
    pub continues: bool,
    /// The branch of the same name in submodules of which the guest has commits that the host did not have.
    pub submodules: Vec<SubmoduleReport>,
}

/// What became of a submodule's branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubmoduleReport {
    /// Where the submodule is, relative to the workspace's top.
    pub path: Vec<u8>,
    /// The commit that the branch has now; in a dry run the one it would have.
    pub commit: String,
    /// The one it had, if it was there.
    pub before: Option<String>,
    /// Commits that are new since the guest started.
    pub commits: u64,
}

/// What became of files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Written, or given other permissions.
    pub written: Vec<Vec<u8>>,
    /// Removed.
    pub removed: Vec<Vec<u8>>,
    /// The host has them as the guest does already.
    pub unchanged: Vec<Vec<u8>>,
    /// The host has changed them as well, and differently: they are left as they are.
    pub conflicts: Vec<Vec<u8>>,
    /// The host's system did not let them be written or removed, and why.
    pub failed: Vec<(Vec<u8>, String)>,
}
