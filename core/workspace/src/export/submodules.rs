//! A guest's commits in submodules, as branches of the host's repositories of these.
//!
//! Each has a quarantine of its own, with the objects of the host's submodule at hand. So a submodule's history is looked through as
//! that of the workspace is, and all of them before anything is written. Submodules are written first, for the workspace's commits
//! name theirs. If the host then fails at one, those before it keep their branches, and the next export goes on from there.

use std::path::Path;

use vm_types::guest::files::{Seen, SeenKind};

use crate::{
    Baseline, Git, GitError, Workspace, WorkspaceError,
    export::ExportError,
    facts::{Place, Repository},
    listing::within,
    text::shown,
};

use super::{
    branch::{self, Target},
    fetch::{self, Fetched},
    guest::Guest,
    quarantine::{Host, Quarantine},
    refs::{self, Head},
    report::SubmoduleReport,
    session::objects,
    view::LIST,
};

/// A submodule that both sides have.
#[derive(Debug)]
pub(super) struct Submodule {
    /// Where its files are, relative to the workspace's top.
    pub(super) path: Vec<u8>,
    /// Where git has its own files in the guest, relative to the same.
    git: Vec<u8>,
    host: Host,
    /// The commit that the guest was sent.
    base: Option<String>,
    /// What the guest has checked out since and the host does not have.
    work: Option<Work>,
}

/// Commits of the guest's.
#[derive(Debug)]
struct Work {
    head: String,
    quarantine: Quarantine,
}

/// Those of a workspace whose history was sent.
pub(super) fn of(workspace: &Workspace, baseline: &Baseline) -> Vec<Submodule> {
    let lines = baseline.history.iter().flat_map(|history| &history.repositories);
    let known = lines.filter(|line| !line.path.is_empty()).filter_map(|line| {
        let is_it = |there: &&Repository| there.place == Place::Submodule && there.path == line.path;
        let repository = workspace.repositories().iter().find(is_it)?;
        Some(Submodule {
            path: line.path.clone(),
            git: line.git.clone(),
            host: Host::of_repository(repository),
            base: line.head.clone(),
            work: None,
        })
    });
    known.collect()
}

impl Submodule {
    /// Finds out whether the guest has commits in it that the host lacks, when its small files have come. What is made for that is
    /// in `scratch`, which does not exist yet.
    pub(super) fn look(
        &mut self,
        git: &Git,
        guest: &Guest,
        fetched: &Fetched,
        scratch: &Path,
    ) -> Result<(), ExportError> {
        let link = guest.get(&within(&self.path, b".git"));
        if link.is_none_or(|link| link.kind != SeenKind::File) {
            return Ok(());
        }
        let file = |name: &[u8]| fetched.read(&within(&self.git, name), LIST);
        let Head::At(head) = refs::head(file, self.host.digits()) else { return Ok(()) };
        if Some(&head) == self.base.as_ref() {
            return Ok(());
        }
        fetch::directory(scratch)?;
        let quarantine = Quarantine::make(git, scratch, Some(&self.host))?;
        if !quarantine.has_commit(&head)? || !self.host.refers_to(git, &head)? {
            self.work = Some(Work { head, quarantine });
        }
        Ok(())
    }

    pub(super) fn has_work(&self) -> bool {
        self.work.is_some()
    }

