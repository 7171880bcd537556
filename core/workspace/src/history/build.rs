//! Makes a `.git` for a guest, in the scratch directory.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use tempfile::TempDir;
use vm_types::guest::files::is_within;

use crate::{
    Git, GitCommand, Workspace, WorkspaceError,
    facts::{Place, Repository},
    files::read_small,
    history::{Line, index_digest, walk},
    listing::{GITLINK, Staged, staged, within},
    text::path as of_bytes,
};

const MAKING: &str = "making the guest's repository";
/// What a new index is written with, whatever the user's configuration prefers: one file that any git reads.
pub(super) const INDEX: [&str; 8] = [
    "-c",
    "core.splitIndex=false",
    "-c",
    "core.untrackedCache=false",
    "-c",
    "index.skipHash=false",
    "-c",
    "index.version=2",
];
/// What decides how git compares files with what it keeps.
const COMPARING: [&str; 4] = ["core.fileMode", "core.symlinks", "core.autocrlf", "core.eol"];

/// A `.git` that was made.
pub(super) struct Made {
    scratch: TempDir,
    pub(super) line: Line,
    /// Whether it is whole, not only what is new.
    pub(super) fresh: bool,
}

impl Made {
    pub(super) fn git_directory(&self) -> PathBuf {
        self.scratch.path().join("made/.git")
    }

    /// Whether a guest gets this file. One that has a configuration keeps it.
    pub(super) fn goes(&self, path: &[u8]) -> bool {
        self.fresh || !(path == b"config" || path == b"info" || path.starts_with(b"info/"))
    }
}

pub(super) fn build(
    workspace: &Workspace,
    repository: &Repository,
    git_home: Vec<u8>,
    depth: Option<u32>,
    known: Option<&Line>,
) -> Result<Made, WorkspaceError> {
    let builder = Builder::new(workspace, repository)?;
    let staged = staged(workspace.git(), &repository.directory)?;
    let base = known.and_then(|known| Some((known, known.head.as_deref()?)));
    let plan = match (&repository.head, base) {
        (None, _) => walk::Plan { commits: Some(HashSet::new()), ..walk::Plan::default() },
        (Some(head), None) => walk::fresh(workspace, repository, head, depth)?,
        (Some(head), Some((known, base))) => walk::update(workspace, repository, head, known, base)?,
    };
    builder.pack(&plan, &staged)?;
    builder.shallow(&plan)?;
    builder.references(&plan, known.is_none())?;
    builder.index(&staged)?;
    if known.is_none() {
        builder.configure(&git_home, &staged)?;
    }
    let line = Line {
        path: repository.path.clone(),
        git: git_home,
        head: repository.head.clone(),
        branch: repository.branch.clone(),
        shallow: plan.shallow,
        index: index_digest(&staged),
    };
    Ok(Made { scratch: builder.scratch, line, fresh: known.is_none() })
}

struct Builder<'a> {
    workspace: &'a Workspace,
    repository: &'a Repository,
    scratch: TempDir,
}

impl<'a> Builder<'a> {
    fn new(workspace: &'a Workspace, repository: &'a Repository) -> Result<Self, WorkspaceError> {
        let scratch = workspace.scratch()?;
        let format = format!("--object-format={}", repository.format);
        let init = workspace.git().at(scratch.path()).env("GIT_DEFAULT_REF_FORMAT", "files");
        init.args(["init", "--quiet", "--template=", &format, "made"])
            .output()
            .map_err(WorkspaceError::git(MAKING))?;
        Ok(Self { workspace, repository, scratch })
    }

    fn made(&self) -> PathBuf {
        self.scratch.path().join("made")
    }

