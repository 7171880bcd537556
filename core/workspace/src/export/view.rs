//! What of a guest's tree belongs to git: which paths it keeps, which it ignores, and of which the host has the content.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    path::Path,
};

use vm_types::guest::files::SeenKind;

use crate::{
    Baseline, GitError, Sent, Workspace, WorkspaceError, archive::Packer, export::ExportError,
    facts::unreadable, listing::within, text::shown,
};

use super::{
    fetch::Fetched,
    guest::Guest,
    names::{git_directory, is_path},
    quarantine::Quarantine,
    refs::{self, Head},
};

/// Of the small files of a guest's `.git`, the most that is read, in bytes.
const SMALL: u64 = 64 << 10;
/// The same of a file `.git`, which has one path.
const LINK: u64 = 8 << 10;
/// The same for those with a line or record for each branch or file.
pub(super) const LIST: u64 = 256 << 20;
/// A submodule's commit.
pub(super) const COMMIT: u32 = 0o160_000;

/// The tree of the commit that the guest started from.
#[derive(Debug, Default)]
pub(super) struct Base {
    /// Mode and object of each path.
    entries: BTreeMap<Vec<u8>, (u32, String)>,
    /// Paths of which the guest was sent just what the commit has.
    clean: HashSet<Vec<u8>>,
    /// Paths that are not in the host's working tree on purpose: its checkout is sparse.
    skipped: HashSet<Vec<u8>>,
    /// The commit.
    pub(super) commit: Option<String>,
}

impl Base {
    /// Looks at the commit, and which of its files the host still has as they were sent.
    pub(super) fn read(
        workspace: &Workspace,
        quarantine: &Quarantine,
        baseline: &Baseline,
    ) -> Result<Self, ExportError> {
        let Some(commit) = baseline.base.as_deref() else { return Ok(Self::default()) };
        if !quarantine.has_commit(commit)? {
            return Err(WorkspaceError::BaseGone { commit: commit.to_owned() }.into());
        }
        let tree = quarantine.command().args(["ls-tree", "-r", "-z", "--full-tree", commit]).output();
        let tree = tree.map_err(WorkspaceError::git("reading the commit that the guest started from"))?;
        let entries: BTreeMap<_, _> = tree.split(|byte| *byte == 0).filter_map(entry).collect();
        const COMPARING: &str = "comparing the host's files with the commit that the guest started from";
        let differing = workspace
            .git()
            .comparing(workspace.top())
            .map_err(WorkspaceError::git(COMPARING))?
            // It would bring the host's index up to date.
            .args(["-c", "diff.autoRefreshIndex=false"])
            .args([
                "diff",
                "--name-only",
                "-z",
                "--no-renames",
                "--no-ext-diff",
                "--no-textconv",
                "--no-relative",
            ])
            .args(["--ignore-submodules=all", commit, "--"])
            .output()
            .map_err(WorkspaceError::git(COMPARING))?;
        let differing: HashSet<&[u8]> = differing.split(|byte| *byte == 0).collect();
        let same = |path: &&Vec<u8>| {
            !differing.contains(path.as_slice()) && baseline.sent.entries.contains_key(*path)
        };
        let candidates: Vec<&Vec<u8>> = entries.keys().filter(same).collect();
        let clean = workspace.identity().act(|| still_as_sent(workspace, &baseline.sent, &candidates))?;
        let mut skipped = HashSet::new();
        if workspace.facts().sparse {
            let list = workspace.git().at(workspace.top()).args(["ls-files", "-t", "-z"]).output();
            let list = list.map_err(WorkspaceError::git("asking which files are not checked out"))?;
            skipped.extend(
                list.split(|byte| *byte == 0).filter_map(|line| Some(line.strip_prefix(b"S ")?.to_vec())),
            );
        }
        Ok(Self { entries, clean, skipped, commit: Some(commit.to_owned()) })
    }

