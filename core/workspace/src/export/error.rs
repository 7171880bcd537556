//! What can go wrong when a guest's work is brought back.

use std::{io, path::PathBuf};

use crate::WorkspaceError;

/// Why a guest's work could not be brought back. Paths within a workspace are texts for people.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The host's side of the workspace.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    /// The list of the guest's files is none that a filesystem could give.
    #[error("the guest tells of files that cannot be: {path}: {reason}")]
    Survey {
        /// Which of them.
        path: String,
        /// Why.
        reason: &'static str,
    },
    /// What the guest sent is no archive, or not all of one.
    #[error("the guest's archive is damaged")]
    Archive {
        /// Why.
        source: io::Error,
    },
    /// The guest sent what nobody asked for.
    #[error("the guest sent {path}, which it was not asked for")]
    Unasked {
        /// What.
        path: String,
    },
    /// The guest sends far more than it announced.
    #[error("the guest sends far more than the files had when they were looked at")]
    TooMuch,
    /// Files are still to be fetched.
    #[error("{count} files of the guest were not fetched")]
    NotFetched {
        /// How many.
        count: usize,
    },
    /// The export was begun for something else, so not all was fetched that this needs.
    #[error("the export was not begun for a {what}")]
    NotWished {
        /// What it should have been begun for.
        what: &'static str,
    },
    /// The files in the scratch directory.
    #[error("cannot {action} {path}")]
    Scratch {
        /// What was tried, e.g. `write`.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is to be fetched would fill the disk.
    #[error("the disk of {} has no room for what the guest has changed", path.display())]
    Room {
        /// Where they would be kept meanwhile.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file of the host.
    #[error("cannot {action} {path}")]
    Host {
        /// What was tried, e.g. `write`.
        action: &'static str,
        /// Which file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The commits of the guest cannot be read.
    #[error("the guest's commits cannot be used: {reason}")]
    History {
        /// Why, in git's words.
        reason: String,
    },
    /// Git takes no branch of that name.
    #[error("{name:?} is no name for a branch")]
    BranchName {
        /// It.
        name: String,
    },
    /// The branch has commits that the guest's work does not continue.
    #[error("the branch {name} has commits that the guest's work is not built on")]
    BranchDiverged {
        /// Its name.
        name: String,
    },
    /// The branch is checked out.
    #[error("the branch {name} is checked out in {worktree}")]
    BranchCheckedOut {
        /// Its name.
        name: String,
        /// Where.
        worktree: String,
    },
    /// Git has no place for it.
    #[error("the branch {name} cannot be beside the branch {other}")]
    BranchInTheWay {
        /// Its name.
        name: String,
        /// The one that is there.
        other: String,
    },
    /// Git did not let the guest's commits into the host's repository.
    #[error("git refused the guest's commits: {reason}")]
    Refused {
        /// Why, in git's words.
        reason: String,
    },
    /// The patch could not be passed on.
    #[error("the patch could not be passed on")]
    Output {
        /// Why.
        source: io::Error,
    },
}

impl ExportError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Workspace(error) => return error.hint(),
            Self::Survey { .. } | Self::Unasked { .. } => {
                "something in the guest stands in for its agent: do not trust the guest; vm cp still brings single files"
            }
            Self::Archive { .. } => "see whether the VM still runs (vm status) and try again",
            Self::Room { .. } => {
                "have git in the guest ignore what need not come back, or bring single files with vm cp; or free space on that \
                 disk"
            }
            Self::TooMuch => "stop what writes in the guest meanwhile, and try again",
            Self::NotFetched { .. } | Self::NotWished { .. } => {
                "try again; should it stay so, please report it: it is a defect of vmd"
            }
            Self::Scratch { source, .. } | Self::Host { source, .. }
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                "free space on that disk"
            }
            Self::Scratch { .. } => "check vmd's state directory",
            Self::Host { .. } => {
                "files are read and written with your rights, for root with those of the workspace's owner: check those of the \
                 file and its directory"
            }
            Self::History { .. } => {
                "export the files without commits (--patch, --files or --apply); or mend it in the guest with git fsck"
            }
            Self::BranchName { .. } => "git check-ref-format --branch NAME tells which names git takes",
            Self::BranchDiverged { .. } => "name a new branch, and merge it with git",
            Self::BranchCheckedOut { .. } => {
                "name another branch and merge it with git, or export with --apply"
            }
            Self::BranchInTheWay { .. } => {
                "name another branch: git keeps them as files, and a/b needs a to be a directory"
            }
            Self::Refused { .. } => "export the files without commits (--patch, --files or --apply)",
            Self::Output { .. } => return None,
        };
        Some(text.into())
    }
}