    /// Git in the new repository, with the old one's objects at hand.
    fn git(&self) -> GitCommand<'a> {
        let objects = list_element(&self.repository.common_directory.join("objects"));
        self.workspace.git().at(&self.made()).env("GIT_ALTERNATE_OBJECT_DIRECTORIES", objects)
    }

    fn host(&self) -> GitCommand<'a> {
        self.workspace.git().at(&self.repository.directory)
    }

    fn done(command: GitCommand<'_>) -> Result<(), WorkspaceError> {
        command.output().map(drop).map_err(WorkspaceError::git(MAKING))
    }

    fn pack(&self, plan: &walk::Plan, staged: &[Staged]) -> Result<(), WorkspaceError> {
        let mut revisions = plan.revisions.clone();
        revisions.extend(self.only_staged(staged)?);
        if revisions.is_empty() {
            return Ok(());
        }
        // It goes no further than into a guest on this host: what is packed already is copied, and no time is spent on
        // making the rest small.
        let args = [
            "-c",
            "pack.compression=1",
            "pack-objects",
            "--window=0",
            "--revs",
            "--quiet",
            "--delta-base-offset",
            "--non-empty",
            ".git/objects/pack/pack",
        ];
        let input = revisions.join("\n") + "\n";
        let packed = self.git().args(args).input(input.into_bytes()).output();
        packed.map(drop).map_err(WorkspaceError::git("packing the history"))
    }

    /// Files in the index that the commit does not have.
    fn only_staged(&self, staged: &[Staged]) -> Result<Vec<String>, WorkspaceError> {
        let mut committed = HashSet::new();
        if let Some(head) = &self.repository.head {
            let tree = self.host().args(["ls-tree", "-r", "-z", "--full-tree", head]).output();
            for record in tree.map_err(WorkspaceError::git(MAKING))?.split(|byte| *byte == 0) {
                // MODE TYPE OBJECT TAB PATH
                let object = record.split(|byte| matches!(byte, b' ' | b'\t')).nth(2);
                committed.extend(object.map(|object| String::from_utf8_lossy(object).into_owned()));
            }
        }
        let mut objects: Vec<String> = staged
            .iter()
            .filter(|entry| entry.mode != GITLINK && !committed.contains(&entry.object))
            .map(|entry| entry.object.clone())
            .collect();
        objects.sort_unstable();
        objects.dedup();
        // The name of an untracked file is in the index with the empty file's object, which may not exist.
        let intended = self.intended()?;
        let empty: HashSet<&String> =
            staged.iter().filter(|entry| intended.contains(&entry.path)).map(|entry| &entry.object).collect();
        objects.retain(|object| !empty.contains(object));
        Ok(objects)
    }

    /// Files of which only the name is in the index.
    fn intended(&self) -> Result<HashSet<Vec<u8>>, WorkspaceError> {
        let args = [
            "diff-files",
            "-z",
            "--name-only",
            "--diff-filter=A",
            "--ignore-submodules=all",
            "--no-ext-diff",
        ];
        let host = self.workspace.git().comparing(&self.repository.directory);
        let output = host.and_then(|host| host.args(args).output()).map_err(WorkspaceError::git(MAKING))?;
        Ok(output.split(|byte| *byte == 0).filter(|path| !path.is_empty()).map(<[u8]>::to_vec).collect())
    }

    fn shallow(&self, plan: &walk::Plan) -> Result<(), WorkspaceError> {
        if plan.shallow.is_empty() {
            return Ok(());
        }
        let content = plan.shallow.join("\n") + "\n";
        self.write(".git/shallow", content.as_bytes())
    }

    /// Writes a file of the new repository, as its owner.
    fn write(&self, path: &str, content: &[u8]) -> Result<(), WorkspaceError> {
        let path = self.made().join(path);
        self.workspace.identity().act(|| {
            let failed = |source| WorkspaceError::Scratch { path: path.clone(), source };
            if let Some(above) = path.parent() {
                std::fs::create_dir_all(above).map_err(failed)?;
            }
            std::fs::write(&path, content).map_err(failed)
        })
    }

    fn references(&self, plan: &walk::Plan, fresh: bool) -> Result<(), WorkspaceError> {
        match (&self.repository.branch, &self.repository.head) {
            (Some(branch), head) => {
                let name = [b"refs/heads/", branch.as_slice()].concat();
                let name = OsStr::from_bytes(&name);
                Self::done(self.git().args(["symbolic-ref", "HEAD"]).arg(name))?;
                if let Some(head) = head {
                    Self::done(self.git().arg("update-ref").arg(name).arg(head))?;
                }
            }
            (None, Some(head)) => Self::done(self.git().args(["update-ref", "--no-deref", "HEAD", head]))?,
            (None, None) => {}
        }
        let Some(head) = &self.repository.head else { return Ok(()) };
        let mut list = self.host().args(["for-each-ref", "--format=%(objectname) %(*objectname) %(refname)"]);
        if plan.commits.is_none() {
            list = list.arg(format!("--merged={head}"));
        }
        let output = list.arg("refs/tags").output().map_err(WorkspaceError::git(MAKING))?;
        let (mut creates, mut objects) = (Vec::new(), Vec::new());
        for line in output.split(|byte| *byte == b'\n') {
            let mut fields = line.splitn(3, |byte| *byte == b' ').map(|field| String::from_utf8_lossy(field));
            let (Some(object), Some(commit)) = (fields.next(), fields.next()) else { continue };
            let Some(name) = line.splitn(3, |byte| *byte == b' ').nth(2) else { continue };
            let tagged = if commit.is_empty() { &object } else { &commit };
            if plan.commits.as_ref().is_none_or(|commits| commits.contains(&**tagged)) {
                if !commit.is_empty() {
                    // A tag may be one of another tag. Of the commit all is there.
                    objects.push(format!("{object}\n^{object}^{{commit}}\n"));
                }
                creates.extend([b"create ", name, b" ", object.as_bytes(), b"\n"].concat());
            }
        }
        if creates.is_empty() {
            return Ok(());
        }
        if !objects.is_empty() {
            let args = ["pack-objects", "--revs", "--quiet", "--non-empty", ".git/objects/pack/pack"];
            Self::done(self.git().args(args).input(objects.concat().into_bytes()))?;
        }
        Self::done(self.git().args(["update-ref", "--stdin"]).input(creates))?;
        if fresh { Self::done(self.git().arg("pack-refs")) } else { Ok(()) }
    }

    /// Makes the index anew: without what the host knows of its own files, which are others in the guest.
    fn index(&self, staged: &[Staged]) -> Result<(), WorkspaceError> {
        let intended = self.intended()?;
        let mut all = Vec::new();
        for entry in staged.iter().filter(|entry| !intended.contains(&entry.path)) {
            all.extend(format!("{:o} {} {}\t", entry.mode, entry.object, entry.stage).into_bytes());
            all.extend(&entry.path);
            all.push(0);
        }
        let update = |args: &[&str], input: Vec<u8>| {
            Self::done(self.git().args(INDEX).args(["update-index", "-z"]).args(args).input(input))
        };
        // One that is empty is written, too: an index that lacks means that everything was removed.
        update(&["--force-write-index", "--index-info"], all)?;
        for (option, wanted) in [
            ("--skip-worktree", (|entry| entry.skipped) as fn(&Staged) -> bool),
            ("--assume-unchanged", |entry| entry.assumed && !entry.skipped),
        ] {
            let paths =
                listed(staged.iter().filter(|entry| wanted(entry)).map(|entry| entry.path.as_slice()));
            if !paths.is_empty() {
                update(&[option, "--stdin"], paths)?;
            }
        }
        if !intended.is_empty() {
            let mut paths: Vec<&[u8]> = intended.iter().map(Vec::as_slice).collect();
            paths.sort_unstable();
            let add = self
                .host()
                .args(INDEX)
                .args([
                    "--literal-pathspecs",
                    "add",
                    "--intent-to-add",
                    "--force",
                    "--pathspec-from-file=-",
                    "--pathspec-file-nul",
                ])
                .env("GIT_DIR", self.made().join(".git"))
                .env("GIT_WORK_TREE", &self.repository.directory)
                .input(listed(paths.into_iter()));
            Self::done(add)?;
        }
        Ok(())
    }

    fn configure(&self, git_home: &[u8], staged: &[Staged]) -> Result<(), WorkspaceError> {
        let failed = WorkspaceError::git("reading the repository's configuration");
        let get = |key: &str| self.host().args(["config", "--get", key]).find().map_err(&failed);
        for key in COMPARING.into_iter().chain(["user.name", "user.email"]) {
            if let Some(value) = get(key)? {
                self.set(key.as_bytes(), &value)?;
            }
        }
        if let Some(url) = get("remote.origin.url")? {
            self.set(b"remote.origin.url", &without_password(&url))?;
            self.set(b"remote.origin.fetch", b"+refs/heads/*:refs/remotes/origin/*")?;
        }
        let mut excluded = Vec::new();
        // The user's own list may be a link; one in the repository would have its maker choose which file goes into a guest.
        let own = self.repository.common_directory.join("info/exclude");
        for (pattern_file, follow) in [(own, false), (self.excludes()?, true)] {
            excluded.extend(self.read(&pattern_file, follow)?.unwrap_or_default());
            if excluded.last().is_some_and(|last| *last != b'\n') {
                excluded.push(b'\n');
            }
        }
        if !excluded.is_empty() {
            self.write(".git/info/exclude", &excluded)?;
        }
        if get("core.sparseCheckout")?.is_some_and(|value| value == b"true") {
            for key in ["core.sparseCheckout", "core.sparseCheckoutCone"] {
                if let Some(value) = get(key)? {
                    self.set(key.as_bytes(), &value)?;
                }
            }
            let patterns = self.read(&self.repository.git_directory.join("info/sparse-checkout"), false)?;
            self.write(".git/info/sparse-checkout", &patterns.unwrap_or_default())?;
        }
        for entry in staged.iter().filter(|entry| entry.mode == GITLINK) {
            let path = within(&self.repository.path, &entry.path);
            let there = |other: &&Repository| other.path == path && other.place == Place::Submodule;
            if self.workspace.repositories().iter().find(there).is_some() {
                let name = submodule_name(self.workspace.git(), &self.repository.directory, &entry.path)?;
                // A key cannot have an end of line.
                if !name.contains(&b'\n') {
                    self.set(&[b"submodule.", name.as_slice(), b".active"].concat(), b"true")?;
                }
            }
        }
        // From here on git finds no files for the new repository, where it is now.
        if !self.repository.path.is_empty() {
            self.set(b"core.worktree", &way(git_home, &self.repository.path))?;
        }
        Ok(())
    }

    /// The user's own patterns of what is ignored everywhere. A repository's word for where these are does not count.
    fn excludes(&self) -> Result<PathBuf, WorkspaceError> {
        let args = ["config", "--show-scope", "-z", "--type=path", "--get-all", "core.excludesFile"];
        let said = self.host().args(args).find().map_err(WorkspaceError::git(MAKING))?.unwrap_or_default();
        let fields: Vec<&[u8]> = said.split(|byte| *byte == 0).collect();
        let mut own =
            fields.as_chunks::<2>().0.iter().filter(|[scope, _]| matches!(*scope, b"global" | b"system"));
        let set = own.next_back().map(|[_, path]| *path);
        let home = self.workspace.identity().home().unwrap_or_default();
        Ok(set.map_or_else(|| home.join(".config/git/ignore"), |path| of_bytes(path).to_owned()))
    }

    /// A file of the host's, read as who asked; `None` where there is none that can be read.
    fn read(&self, path: &Path, follow: bool) -> Result<Option<Vec<u8>>, WorkspaceError> {
        self.workspace.identity().act(|| Ok(read_small(path, follow).ok()))
    }

    fn set(&self, key: &[u8], value: &[u8]) -> Result<(), WorkspaceError> {
        let args = ["config", "--file", ".git/config"];
        Self::done(self.git().args(args).arg(OsStr::from_bytes(key)).arg(OsStr::from_bytes(value)))
    }
}