    /// Whether the commit has it.
    pub(super) fn has(&self, path: &[u8]) -> bool {
        self.entries.contains_key(path)
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &[u8]> {
        self.entries.iter().filter(|(_, (mode, _))| *mode != COMMIT).map(|(path, _)| path.as_slice())
    }

    /// Its submodules and their commits.
    pub(super) fn submodules(&self) -> impl Iterator<Item = (&[u8], &str)> {
        let links = self.entries.iter().filter(|(_, (mode, _))| *mode == COMMIT);
        links.map(|(path, (_, commit))| (path.as_slice(), commit.as_str()))
    }

    /// Whether the guest has just what the commit has at the path.
    pub(super) fn holds(&self, path: &[u8], guest: &Guest) -> bool {
        self.clean.contains(path) && guest.is_unchanged(path)
    }
}

/// Those of the paths that the host has as they were sent.
fn still_as_sent(
    workspace: &Workspace,
    sent: &Sent,
    paths: &[&Vec<u8>],
) -> Result<HashSet<Vec<u8>>, WorkspaceError> {
    let mut tree = workspace.tree()?;
    let mut reader = Packer::new(workspace.tree()?, io::sink(), workspace.cancel());
    let mut proven = HashSet::new();
    for path in paths {
        let look = tree.look(path).map_err(unreadable(path))?;
        let former = sent.entries.get(*path);
        if look.zip(former).is_some_and(|(look, former)| look.stat.proves(&former.stat)) {
            proven.insert((*path).clone());
        } else {
            reader.add(path, path)?;
        }
    }
    let read = reader.finish()?.entries;
    let same =
        read.into_iter().filter(|(path, now)| sent.entries.get(path).is_some_and(|former| former.same(now)));
    proven.extend(same.map(|(path, _)| path));
    Ok(proven)
}

fn entry(line: &[u8]) -> Option<(Vec<u8>, (u32, String))> {
    let tab = line.iter().position(|byte| *byte == b'\t')?;
    let (about, path) = (line.get(..tab)?, line.get(tab + 1..)?);
    let mut fields = std::str::from_utf8(about).ok()?.split(' ');
    let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
    let object = fields.nth(1)?.to_owned();
    Some((path.to_vec(), (mode, object)))
}

/// What has to be known of a guest's `.git` and its `.gitignore`s before all else, with the sizes that the guest gives.
pub(super) fn first(guest: &Guest, base: &Base) -> BTreeMap<Vec<u8>, u64> {
    let lists = guest.files().filter(|seen| {
        seen.kind == SeenKind::File
            && name(&seen.path) == b".gitignore"
            && seen.size <= LIST
            && !base.holds(&seen.path, guest)
    });
    let mut wanted: BTreeMap<_, _> = lists.map(|seen| (seen.path.clone(), seen.size)).collect();
    for (rest, seen) in guest.below(b".git") {
        // Logs of branches have names like theirs; but so have branches of a submodule `logs`.
        let module = rest.starts_with(b"modules/");
        let heads = |path: &[u8]| path.windows(11).any(|part| part == b"refs/heads/");
        let small = rest == b"HEAD"
            || rest.starts_with(b"refs/heads/")
            || module && (name(rest) == b"HEAD" || heads(rest));
        let list = matches!(rest, b"index" | b"packed-refs" | b"info/exclude")
            || module && (name(rest) == b"packed-refs" || rest.ends_with(b"/info/exclude"));
        if small && seen.size <= SMALL || list && seen.size <= LIST {
            wanted.insert(seen.path.clone(), seen.size);
        }
    }
    let links = guest.links().filter(|(_, seen)| seen.size <= LINK);
    wanted.extend(links.map(|(_, seen)| (seen.path.clone(), seen.size)));
    wanted
}

fn name(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').next().unwrap_or(path)
}

/// A guest's git, as far as it is believed.
#[derive(Debug)]
pub(super) struct View {
    /// The commit it has checked out.
    pub(super) head: Head,
    /// What its index has, if that can be read; with true for what is not in the working tree on purpose.
    index: Option<BTreeMap<Vec<u8>, Staged>>,
    /// The commits of the workspace's own submodules.
    pub(super) submodules: BTreeMap<Vec<u8>, String>,
    /// Where git has its own files of submodules that are checked out, those in other submodules included.
    own: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Files that it ignores.
    ignored: HashSet<Vec<u8>>,
    /// Whether an object of [`Self::staged_only`] is the guest's alone, or was when it was looked at.
    pub(super) lacks_staged: bool,
    /// What was not as it should be, for people.
    pub(super) warnings: Vec<String>,
}

impl View {
    /// Reads what [`first`] asked for, when it has come.
    pub(super) fn read(
        guest: &Guest,
        base: &Base,
        fetched: &Fetched,
        quarantine: &Quarantine,
        digits: usize,
    ) -> Result<Self, ExportError> {
        let file = |name: &[u8]| fetched.read(&[b".git/", name].concat(), LIST);
        let mut view = Self {
            head: refs::head(file, digits),
            index: None,
            submodules: BTreeMap::new(),
            own: guest.links().filter_map(|(top, seen)| own(top, &seen.path, fetched)).collect(),
            ignored: HashSet::new(),
            lacks_staged: false,
            warnings: Vec::new(),
        };
        if let Some(content) = fetched.get(b".git/index") {
            match index(quarantine, &content.file) {
                Ok(entries) => {
                    view.index = Some(entries);
                }
                Err(GitError::Failed { stderr, .. }) => view.warnings.push(format!(
                    "the guest's index cannot be read ({}): the host's commit decides which files git keeps",
                    shown(stderr.as_bytes())
                )),
                Err(error) => return Err(WorkspaceError::git("reading the guest's index")(error).into()),
            }
        }
        // The guest may have merged another commit of a submodule that it has no files of, or made files of one.
        let links: Vec<(Vec<u8>, String)> = match &view.index {
            Some(entries) => {
                let links = entries.iter().filter(|(_, (mode, ..))| *mode == COMMIT);
                links.map(|(path, (_, object, _))| (path.clone(), object.clone())).collect()
            }
            None => base.submodules().map(|(path, commit)| (path.to_vec(), commit.to_owned())).collect(),
        };
        for (path, commit) in links {
            view.submodule(path, commit, guest, fetched, digits);
        }
        // Other repositories are nothing to git but files.
        let submodules = &view.submodules;
        view.own.retain(|path, _| {
            submodules.contains_key(path) || slashes(path).any(|above| submodules.contains_key(above))
        });
        view.ignore(guest, base, fetched, quarantine)?;
        let objects: BTreeSet<&str> = view.staged_only(base).map(|(_, _, object)| object).collect();
        let found = quarantine.contents(objects.iter().copied())?;
        view.lacks_staged = objects.iter().any(|object| !found.contains(*object));
        Ok(view)
    }

