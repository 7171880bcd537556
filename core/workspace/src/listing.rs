//! Which entries a workspace has.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use vm_types::{guest::files::is_within, workspace::WorkspaceFacts};

use crate::{
    Cancel, Entry, EntryKind, Git, Identity, Tree, WorkspaceError,
    facts::{Place, Repository, describe, unreadable},
    text::{path as of_bytes, shown},
};

/// Warnings of one sort are told one by one up to so many.
const WARNINGS: usize = 20;
/// Repositories within each other.
const NESTING: usize = 32;
const LISTING: &str = "listing the files";

/// What was found.
#[derive(Default)]
pub(crate) struct Listed {
    pub(crate) entries: Vec<Entry>,
    pub(crate) repositories: Vec<Repository>,
    pub(crate) warnings: Vec<String>,
}

/// One entry of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Staged {
    pub(crate) mode: u32,
    pub(crate) object: String,
    pub(crate) stage: u8,
    pub(crate) path: Vec<u8>,
    /// Git does not expect it in the working tree.
    pub(crate) skipped: bool,
    /// Git was told to take it as unchanged.
    pub(crate) assumed: bool,
}

/// A submodule in a tree or an index.
pub(crate) const GITLINK: u32 = 0o160_000;

/// What is in a repository's index.
pub(crate) fn staged(git: &Git, directory: &Path) -> Result<Vec<Staged>, WorkspaceError> {
    let output = git
        .at(directory)
        .args(["ls-files", "-z", "--stage", "-v", "--full-name"])
        .output()
        .map_err(WorkspaceError::git(LISTING))?;
    records(&output).map(|record| parse_staged(record).ok_or_else(|| unexpected(record))).collect()
}

fn parse_staged(record: &[u8]) -> Option<Staged> {
    let tab = record.iter().position(|byte| *byte == b'\t')?;
    let path = record[tab + 1..].to_vec();
    let mut fields = std::str::from_utf8(&record[..tab]).ok()?.split(' ');
    let tag = fields.next()?;
    Some(Staged {
        mode: u32::from_str_radix(fields.next()?, 8).ok()?,
        object: fields.next()?.to_owned(),
        stage: fields.next()?.parse().ok()?,
        skipped: tag.eq_ignore_ascii_case("S"),
        assumed: tag.starts_with(|c: char| c.is_ascii_lowercase()),
        // Git does not keep others; a damaged index might.
        path: Some(path).filter(|path| is_within(path))?,
    })
}

fn records(output: &[u8]) -> impl Iterator<Item = &[u8]> {
    output.split(|byte| *byte == 0).filter(|record| !record.is_empty())
}

fn unexpected(said: &[u8]) -> WorkspaceError {
    WorkspaceError::GitOutput { doing: LISTING, said: shown(&said[..said.len().min(200)]) }
}

/// What git status says of a working tree: one change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Modified,
    Deleted,
    Untracked,
    /// Only the name of an untracked file is in the index (git add --intent-to-add).
    Intended,
}

/// What differs from the commit checked out: the changes, by path. Repositories within are `PATH/` if they are untracked.
pub(crate) fn status(git: &Git, directory: &Path) -> Result<Vec<(Vec<u8>, Change)>, WorkspaceError> {
    const DOING: &str = "comparing the files with the commit";
    let output = git
        .comparing(directory)
        .map_err(WorkspaceError::git(DOING))?
        .args([
            "status",
            "--porcelain=v2",
            "-z",
            "--untracked-files=all",
            "--no-renames",
            "--ignore-submodules=dirty",
        ])
        .output()
        .map_err(WorkspaceError::git(DOING))?;
    let changes = records(&output).filter(|record| !record.starts_with(b"# "));
    changes.map(|record| parse_status(record).ok_or_else(|| unexpected(record))).collect()
}

/// See git-status(1), "Porcelain Format Version 2".
fn parse_status(record: &[u8]) -> Option<(Vec<u8>, Change)> {
    let nth = |fields: usize| Some(record.splitn(fields + 1, |byte| *byte == b' ').nth(fields)?.to_vec());
    match record.first()? {
        b'?' => Some((nth(1)?, Change::Untracked)),
        b'u' => Some((nth(10)?, Change::Modified)),
        b'1' => {
            let change = match record.get(2..4)? {
                b".A" => Change::Intended,
                b"D." | [_, b'D'] => Change::Deleted,
                _ => Change::Modified,
            };
            Some((nth(8)?, change))
        }
        _ => None,
    }
}