    /// The files with objects that came into the guest's repository, by their paths in `objects/`, if they are needed.
    pub(super) fn objects<'a>(&self, guest: &'a Guest) -> Vec<(&'a [u8], &'a Seen)> {
        if self.work.is_none() {
            return Vec::new();
        }
        let (directory, digits) = (within(&self.git, b"objects"), self.host.digits());
        objects(guest, &directory, digits).collect()
    }

    /// What is to be done for its branch, all of it looked through.
    pub(super) fn plan<'a>(
        &'a self,
        git: &'a Git,
        guest: &Guest,
        fetched: &Fetched,
        name: &str,
    ) -> Result<Option<Branch<'a>>, ExportError> {
        let Some(Work { head, quarantine }) = &self.work else { return Ok(None) };
        let found = self.objects(guest).into_iter();
        let found = found.filter_map(|(name, seen)| Some((name, fetched.get(&seen.path)?)));
        quarantine.take_objects(found)?;
        let base = match &self.base {
            Some(base) if quarantine.has_commit(base)? => Some(base.as_str()),
            _ => None,
        };
        let of_it = |error| match error {
            ExportError::BranchDiverged { name } => ExportError::BranchDiverged { name: self.named(&name) },
            ExportError::BranchCheckedOut { name, worktree } => {
                ExportError::BranchCheckedOut { name: self.named(&name), worktree }
            }
            ExportError::BranchInTheWay { name, other } => {
                ExportError::BranchInTheWay { name: self.named(&name), other }
            }
            ExportError::History { reason } => {
                ExportError::History { reason: format!("in the submodule {}: {reason}", shown(&self.path)) }
            }
            error => error,
        };
        branch::whole(quarantine, head, base).map_err(of_it)?;
        let before = branch::existing(git, &self.host.top, name).map_err(of_it)?;
        branch::goes_on(quarantine, before.as_deref(), head, name).map_err(of_it)?;
        let commits = branch::count(quarantine, head, base)?;
        let report = SubmoduleReport { path: self.path.clone(), commit: head.clone(), before, commits };
        let target = Target { git, quarantine, top: &self.host.top, base };
        Ok(Some(Branch { target, report }))
    }

    fn named(&self, branch: &str) -> String {
        format!("{branch} of the submodule {}", shown(&self.path))
    }
}

/// A branch that can be made or moved.
pub(super) struct Branch<'a> {
    target: Target<'a>,
    pub(super) report: SubmoduleReport,
}

impl Branch<'_> {
    /// Makes or moves it.
    pub(super) fn bring(&self, name: &str) -> Result<(), ExportError> {
        self.target.bring(name, &self.report.commit)
    }
}

impl Host {
    /// Whether a branch, another reference, or what is checked out has a commit among its history. Mere objects, as a fetch leaves
    /// behind that fails late, are as good as lost.
    fn refers_to(&self, git: &Git, commit: &str) -> Result<bool, ExportError> {
        let others = git.at(&self.top).args(["rev-list", "--max-count=1", commit, "--not", "--all"]).output();
        match others {
            Ok(found) => Ok(found.is_empty()),
            // Not all of its history is there.
            Err(GitError::Failed { .. }) => Ok(false),
            Err(error) => Err(WorkspaceError::git("looking for a commit")(error).into()),
        }
    }

    /// That of a submodule, of which only the history counts.
    fn of_repository(repository: &Repository) -> Self {
        Self::plain(repository.directory.clone(), &repository.format, &repository.common_directory)
    }
}

/// For people: that commits stay.
pub(super) fn stays(submodule: &Submodule) -> String {
    format!(
        "the guest has commits in the submodule {}, which only a branch brings back: vm workspace export --branch",
        shown(&submodule.path)
    )
}

/// For people: that a history stays.
pub(super) fn unknown(path: &[u8]) -> String {
    format!(
        "the host has no repository of the submodule {}: its commits stay in the guest, push them from there",
        shown(path)
    )
}

/// For people: that the same stays, though the host has such a submodule.
pub(super) fn apart(path: &[u8]) -> String {
    format!(
        "the submodule {} was made anew in the guest: its commits stay there, push them from there",
        shown(path)
    )
}

/// Looks at all of them.
pub(super) fn look(
    submodules: &mut [Submodule],
    git: &Git,
    guest: &Guest,
    fetched: &Fetched,
    scratch: &Path,
) -> Result<(), ExportError> {
    for (number, submodule) in submodules.iter_mut().enumerate() {
        submodule.look(git, guest, fetched, &scratch.join(format!("submodule-{number}")))?;
    }
    Ok(())
}
