//! Opens a workspace: what it is, and which files it has.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use vm_types::workspace::WorkspaceFacts;

use crate::{
    Cancel, Entry, EntryKind, Git, GitError, Identity, Tree, WorkspaceError, listing,
    text::{path as of_bytes, shown},
};

/// A repository, or a directory without one, as it was when it was opened. Files are looked at anew when they are read.
#[derive(Debug)]
pub struct Workspace {
    top: PathBuf,
    identity: Identity,
    git: Git,
    cancel: Cancel,
    scratch: PathBuf,
    facts: WorkspaceFacts,
    entries: Vec<Entry>,
    repositories: Vec<Repository>,
}

/// A working tree that git knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Repository {
    /// Where it is within the workspace; empty for the workspace's own.
    pub(crate) path: Vec<u8>,
    /// The same on the host.
    pub(crate) directory: PathBuf,
    /// What `.git` is, or leads to.
    pub(crate) git_directory: PathBuf,
    /// The same, or of a linked working tree that of the repository it is linked to.
    pub(crate) common_directory: PathBuf,
    /// `sha1` or `sha256`.
    pub(crate) format: String,
    /// The commit checked out.
    pub(crate) head: Option<String>,
    /// The branch checked out, without `refs/heads/`.
    pub(crate) branch: Option<Vec<u8>>,
    /// Whether its history is cut off.
    pub(crate) shallow: bool,
    /// What it is to the one above.
    pub(crate) place: Place,
}

/// What a repository is to the one that it lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// None lies above: the workspace's own.
    Top,
    /// A submodule.
    Submodule,
    /// Git knows nothing of it there.
    Stray,
}

impl Workspace {
    /// Looks at what has the path: the working tree that it is in, or the directory itself where there is none. Files that
    /// are made on the way are made below `scratch`, a directory that the identity can pass through, and removed.
    ///
    /// Of a repository it has what git keeps, as it is on the disk, and what git neither keeps nor ignores; what git ignores
    /// is not even looked at. Submodules are such repositories in turn. Of a repository that lies in another without being a
    /// submodule there are the files, but never its `.git`. A directory without git has all that is in it.
    ///
    /// # Errors
    /// A path of something else than a directory, a bare repository, one that git does not trust, what cannot be read, and
    /// git's own.
    pub fn open(
        path: &Path,
        identity: Identity,
        scratch: &Path,
        cancel: Cancel,
    ) -> Result<Self, WorkspaceError> {
        let named = identity.act(|| canonical(path))?;
        let git = Git::new(identity.clone(), cancel.clone());
        let mut facts = WorkspaceFacts::default();
        let found = match discover(&git, &named, &identity) {
            // Without git nothing is a repository, unless it looks like one.
            Err(WorkspaceError::Git { source: GitError::NotInstalled, .. })
                if !named.ancestors().any(|above| fs::symlink_metadata(above.join(".git")).is_ok()) =>
            {
                None
            }
            found => found?,
        };
        let top = found.as_ref().map_or(&named, |repository| &repository.directory).clone();
        let listed = match &found {
            Some(repository) => listing::of_repository(&git, &identity, repository, &cancel, &mut facts)?,
            None => identity.act(|| listing::of_directory(&top, &cancel))?,
        };
        if let Some(repository) = found {
            facts.is_git = true;
            facts.head.clone_from(&repository.head);
            facts.branch = repository.branch.as_deref().map(shown);
            facts.detached = repository.branch.is_none();
            facts.worktree = repository.git_directory != repository.common_directory;
            facts.shallow = repository.shallow;
        }
        facts.name = shown(top.file_name().unwrap_or(OsStr::new("root")).as_bytes());
        facts.path.clone_from(&top);
        let sent = listed.entries.iter().filter(|entry| entry.kind != EntryKind::Directory);
        (facts.files, facts.bytes) =
            sent.fold((0, 0), |(files, bytes), entry| (files + 1, bytes + entry.size));
        facts.warnings.extend(listed.warnings);
        Ok(Self {
            top,
            identity,
            git,
            cancel,
            scratch: scratch.to_owned(),
            facts,
            entries: listed.entries,
            repositories: listed.repositories,
        })
    }