    /// What the guest's index has otherwise than the commit and that is in no working tree on purpose: path, mode and object.
    pub(super) fn staged_only<'a>(
        &'a self,
        base: &'a Base,
    ) -> impl Iterator<Item = (&'a [u8], u32, &'a str)> {
        let skipped =
            self.index.iter().flatten().filter(|(_, (mode, _, skipped))| *skipped && *mode != COMMIT);
        let differing = skipped.filter(|(path, (mode, object, _))| {
            base.entries.get(*path).is_none_or(|(had, kept)| (had, kept) != (mode, object))
        });
        differing.map(|(path, (mode, object, _))| (path.as_slice(), *mode, object.as_str()))
    }

    /// Finds the commit that a submodule has checked out.
    fn submodule(&mut self, path: Vec<u8>, commit: String, guest: &Guest, fetched: &Fetched, digits: usize) {
        if guest.get(&path).is_none_or(|seen| seen.kind != SeenKind::Directory) {
            // Gone, or never there: a submodule that is not checked out is an empty directory, where there is one.
            if guest.before(&path).is_none() && guest.get(&path).is_none() {
                self.submodules.insert(path, commit);
            }
            return;
        }
        let head =
            self.own.get(&path).map(|own| refs::head(|name| fetched.read(&within(own, name), LIST), digits));
        let commit = match head {
            Some(Head::At(head)) => head,
            _ => commit,
        };
        self.submodules.insert(path, commit);
    }