/// A path as an element of a list of paths, quoted, as it may have the list's separator.
pub(super) fn list_element(path: &Path) -> OsString {
    let mut quoted = b"\"".to_vec();
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b'"' | b'\\') {
            quoted.push(b'\\');
        }
        quoted.push(*byte);
    }
    quoted.push(b'"');
    OsString::from_vec(quoted)
}

fn listed<'a>(paths: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    paths.flat_map(|path| path.iter().copied().chain([0])).collect()
}

/// The relative path from one directory to another, both relative to the same one.
pub(super) fn way(from: &[u8], to: &[u8]) -> Vec<u8> {
    let up = from.split(|byte| *byte == b'/').count();
    [b"../".repeat(up).as_slice(), to].concat()
}

/// What git calls the submodule at a path: what `.gitmodules` says, if that can be a path, too.
pub(super) fn submodule_name(git: &Git, directory: &Path, path: &[u8]) -> Result<Vec<u8>, WorkspaceError> {
    let args = ["config", "--file", ".gitmodules", "-z", "--get-regexp", r"^submodule\..*\.path$"];
    let output = match git.at(directory).args(args).output() {
        Ok(output) => output,
        Err(error @ crate::GitError::Cancelled) => return Err(WorkspaceError::git(MAKING)(error)),
        // There is no such file, or it is damaged.
        Err(_) => Vec::new(),
    };
    // Of two the last one counts, as with git.
    let mut names = output.split(|byte| *byte == 0).rev().filter_map(|record| {
        let end = record.iter().position(|byte| *byte == b'\n')?;
        let name = record[..end].strip_prefix(b"submodule.")?.strip_suffix(b".path")?;
        (&record[end + 1..] == path && is_within(name)).then(|| name.to_vec())
    });
    Ok(names.next().unwrap_or_else(|| path.to_vec()))
}