/// What a repository has, with all that lies in it.
pub(crate) fn of_repository(
    git: &Git,
    identity: &Identity,
    repository: &Repository,
    cancel: &Cancel,
    facts: &mut WorkspaceFacts,
) -> Result<Listed, WorkspaceError> {
    let mut lister = Lister {
        git,
        identity,
        top: repository.directory.clone(),
        cancel,
        facts,
        paths: BTreeSet::new(),
        listed: Listed::default(),
    };
    lister.list(repository.clone(), 0)?;
    let Lister { paths, mut listed, top, .. } = lister;
    let (entries, warnings) = identity.act(|| look(&top, paths, cancel))?;
    listed.entries = entries;
    listed.warnings.extend(warnings);
    Ok(listed)
}

struct Lister<'a> {
    git: &'a Git,
    identity: &'a Identity,
    top: PathBuf,
    cancel: &'a Cancel,
    facts: &'a mut WorkspaceFacts,
    /// What may be there, and whether git keeps it.
    paths: BTreeSet<(Vec<u8>, bool)>,
    listed: Listed,
}

impl Lister<'_> {
    fn list(&mut self, repository: Repository, nesting: usize) -> Result<(), WorkspaceError> {
        self.cancel.check()?;
        let (git, directory) = (self.git, repository.directory.clone());
        let inside = |path: &[u8]| within(&repository.path, path);
        let mut below = Vec::new();
        let mut attributes = false;
        for entry in staged(git, &directory)? {
            attributes |= entry.path.ends_with(b".gitattributes");
            let path = inside(&entry.path);
            if entry.mode == GITLINK {
                self.facts.submodules.push(shown(&path));
                below.push((path, Place::Submodule));
            } else {
                self.paths.insert((path, true));
            }
        }
        for (path, change) in status(git, &directory)? {
            match change {
                Change::Modified | Change::Intended => self.facts.modified += 1,
                Change::Deleted => self.facts.deleted += 1,
                Change::Untracked => {
                    self.facts.untracked += 1;
                    match path.strip_suffix(b"/") {
                        Some(stray) => below.push((inside(stray), Place::Stray)),
                        None => _ = self.paths.insert((inside(&path), false)),
                    }
                }
            }
        }
        let setting = git.at(&directory).args(["config", "--type=bool", "core.sparseCheckout"]).find();
        self.facts.sparse |=
            setting.map_err(WorkspaceError::git(LISTING))?.is_some_and(|value| value == b"true");
        if attributes && !self.facts.lfs && large_files(git, &directory)? {
            self.facts.lfs = true;
            self.warn(
                "Git LFS keeps some of the files: they go into the guest as they are on the disk, and git needs git-lfs there to \
                 know them"
                    .into(),
            );
        }
        self.listed.repositories.push(repository);
        for (path, place) in below {
            self.enter(path, place, nesting + 1)?;
        }
        Ok(())
    }

    /// A repository within another.
    fn enter(&mut self, path: Vec<u8>, place: Place, nesting: usize) -> Result<(), WorkspaceError> {
        let directory = self.top.join(of_bytes(&path));
        let probe = |name: &[u8]| {
            let at = within(&path, name);
            self.identity.act(|| open(&self.top)?.look(&at).map_err(unreadable(&at)))
        };
        if probe(b"")?.and_then(|look| EntryKind::of(look.kind)) != Some(EntryKind::Directory) {
            return Ok(());
        }
        // One that is not checked out is an empty directory.
        let populated = probe(b".git")?.is_some();
        self.paths.insert((path.clone(), false));
        if !populated {
            return Ok(());
        }
        if nesting > NESTING {
            self.warn(format!("{}: repositories within each other end here", shown(&path)));
            return Ok(());
        }
        let name = shown(&path);
        // A damaged one leads git to the repository above.
        let top = self.git.at(&directory).args(["rev-parse", "--show-cdup"]).line();
        let found = match top {
            Ok(up) if up.is_empty() => describe(self.git, &directory, path, place),
            Ok(_) => {
                self.warn(format!("{name}: git does not know this repository; its files are left out"));
                return Ok(());
            }
            Err(error) => Err(WorkspaceError::git(LISTING)(error)),
        };
        match found {
            Ok(repository) => {
                if place == Place::Stray {
                    self.warn(format!(
                        "{name} is a repository but no submodule: its files are sent, its history is not"
                    ));
                }
                self.list(repository, nesting)
            }
            Err(WorkspaceError::Git { source, .. }) => {
                self.warn(format!("{name}: the files of this repository are left out: {source}"));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn warn(&mut self, warning: String) {
        self.listed.warnings.push(warning);
    }
}

/// Whether Git LFS keeps any file.
fn large_files(git: &Git, directory: &Path) -> Result<bool, WorkspaceError> {
    let found = git.at(directory).args(["ls-files", "-z", "--", ":(top,attr:filter=lfs)"]).output();
    found.map(|found| !found.is_empty()).map_err(WorkspaceError::git(LISTING))
}

/// The path of what lies in a repository.
pub(crate) fn within(repository: &[u8], path: &[u8]) -> Vec<u8> {
    match (repository, path) {
        (b"", path) => path.to_vec(),
        (repository, b"") => repository.to_vec(),
        _ => [repository, b"/", path].concat(),
    }
}

/// The directories that an entry is in, the next first.
pub(crate) fn directories_above(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter().enumerate().rev().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at])
}

