//! What can go wrong with a workspace, and what its user can do about it.

use std::{io, path::PathBuf};

use crate::git::GitError;

/// Why a workspace could not be looked at, packed or brought back. Paths within a workspace are texts for people.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    /// The path cannot be looked at.
    #[error("{path} cannot be opened")]
    Open {
        /// It.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path is one of something else.
    #[error("{path} is no directory")]
    NotADirectory {
        /// It.
        path: PathBuf,
    },
    /// A repository without a working tree.
    #[error("{path} is a bare repository: it has no files that could go into a guest")]
    Bare {
        /// It.
        path: PathBuf,
    },
    /// The path is one within a repository's `.git`.
    #[error("{path} is within git's own directory")]
    WithinGit {
        /// It.
        path: PathBuf,
    },
    /// Git does not trust the repository, as it is somebody else's.
    #[error("the repository at {path} belongs to another user than {user}, so git does not use it")]
    ForeignRepository {
        /// It.
        path: PathBuf,
        /// Who asked.
        user: String,
    },
    /// Git did not do it.
    #[error("git failed while {doing}")]
    Git {
        /// What was being done, for people.
        doing: &'static str,
        /// How.
        source: GitError,
    },
    /// Git said what it never says.
    #[error("git said something unexpected while {doing}: {said:?}")]
    GitOutput {
        /// What was being done, for people.
        doing: &'static str,
        /// The beginning of what it said.
        said: String,
    },
    /// Nothing was committed yet.
    #[error("{path} has no commit yet")]
    NoCommit {
        /// The top.
        path: PathBuf,
    },
    /// It is no repository.
    #[error("{path} is no git repository")]
    NotARepository {
        /// The top.
        path: PathBuf,
    },
    /// The commit that the guest was given is not there any more.
    #[error("the host's repository does not have commit {commit} any more")]
    BaseGone {
        /// It.
        commit: String,
    },
    /// A file cannot be read.
    #[error("{path} cannot be read")]
    Read {
        /// It.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// There is no such file in the workspace.
    #[error("{path} is no file of the workspace")]
    NoSuchFile {
        /// What was asked for.
        path: String,
    },
    /// A file was written to whenever it was read.
    #[error("{path} kept changing while it was read")]
    Changing {
        /// It.
        path: String,
    },
    /// What was packed or made could not be handed on.
    #[error("what was packed could not be passed on")]
    Output {
        /// Why.
        source: io::Error,
    },
    /// Files could not be made in the scratch directory.
    #[error("the scratch directory {path} cannot be used")]
    Scratch {
        /// It, or what is in it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another user's rights could not be taken.
    #[error("could not act as user {uid}")]
    Identity {
        /// Of that user.
        uid: u32,
        /// Why.
        source: io::Error,
    },
    /// The record of what a guest was given cannot be read or written.
    #[error("the record {path} of what the guest was given cannot be used")]
    Baseline {
        /// It.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A later version wrote it.
    #[error(
        "the record {path} of what the guest was given has version {version}, which this vmd does not know"
    )]
    BaselineVersion {
        /// It.
        path: PathBuf,
        /// Its.
        version: u32,
    },
    /// The guest was not told or did not answer.
    #[error("the guest could not be asked about its files")]
    Ask {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The work was given up because nobody waits for it any more.
    #[error("cancelled")]
    Cancelled,
}

impl WorkspaceError {
    pub(crate) fn git(doing: &'static str) -> impl Fn(GitError) -> Self {
        move |source| match source {
            GitError::Cancelled => Self::Cancelled,
            source => Self::Git { doing, source },
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Open { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => "check the path; it is one of the host that vmd runs on",
                _ => {
                    "vmd looks at it with your rights: give yourself access to it, and to the directories above"
                }
            },
            Self::NotADirectory { .. } => "name a directory; single files go into a guest with vm cp",
            Self::Bare { .. } => "name a working tree: git clone it, or git worktree add one",
            Self::WithinGit { .. } => "name the working tree that it belongs to",
            Self::ForeignRepository { path, .. } => {
                return Some(format!(
                    "if you trust it: git config --global --add safe.directory '{}'",
                    path.display()
                ));
            }
            Self::Git { source, .. } => return source.hint(),
            Self::GitOutput { .. } => {
                "this is a defect of vmd, or git is very old: please report it with the output of git version"
            }
            Self::NoCommit { .. } => {
                "commit something first, or use the importer copy, which needs no history"
            }
            Self::NotARepository { .. } => "use the importer copy or export as files: both work without git",
            Self::BaseGone { .. } => {
                "bring the work back with vm workspace export VM --files DIR first; then prepare the workspace anew"
            }
            Self::Read { source, .. } | Self::Scratch { source, .. } | Self::Baseline { source, .. }
                if source.kind() == io::ErrorKind::StorageFull =>
            {
                "free space on that disk"
            }
            Self::Read { .. } => {
                "files are read with your rights: make it readable, or have git ignore it (.gitignore)"
            }
            Self::NoSuchFile { .. } => {
                "vm workspace plan shows the files; those that git ignores are not among them"
            }
            Self::Changing { .. } => {
                "stop what writes to it meanwhile, or have git ignore it (.gitignore); then try again"
            }
            Self::Output { .. } => return None,
            Self::Scratch { .. } => "vmd's state directory must let the users of vm pass (mode 0711)",
            Self::Identity { .. } => {
                "run vmd as root without a limit on changing users, or as the one user it serves"
            }
            Self::Baseline { .. } => "check vmd's state directory; or prepare the workspace anew",
            Self::BaselineVersion { .. } => "run the later vmd again, or prepare the workspace anew",
            Self::Ask { .. } => "see whether the VM still runs: vm status; then try again",
            Self::Cancelled => return None,
        };
        Some(text.into())
    }
}