/// A URL without the name and password in it, which are somebody's; an SSH address keeps its user.
fn without_password(url: &[u8]) -> Vec<u8> {
    let Some(at) = url.windows(3).position(|part| part == b"://") else { return url.to_vec() };
    let (scheme, rest) = url.split_at(at + 3);
    let host_end = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    let Some(end) = rest[..host_end].iter().rposition(|byte| *byte == b'@') else { return url.to_vec() };
    let user = match rest[..end].iter().position(|byte| *byte == b':') {
        Some(colon) => &rest[..colon],
        None => &rest[..end],
    };
    if scheme.windows(3).any(|part| part.eq_ignore_ascii_case(b"ssh")) {
        [scheme, user, &rest[end..]].concat()
    } else {
        [scheme, &rest[end + 1..]].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_stay_on_the_host() {
        for (url, kept) in [
            ("https://me:token@host/a.git", "https://host/a.git"),
            ("https://token@host:8443/a@b", "https://host:8443/a@b"),
            ("https://a:b@c@host/x", "https://host/x"),
            ("ssh://git:secret@host/a", "ssh://git@host/a"),
            ("git@host:a/b.git", "git@host:a/b.git"),
            ("https://host/a", "https://host/a"),
            ("/srv/a@b.git", "/srv/a@b.git"),
        ] {
            assert_eq!(without_password(url.as_bytes()), kept.as_bytes(), "{url}");
        }
    }

    #[test]
    fn a_way_leads_up_and_down() {
        assert_eq!(way(b".git/modules/a", b"a"), b"../../../a");
        assert_eq!(way(b"a/b", b".git/modules/b"), b"../../.git/modules/b");
    }
}