fn open(top: &Path) -> Result<Tree, WorkspaceError> {
    Tree::open(top).map_err(|source| WorkspaceError::Open { path: top.to_owned(), source })
}

/// What is there of the paths, and the directories above.
fn look(
    top: &Path,
    paths: BTreeSet<(Vec<u8>, bool)>,
    cancel: &Cancel,
) -> Result<(Vec<Entry>, Vec<String>), WorkspaceError> {
    let mut tree = open(top)?;
    let mut found = Found::default();
    let mut above: BTreeSet<Vec<u8>> = BTreeSet::new();
    for (path, tracked) in paths {
        cancel.check()?;
        let Some(look) = tree.look(&path).map_err(unreadable(&path))? else { continue };
        // Of a file that has become a directory git names the files in it.
        if tracked && look.kind == rustix::fs::FileType::Directory {
            continue;
        }
        for directory in directories_above(&path) {
            // Those above it are there, too.
            if !above.insert(directory.to_vec()) {
                break;
            }
        }
        if look.kind == rustix::fs::FileType::Directory {
            above.insert(path);
        } else {
            found.add(path, &look, tracked);
        }
    }
    for path in above {
        if let Some(look) = tree.look(&path).map_err(unreadable(&path))? {
            found.add(path, &look, false);
        }
    }
    Ok(found.finish())
}

/// What a directory without git has.
pub(crate) fn of_directory(top: &Path, cancel: &Cancel) -> Result<Listed, WorkspaceError> {
    let mut tree = open(top)?;
    let mut found = Found::default();
    // Paths of directories that were not read yet; what was found last is read first, so the open ones stay few.
    let mut pending = vec![Vec::new()];
    while let Some(directory) = pending.pop() {
        cancel.check()?;
        let mut names = tree.names(&directory).map_err(unreadable(&directory))?.unwrap_or_default();
        names.sort_unstable_by(|a, b| b.cmp(a));
        for name in names {
            let path = within(&directory, name.to_bytes());
            let Some(look) = tree.look(&path).map_err(unreadable(&path))? else { continue };
            found.add(path.clone(), &look, false);
            if look.kind == rustix::fs::FileType::Directory {
                pending.push(path);
            }
        }
    }
    let (entries, warnings) = found.finish();
    Ok(Listed { entries, repositories: Vec::new(), warnings })
}

#[derive(Default)]
struct Found {
    entries: Vec<Entry>,
    left_out: Vec<Vec<u8>>,
    more: usize,
}

impl Found {
    fn add(&mut self, path: Vec<u8>, look: &crate::tree::Look, tracked: bool) {
        match Entry::of(path.clone(), look, tracked) {
            Some(entry) => self.entries.push(entry),
            None if self.left_out.len() < WARNINGS => self.left_out.push(path),
            None => self.more += 1,
        }
    }

    fn finish(mut self) -> (Vec<Entry>, Vec<String>) {
        self.entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        // Git's word for a path goes before ours; two that agree are one.
        self.entries.dedup_by(|second, first| {
            let same = second.path == first.path;
            first.tracked |= same && second.tracked;
            same
        });
        let mut warnings: Vec<String> = self
            .left_out
            .iter()
            .map(|path| format!("{} is a pipe, socket or device: it is left out", shown(path)))
            .collect();
        if self.more > 0 {
            warnings.push(format!("{} more pipes, sockets or devices are left out", self.more));
        }
        (self.entries, warnings)
    }
}
