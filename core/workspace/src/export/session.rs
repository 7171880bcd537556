//! One export: what is asked of the guest, in which order, and what is made of the answers.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use vm_types::guest::files::{Seen, SeenKind};

use crate::{
    Baseline, Cancel, Git, Identity, Workspace, WorkspaceError, export::ExportError, listing::within,
    text::shown,
};

use super::{
    apply::Apply,
    branch, compare,
    fetch::Fetched,
    guest::Guest,
    names::is_path,
    patch,
    place::Place,
    quarantine::{Host, Quarantine, fetched},
    refs::Head,
    report::{ApplyReport, BranchReport, Change, PatchReport, Wish},
    submodules::{self, Submodule},
    tree::{self, Made},
    view::{Base, View, first},
};

/// A guest's work on its way back. Made by [`Export::begin`], it is told what the guest has until it wants no more:
///
/// ```text
///   begin ──▶ wanted ──▶ (the guest packs these files) ──▶ take ──┐
///               ▲  └── nothing ──▶ changes, patch, branch, files, apply
///               └─────────────────────────────────────────────────┘
/// ```
///
/// Git decides from the guest's `.gitignore`s which other files count, so there are two rounds at most where there is git.
#[derive(Debug)]
pub struct Export {
    pub(super) identity: Identity,
    pub(super) git: Git,
    pub(super) cancel: Cancel,
    pub(super) top: PathBuf,
    pub(super) host: Option<Host>,
    pub(super) baseline: Baseline,
    pub(super) wish: Wish,
    pub(super) guest: Guest,
    pub(super) fetched: Fetched,
    pub(super) quarantine: Quarantine,
    pub(super) base: Base,
    /// What the guest's git says, once it is known; always known where there is no git.
    pub(super) view: Option<View>,
    /// Submodules that both sides have.
    pub(super) submodules: Vec<Submodule>,
    /// Directories of git's own that are left where they are.
    repositories: Vec<Vec<u8>>,
    /// The tree that git would make of the guest's working tree.
    tree: Option<Made>,
    /// Whether the guest's objects are in the quarantine.
    objects: bool,
    /// Removed at the end.
    pub(super) scratch: tempfile::TempDir,
}

impl Export {
    /// Looks at both sides: `survey` is what the guest has now, all below the directory that the workspace was put in.
    ///
    /// # Errors
    /// The guest tells what cannot be; the host's repository has lost the commit that the guest started from; git's own.
    pub fn begin(
        workspace: &Workspace,
        mut baseline: Baseline,
        survey: Vec<Seen>,
        wish: Wish,
    ) -> Result<Self, ExportError> {
        let guest = Guest::new(survey, std::mem::take(&mut baseline.guest))?;
        let scratch = workspace.scratch()?;
        let (host, quarantine, fetched, submodules, base) = act(workspace.identity(), || {
            let host = Host::of(workspace)?;
            let quarantine = Quarantine::make(workspace.git(), scratch.path(), host.as_ref())?;
            let submodules = submodules::of(workspace, &baseline);
            Ok((host, quarantine, fetched(scratch.path())?, submodules))
        })
        .and_then(|(host, quarantine, fetched, submodules)| {
            let base = match &host {
                Some(_) => match Base::read(workspace, &quarantine, &baseline) {
                    // Files are brought back by what was sent; so the work is not lost with the commit.
                    Err(ExportError::Workspace(WorkspaceError::BaseGone { .. }))
                        if matches!(wish, Wish::Files { .. }) =>
                    {
                        Base::default()
                    }
                    base => base?,
                },
                None => Base::default(),
            };
            Ok((host, quarantine, fetched, submodules, base))
        })?;
        Ok(Self {
            identity: workspace.identity().clone(),
            git: workspace.git().clone(),
            cancel: workspace.cancel().clone(),
            top: workspace.top().to_owned(),
            host,
            baseline,
            wish,
            guest,
            fetched,
            quarantine,
            base,
            view: None,
            submodules,
            repositories: Vec::new(),
            tree: None,
            objects: false,
            scratch,
        })
    }

    /// Which files the guest is to pack next, by their paths, none of them if that is all. What they are is not told: an archive
    /// with each of them, from the directory that was surveyed, is what [`Self::take`] takes.
    ///
    /// # Errors
    /// Git cannot make use of what the host has.
    pub fn wanted(&mut self) -> Result<Vec<Vec<u8>>, ExportError> {
        Ok(self.outstanding()?.into_keys().collect())
    }

