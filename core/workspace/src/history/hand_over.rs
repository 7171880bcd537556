//! History and changes in git's own forms: a bundle, a patch.

use std::{
    ffi::OsStr,
    io::{Read, Write},
    os::unix::ffi::OsStrExt,
};

use crate::{
    Workspace, WorkspaceError,
    facts::Repository,
    files::open_regular,
    git::passed_on,
    history::build,
    listing::{Change, status},
};

/// More than the index of any repository that git can work with, in bytes.
const LARGEST_INDEX: u64 = 4 << 30;

/// The tree without entries, as git names it.
fn empty_tree(repository: &Repository) -> &'static str {
    match repository.format.as_str() {
        "sha256" => "6ef19b41225c5369f1c104d45d8d85efa9b057b53b14b4b9b939dd74decc5321",
        _ => "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
    }
}

impl Workspace {
    fn repository(&self) -> Result<&Repository, WorkspaceError> {
        self.own().ok_or_else(|| WorkspaceError::NotARepository { path: self.top().to_owned() })
    }

    /// Writes a git bundle of the commit checked out, its history as far back as `depth` commits, and its branch. A bundle has no
    /// place to say that its history is cut off: who takes one with a depth must put the last commits into `shallow` first.
    ///
    /// # Errors
    /// There is no git here, or no commit; git's own; `to`'s.
    pub fn bundle(&self, depth: Option<u32>, mut to: impl Write + Send) -> Result<(), WorkspaceError> {
        let repository = self.repository()?;
        if repository.head.is_none() {
            return Err(WorkspaceError::NoCommit { path: self.top().to_owned() });
        }
        let made = match depth {
            Some(_) => Some(build::build(self, repository, b".git".to_vec(), depth, None)?),
            None => None,
        };
        let directory = made.as_ref().map_or(repository.directory.clone(), build::Made::git_directory);
        let mut bundle = self.git().at(&directory).args(["bundle", "create", "--quiet", "-", "HEAD"]);
        if let Some(branch) = &repository.branch {
            bundle = bundle.arg(OsStr::from_bytes(&[b"refs/heads/", branch.as_slice()].concat()));
        }
        bundle.stream(&mut to).map_err(passed_on("making a bundle"))
    }

    /// Writes what differs from the commit checked out, what git does not know yet included, as a binary patch for git apply.
    /// Of submodules it has the commits.
    ///
    /// # Errors
    /// There is no git here; git's own; `to`'s.
    pub fn patch(&self, mut to: impl Write + Send) -> Result<(), WorkspaceError> {
        const COMPARING: &str = "comparing the files with the commit";
        let repository = self.repository()?;
        let failed = WorkspaceError::git(COMPARING);
        let scratch = self.scratch()?;
        // Names of new files go into a copy of the index, so that git compares them, too; what that needs of objects goes
        // beside it.
        let index = scratch.path().join("index");
        let kept = repository.git_directory.join("index");
        let new_objects = scratch.path().join("objects");
        self.identity().act(|| {
            let failed = |source| WorkspaceError::Scratch { path: index.clone(), source };
            std::fs::create_dir(&new_objects).map_err(failed)?;
            match open_regular(&kept, false) {
                Ok(kept) => {
                    let mut copy = std::fs::File::create_new(&index).map_err(failed)?;
                    match std::io::copy(&mut kept.take(LARGEST_INDEX + 1), &mut copy).map_err(failed)? {
                        ..=LARGEST_INDEX => Ok(()),
                        _ => Err(failed(std::io::ErrorKind::FileTooLarge.into())),
                    }
                }
                // Nothing was ever added.
                Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(()),
                Err(source) => Err(WorkspaceError::Open { path: kept.clone(), source }),
            }
        })?;
        let objects = repository.common_directory.join("objects");
        let git = || {
            let git = self.git().comparing(&repository.directory).map_err(&failed)?;
            // A split index would have its larger part written beside the repository's own.
            let git = git.args(build::INDEX).env("GIT_INDEX_FILE", &index);
            Ok::<_, WorkspaceError>(
                git.env("GIT_OBJECT_DIRECTORY", &new_objects)
                    .env("GIT_ALTERNATE_OBJECT_DIRECTORIES", build::list_element(&objects)),
            )
        };
        let mut untracked = Vec::new();
        for (path, change) in status(self.git(), &repository.directory)? {
            if change == Change::Untracked && !path.ends_with(b"/") {
                untracked.extend(path);
                untracked.push(0);
            }
        }
        if !untracked.is_empty() {
            let args = [
                "--literal-pathspecs",
                "add",
                "--intent-to-add",
                "--pathspec-from-file=-",
                "--pathspec-file-nul",
            ];
            git()?.args(args).input(untracked).output().map_err(&failed)?;
        }
        let against = repository.head.as_deref().unwrap_or_else(|| empty_tree(repository));
        let options = [
            "diff",
            "--binary",
            "--full-index",
            "--no-color",
            "--no-ext-diff",
            "--no-textconv",
            "--no-renames",
            "--no-relative",
            "--unified=3",
            "--src-prefix=a/",
            "--dst-prefix=b/",
            "--submodule=short",
            "--ignore-submodules=dirty",
        ];
        git()?.args(options).args([against, "--"]).stream(&mut to).map_err(passed_on(COMPARING))
    }
}