    /// Its top, without links on the way.
    pub fn top(&self) -> &Path {
        &self.top
    }

    /// What it is.
    pub fn facts(&self) -> &WorkspaceFacts {
        &self.facts
    }

    /// Files, links, and the directories that have them, sorted by the bytes of their paths; of a directory without git also
    /// those that are empty.
    pub fn files(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry with a path.
    pub fn entry(&self, path: &[u8]) -> Option<&Entry> {
        self.entries
            .binary_search_by(|entry| entry.path.as_slice().cmp(path))
            .ok()
            .map(|at| &self.entries[at])
    }

    /// The first bytes of a file, `limit` at most.
    ///
    /// # Errors
    /// No file of the workspace has the path, or it cannot be read.
    pub fn read_file(&self, path: &[u8], limit: u64) -> Result<Vec<u8>, WorkspaceError> {
        let missing = || WorkspaceError::NoSuchFile { path: shown(path) };
        self.entry(path).filter(|entry| entry.kind == EntryKind::File).ok_or_else(missing)?;
        self.identity.act(|| {
            let failed = |source| WorkspaceError::Read { path: shown(path), source };
            let file = self.tree()?.file(path).map_err(failed)?.ok_or_else(missing)?;
            let mut content = Vec::new();
            file.take(limit).read_to_end(&mut content).map_err(failed)?;
            Ok(content)
        })
    }

    /// The commit checked out.
    pub fn head(&self) -> Option<&str> {
        self.own().and_then(|repository| repository.head.as_deref())
    }

    /// The branch checked out, without `refs/heads/`.
    pub fn branch(&self) -> Option<&[u8]> {
        self.own().and_then(|repository| repository.branch.as_deref())
    }

    /// How git names objects: `sha1` or `sha256`. `None` without git.
    pub fn object_format(&self) -> Option<&str> {
        self.own().map(|repository| repository.format.as_str())
    }

    /// The directory with the repository's objects and branches. `None` without git.
    pub fn git_common_directory(&self) -> Option<&Path> {
        self.own().map(|repository| repository.common_directory.as_path())
    }

    /// Paths of the submodules that are checked out, those within others included.
    pub fn submodules(&self) -> impl Iterator<Item = &[u8]> {
        let submodules = self.repositories.iter().filter(|repository| repository.place == Place::Submodule);
        submodules.map(|repository| repository.path.as_slice())
    }

    /// Git, as who asked.
    pub fn git(&self) -> &Git {
        &self.git
    }

    /// Who asked.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What ends the work.
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// The tree below the top. To be opened and used within [`Identity::act`].
    ///
    /// # Errors
    /// The top is not there any more.
    pub fn tree(&self) -> Result<Tree, WorkspaceError> {
        Tree::open(&self.top).map_err(|source| WorkspaceError::Open { path: self.top.clone(), source })
    }

    /// A new directory of the identity's in the scratch directory, which vanishes with the value.
    ///
    /// # Errors
    /// It cannot be made, or the identity does not reach it.
    pub fn scratch(&self) -> Result<tempfile::TempDir, WorkspaceError> {
        let failed = |source| WorkspaceError::Scratch { path: self.scratch.clone(), source };
        let made = tempfile::Builder::new().prefix("workspace-").tempdir_in(&self.scratch).map_err(failed)?;
        if !self.identity.is_own() {
            std::os::unix::fs::chown(made.path(), Some(self.identity.uid), Some(self.identity.gid))
                .map_err(failed)?;
        }
        self.identity.act(|| fs::read_dir(made.path()).map(drop).map_err(failed))?;
        Ok(made)
    }

    /// The repository that the workspace is, then those within it.
    pub(crate) fn repositories(&self) -> &[Repository] {
        &self.repositories
    }

    pub(crate) fn own(&self) -> Option<&Repository> {
        self.repositories.first().filter(|repository| repository.place == Place::Top)
    }
}

fn canonical(path: &Path) -> Result<PathBuf, WorkspaceError> {
    let failed = |source| WorkspaceError::Open { path: path.to_owned(), source };
    let path = fs::canonicalize(path).map_err(failed)?;
    if fs::metadata(&path).map_err(failed)?.is_dir() {
        Ok(path)
    } else {
        Err(WorkspaceError::NotADirectory { path })
    }
}

const LOOKING: &str = "looking at the repository";

/// The repository that a directory is in.
fn discover(git: &Git, directory: &Path, identity: &Identity) -> Result<Option<Repository>, WorkspaceError> {
    let kinds = ["--is-bare-repository", "--is-inside-git-dir"];
    let said = match git.at(directory).arg("rev-parse").args(kinds).line() {
        Ok(said) => said,
        Err(error) if error.stderr().contains("not a git repository (or any") => return Ok(None),
        Err(error) if error.stderr().contains("dubious ownership") => {
            return Err(WorkspaceError::ForeignRepository {
                path: directory.to_owned(),
                user: identity.name(),
            });
        }
        Err(error) => return Err(WorkspaceError::git(LOOKING)(error)),
    };
    let mut answers = said.split(|byte| *byte == b'\n').map(|answer| answer == b"true");
    if answers.next() == Some(true) {
        return Err(WorkspaceError::Bare { path: directory.to_owned() });
    }
    if answers.next() == Some(true) {
        return Err(WorkspaceError::WithinGit { path: directory.to_owned() });
    }
    let top = git
        .at(directory)
        .args(["rev-parse", "--show-toplevel"])
        .line()
        .map_err(WorkspaceError::git(LOOKING))?;
    describe(git, of_bytes(&top), Vec::new(), Place::Top).map(Some)
}

/// What git says of the working tree whose top the directory is.
pub(crate) fn describe(
    git: &Git,
    directory: &Path,
    path: Vec<u8>,
    place: Place,
) -> Result<Repository, WorkspaceError> {
    let failed = WorkspaceError::git(LOOKING);
    let ask = |args: &[&str]| git.at(directory).arg("rev-parse").args(args);
    let one = |args: &[&str]| ask(args).line().map_err(&failed);
    let said = one(&["--is-shallow-repository", "--show-object-format"])?;
    let said = String::from_utf8_lossy(&said).into_owned();
    let (shallow, format) = said
        .split_once('\n')
        .filter(|(shallow, format)| {
            matches!(*shallow, "true" | "false") && matches!(*format, "sha1" | "sha256")
        })
        .ok_or_else(|| WorkspaceError::GitOutput { doing: LOOKING, said: said.clone() })?;
    let head = ask(&["--verify", "--quiet", "HEAD^{commit}"]).find().map_err(&failed)?;
    let reference = git.at(directory).args(["symbolic-ref", "--quiet", "HEAD"]).find().map_err(&failed)?;
    Ok(Repository {
        path,
        directory: directory.to_owned(),
        git_directory: of_bytes(&one(&["--absolute-git-dir"])?).to_owned(),
        common_directory: of_bytes(&one(&["--path-format=absolute", "--git-common-dir"])?).to_owned(),
        format: format.to_owned(),
        head: head.map(|head| String::from_utf8_lossy(&head).into_owned()),
        branch: reference.and_then(|name| Some(name.strip_prefix(b"refs/heads/")?.to_vec())),
        shallow: shallow == "true",
        place,
    })
}

/// For errors of reading.
pub(crate) fn unreadable(path: &[u8]) -> impl Fn(io::Error) -> WorkspaceError + '_ {
    move |source| WorkspaceError::Read { path: shown(path), source }
}