    /// How many bytes these files have, if the guest is right.
    ///
    /// # Errors
    /// As [`Self::wanted`].
    pub fn wanted_bytes(&mut self) -> Result<u64, ExportError> {
        Ok(self.outstanding()?.values().fold(0, |sum, size| sum.saturating_add(*size)))
    }

    /// Takes what the guest has packed. A file that is not in the archive has vanished meanwhile: it is neither brought back nor
    /// removed.
    ///
    /// # Errors
    /// There is no room for it; what comes is no archive, has what was not asked for, or far more than announced; and the
    /// scratch directory's.
    pub fn take(&mut self, archive: impl Read + Send) -> Result<(), ExportError> {
        let wanted = self.outstanding()?;
        let (fetched, cancel) = (&mut self.fetched, &self.cancel);
        act(&self.identity, || fetched.take(archive, &wanted, cancel))
    }

    /// What the guest did to what it was sent: the difference to the host as it was then.
    ///
    /// # Errors
    /// Files are still wanted.
    pub fn changes(&mut self) -> Result<Vec<Change>, ExportError> {
        self.complete()?;
        Ok(self.deltas().iter().map(compare::Delta::change).collect())
    }

    /// What people should know, once the work was brought back.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.view.as_ref().map(|view| view.warnings.clone()).unwrap_or_default();
        warnings.extend(self.tree.iter().flat_map(|made| made.warnings.iter().cloned()));
        if let Some(view) = self.view.as_ref().filter(|_| self.tree.is_some()) {
            let deltas = self.deltas();
            let touched = view.submodules.keys().filter(|top| {
                let inside = |path: &[u8]| {
                    path.strip_prefix(top.as_slice()).is_some_and(|rest| rest.starts_with(b"/"))
                };
                deltas.iter().any(|delta| inside(&delta.path))
            });
            warnings.extend(touched.map(|top| {
                format!(
                    "what is not committed in the submodule {} is in no patch or branch: apply brings its files",
                    shown(top)
                )
            }));
        }
        if self.wish != Wish::Branch {
            warnings.extend(self.submodules.iter().filter(|one| one.has_work()).map(submodules::stays));
        }
        let known = |path: &[u8]| self.submodules.iter().any(|one| one.path == path);
        // Of those that were not sent all is there, if the host has them at all.
        let unknown = self.view.iter().flat_map(View::submodules_in_guest).filter(|path| !known(path));
        warnings.extend(unknown.map(submodules::unknown));
        // So it is after `git clone` and `git submodule add`.
        let apart = self.view.iter().flat_map(|view| view.submodules.keys()).filter(|path| {
            let own = self.guest.get(&within(path, b".git"));
            own.is_some_and(|own| own.kind == SeenKind::Directory)
        });
        warnings.extend(apart.map(|path| match known(path) {
            true => submodules::apart(path),
            false => submodules::unknown(path),
        }));
        warnings.extend(
            self.repositories.iter().map(|path| {
                format!("{} stays in the guest: it is a repository's own directory", shown(path))
            }),
        );
        let others = self.guest.entries().filter(|seen| seen.kind == SeenKind::Other);
        warnings.extend(
            others
                .filter(|seen| !self.guest.is_unchanged(&seen.path))
                .map(|seen| format!("{} is a pipe, socket or device: it is left out", shown(&seen.path))),
        );
        let vanished = self.fetched.vanished().iter();
        warnings.extend(
            vanished.map(|path| format!("{} changed while it was fetched: it is left out", shown(path))),
        );
        warnings
    }

    /// Writes a patch for `git apply --binary`: from the commit that the guest started from to what it has now; where there is no
    /// git, from what it was sent.
    ///
    /// # Errors
    /// Files are still wanted, as they are if this was not wished for; git's; `to`'s.
    pub fn patch(&mut self, to: &mut dyn Write) -> Result<PatchReport, ExportError> {
        self.complete()?;
        if self.host.is_none() {
            return patch::of_files(self, to);
        }
        if matches!(self.wish, Wish::Files { .. }) {
            return Err(ExportError::NotWished { what: "patch" });
        }
        let tree = self.tree()?;
        let base = match &self.base.commit {
            Some(base) => base.clone(),
            None => act(&self.identity, || self.quarantine.index("nothing", None)?.tree())?,
        };
        patch::of_trees(&self.quarantine, &base, &tree, to)
    }

    /// Makes or moves a branch of the host's repository: the guest's commits since it started, and one more with the message for
    /// what it has not committed. A branch that is there is only moved forward. In a dry run the host's repository is not touched.
    ///
    /// # Errors
    /// Files are still wanted, as they are if this was not wished for; there is no git; a name that git does not take; a branch
    /// that is checked out or has other commits; commits of the guest that git does not take.
    pub fn branch(&mut self, name: &str, message: &str, dry_run: bool) -> Result<BranchReport, ExportError> {
        let Some(host) = self.host.clone() else {
            return Err(WorkspaceError::NotARepository { path: self.top.clone() }.into());
        };
        if self.wish != Wish::Branch {
            return Err(ExportError::NotWished { what: "branch" });
        }
        self.complete()?;
        branch::check_name(self.quarantine.command(), name)?;
        let tree = self.tree()?;
        branch::branch(self, &host, name, message, &tree, dry_run)
    }

    /// Writes what the guest changed or made into a directory, which is made if it is not there. What is there already is left as
    /// it is; if it differs it is a conflict.
    ///
    /// # Errors
    /// Files are still wanted; the directory cannot be used; its disk is full.
    pub fn files(&mut self, directory: &Path, dry_run: bool) -> Result<ApplyReport, ExportError> {
        self.complete()?;
        self.apply_to(directory, false, dry_run)
    }

    /// Does to the host's files what the guest did to its own. What the host has changed as well, and differently, is a conflict,
    /// and left as it is.
    ///
    /// # Errors
    /// Files are still wanted; the workspace's disk is full.
    pub fn apply(&mut self, dry_run: bool) -> Result<ApplyReport, ExportError> {
        self.complete()?;
        let top = self.top.clone();
        self.apply_to(&top, true, dry_run)
    }

    fn apply_to(
        &self,
        directory: &Path,
        is_workspace: bool,
        dry_run: bool,
    ) -> Result<ApplyReport, ExportError> {
        let deltas = self.deltas();
        act(&self.identity, || {
            let empty;
            let place = if is_workspace || directory.exists() {
                Place::open(directory)?
            } else if dry_run {
                // It would be empty.
                empty = tempfile::TempDir::new_in(self.scratch.path()).map_err(|source| {
                    ExportError::Scratch { action: "make", path: self.scratch.path().to_owned(), source }
                })?;
                Place::open(empty.path())?
            } else {
                std::fs::create_dir_all(directory).map_err(|source| ExportError::Host {
                    action: "make",
                    path: shown(directory.as_os_str().as_encoded_bytes()),
                    source,
                })?;
                Place::open(directory)?
            };
            let apply = Apply {
                place: &place,
                guest: &self.guest,
                deltas: &deltas,
                is_git: self.host.is_some(),
                is_workspace,
                dry_run,
                cancel: &self.cancel,
            };
            apply.run()
        })
    }

    pub(super) fn deltas(&self) -> Vec<compare::Delta<'_>> {
        let passes = |path: &[u8]| match &self.view {
            Some(view) => self.wish == (Wish::Files { ignored: true }) || !view.is_ignored(path),
            None => true,
        };
        compare::deltas(&self.baseline, &self.guest, &self.fetched, self.host.is_some(), passes)
    }

    fn complete(&mut self) -> Result<(), ExportError> {
        match self.outstanding()?.len() {
            0 => Ok(()),
            count => Err(ExportError::NotFetched { count }),
        }
    }

    /// What is still to be fetched, with the sizes that the guest gives.
    fn outstanding(&mut self) -> Result<BTreeMap<Vec<u8>, u64>, ExportError> {
        let unsettled = |mut wanted: BTreeMap<Vec<u8>, u64>, fetched: &Fetched| {
            wanted.retain(|path, _| !fetched.is_settled(path));
            wanted
        };
        if let (Some(host), None) = (&self.host, &self.view) {
            let wanted = unsettled(first(&self.guest, &self.base), &self.fetched);
            if !wanted.is_empty() {
                return Ok(wanted);
            }
            let view = act(&self.identity, || {
                let (guest, fetched) = (&self.guest, &self.fetched);
                submodules::look(&mut self.submodules, &self.git, guest, fetched, self.scratch.path())?;
                View::read(guest, &self.base, fetched, &self.quarantine, host.digits())
            })?;
            self.view = Some(view);
        }
        let view = self.view.as_ref();
        self.repositories = self.guest.repositories(|path| view.is_some_and(|view| view.is_submodule(path)));
        let mut wanted: BTreeMap<_, _> = self
            .guest
            .files()
            .filter(|seen| seen.kind == SeenKind::File && self.wants(&seen.path))
            .map(|seen| (seen.path.clone(), seen.size))
            .collect();
        let staged = matches!(self.wish, Wish::Patch | Wish::Branch)
            && self.view.as_ref().is_some_and(|view| view.lacks_staged);
        if staged || self.wish == Wish::Branch && self.has_commits()? {
            wanted.extend(self.objects().map(|(_, seen)| (seen.path.clone(), seen.size)));
        }
        if self.wish == Wish::Branch {
            let objects = self.submodules.iter().flat_map(|submodule| submodule.objects(&self.guest));
            wanted.extend(objects.map(|(_, seen)| (seen.path.clone(), seen.size)));
        }
        Ok(unsettled(wanted, &self.fetched))
    }

    /// Whether the content of a file has to be known.
    fn wants(&self, path: &[u8]) -> bool {
        let touched = !self.guest.is_unchanged(path);
        let Some(view) = &self.view else { return touched };
        let known = self.baseline.sent.entries.contains_key(path);
        match self.wish {
            _ if touched && known => true,
            Wish::Files { ignored: true } => touched,
            _ if view.is_ignored(path) => false,
            Wish::Files { ignored: false } => touched,
            Wish::Patch | Wish::Branch if view.in_submodule(path) => touched,
            Wish::Patch | Wish::Branch => touched || !self.base.holds(path, &self.guest),
        }
    }

    /// Whether the guest is at a commit that the host does not have.
    fn has_commits(&self) -> Result<bool, ExportError> {
        let Some(Head::At(head)) = self.view.as_ref().map(|view| &view.head) else { return Ok(false) };
        if Some(head) == self.base.commit.as_ref() || self.objects {
            return Ok(false);
        }
        Ok(!self.quarantine.has_commit(head)?)
    }

    /// Files with objects that came into the guest's repository, by their paths in `objects/`.
    fn objects(&self) -> impl Iterator<Item = (&[u8], &Seen)> {
        objects(&self.guest, b".git/objects", self.host.as_ref().map_or(40, Host::digits))
    }

    /// Puts the guest's objects where its commits can be read.
    fn take_objects(&mut self) -> Result<(), ExportError> {
        if self.objects {
            return Ok(());
        }
        let found: Vec<_> =
            self.objects().filter_map(|(name, seen)| Some((name, self.fetched.get(&seen.path)?))).collect();
        act(&self.identity, || self.quarantine.take_objects(found))?;
        self.objects = true;
        Ok(())
    }

    fn tree(&mut self) -> Result<String, ExportError> {
        if let Some(made) = &self.tree {
            return Ok(made.tree.clone());
        }
        // What is only in the guest's index is among them.
        self.take_objects()?;
        let Some(view) = &self.view else {
            return Err(WorkspaceError::NotARepository { path: self.top.clone() }.into());
        };
        let made = act(&self.identity, || {
            tree::of_guest(&self.guest, &self.base, view, &self.fetched, &self.quarantine)
        })?;
        let tree = made.tree.clone();
        self.tree = Some(made);
        Ok(tree)
    }
}