    /// Asks git which files the guest's lists name.
    fn ignore(
        &mut self,
        guest: &Guest,
        base: &Base,
        fetched: &Fetched,
        quarantine: &Quarantine,
    ) -> Result<(), ExportError> {
        let work = quarantine.index("ignore", base.commit.as_deref())?;
        let lists =
            guest.files().filter(|seen| seen.kind == SeenKind::File && name(&seen.path) == b".gitignore");
        let mut from_base = Vec::new();
        for seen in lists {
            match fetched.get(&seen.path) {
                Some(content) => work.file(&seen.path, content, false)?,
                None if base.holds(&seen.path, guest) => from_base.push(seen.path.as_slice()),
                None => {}
            }
        }
        work.check_out(&from_base)?;
        let unkept = guest.files().map(|seen| seen.path.as_slice()).filter(|path| !self.keeps(path, base));
        // What a repository ignores is nothing to the submodules in it, nor what they ignore to those in them.
        let mut asked: BTreeMap<&[u8], Vec<&[u8]>> = BTreeMap::new();
        for path in unkept {
            let top = slashes(path).filter(|above| self.is_submodule(above)).last().unwrap_or_default();
            let rest = path.strip_prefix(top).unwrap_or(path);
            asked.entry(top).or_default().push(rest.strip_prefix(b"/").unwrap_or(rest));
        }
        let mut ignored = HashSet::new();
        for (top, names) in asked {
            let own = if top.is_empty() { Some(&b".git"[..]) } else { self.own.get(top).map(Vec::as_slice) };
            let list = own.and_then(|own| fetched.read(&within(own, b"info/exclude"), LIST));
            quarantine.write("info/exclude", &list.unwrap_or_default())?;
            ignored.extend(work.ignored(top, &names)?.into_iter().map(|name| within(top, &name)));
        }
        self.ignored = ignored;
        Ok(())
    }

    /// Whether git keeps a path, whatever is ignored.
    fn keeps(&self, path: &[u8], base: &Base) -> bool {
        match &self.index {
            Some(index) => index.contains_key(path),
            None => base.has(path),
        }
    }

    /// Whether a file of the guest's working tree belongs to git.
    pub(super) fn is_ignored(&self, path: &[u8]) -> bool {
        self.ignored.contains(path)
    }

    /// Whether a path that is not there is meant not to be: the checkout is sparse.
    pub(super) fn is_skipped(&self, path: &[u8], base: &Base) -> bool {
        match &self.index {
            Some(index) => index.get(path).is_some_and(|(_, _, skipped)| *skipped),
            None => base.skipped.contains(path),
        }
    }

    /// Whether a path is a submodule's, one in another submodule included.
    pub(super) fn is_submodule(&self, path: &[u8]) -> bool {
        self.submodules.contains_key(path) || self.own.contains_key(path)
    }

    /// Submodules that the guest has a history of.
    pub(super) fn submodules_in_guest(&self) -> impl Iterator<Item = &[u8]> {
        self.own.keys().map(Vec::as_slice)
    }

    /// Whether a path is one within a submodule.
    pub(super) fn in_submodule(&self, path: &[u8]) -> bool {
        slashes(path).any(|above| self.submodules.contains_key(above))
    }
}

/// A submodule, with the directory of git's own that its file `.git` names.
fn own(top: &[u8], link: &[u8], fetched: &Fetched) -> Option<(Vec<u8>, Vec<u8>)> {
    const MODULES: &[u8] = b".git/modules/";
    let link = fetched.read(link, LINK)?;
    let link = link.strip_prefix(b"gitdir:")?.trim_ascii();
    let at = link.windows(MODULES.len()).position(|part| part == MODULES)?;
    let own = link.get(at..).filter(|own| is_path(own))?;
    Some((top.to_vec(), own.to_vec()))
}

fn slashes(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'/')
        .map(|(at, _)| path.get(..at).unwrap_or_default())
}

/// An entry of an index: its mode, its object, and whether it is not in the working tree on purpose.
type Staged = (u32, String, bool);

/// The paths of an index with their modes, objects, and whether they are not in the working tree on purpose.
fn index(quarantine: &Quarantine, file: &Path) -> Result<BTreeMap<Vec<u8>, Staged>, GitError> {
    let list = quarantine
        .command()
        .env("GIT_INDEX_FILE", file)
        .args(["ls-files", "-z", "--stage", "-t"])
        .output()?;
    let entries = list.split(|byte| *byte == 0).filter_map(|line| {
        let (tag, line) = line.split_at_checked(2)?;
        let tab = line.iter().position(|byte| *byte == b'\t')?;
        let (about, path) = (line.get(..tab)?, line.get(tab + 1..)?);
        let mut fields = std::str::from_utf8(about).ok()?.split(' ');
        let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
        let object = fields.next()?.to_owned();
        (is_path(path) && git_directory(path).is_none())
            .then(|| (path.to_vec(), (mode, object, tag == b"S ")))
    });
    Ok(entries.collect())
}