/// The files with objects that came into a repository of the guest's, by their paths in its `objects/`.
pub(super) fn objects<'a, 'd>(
    guest: &'a Guest,
    directory: &'d [u8],
    digits: usize,
) -> impl Iterator<Item = (&'a [u8], &'a Seen)> + use<'a, 'd> {
    guest.below(directory).filter(move |(name, seen)| {
        is_object(name, digits) && is_path(name) && !guest.is_unchanged(&seen.path)
    })
}

/// Whether a file in `objects/` is an object or a pack of them. All else there is made of these, or leads elsewhere.
fn is_object(name: &[u8], digits: usize) -> bool {
    let hex = |part: &[u8]| part.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    match name.split_at_checked(2) {
        Some((start, [b'/', rest @ ..])) => hex(start) && hex(rest) && rest.len() + 2 == digits,
        _ => name
            .strip_prefix(b"pack/pack-")
            .and_then(|rest| rest.strip_suffix(b".pack"))
            .is_some_and(|rest| hex(rest) && rest.len() == digits),
    }
}

/// Works with files as the identity.
pub(super) fn act<T: Send>(
    identity: &Identity,
    work: impl FnOnce() -> Result<T, ExportError> + Send,
) -> Result<T, ExportError> {
    identity.act(|| Ok(work()))?
}
