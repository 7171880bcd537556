//! Directories and repositories on the host, for tests.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;
use vm_workspace::{Cancel, Identity, Workspace, WorkspaceError};

/// A directory on the host, and one for scratch.
pub(crate) struct Repo {
    home: TempDir,
}

pub(crate) fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// Git without anybody's configuration; its output without the last end of line.
pub(crate) fn git_in(directory: &Path, args: &[&str]) -> String {
    let output = try_git(directory, args);
    assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim_end_matches('\n').to_owned()
}

pub(crate) fn try_git(directory: &Path, args: &[&str]) -> std::process::Output {
    let mut command = Command::new("git");
    command.arg("-C").arg(directory).args([
        "-c",
        "protocol.file.allow=always",
        "-c",
        "init.defaultBranch=main",
    ]);
    command.args(args).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    for (name, value) in [
        ("HOME", "/nonexistent"),
        ("LC_ALL", "C"),
        ("GIT_CONFIG_NOSYSTEM", "1"),
        ("GIT_AUTHOR_NAME", "A"),
        ("GIT_AUTHOR_EMAIL", "a@example.org"),
        ("GIT_COMMITTER_NAME", "A"),
        ("GIT_COMMITTER_EMAIL", "a@example.org"),
    ] {
        command.env(name, value);
    }
    command.output().unwrap()
}

/// Commits all that is there.
pub(crate) fn commit(directory: &Path) -> String {
    git_in(directory, &["add", "-A"]);
    git_in(directory, &["commit", "-q", "--allow-empty", "-m", "work"]);
    git_in(directory, &["rev-parse", "HEAD"])
}

impl Repo {
    pub(crate) fn plain() -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("top")).unwrap();
        fs::create_dir(home.path().join("scratch")).unwrap();
        Self { home }
    }

    pub(crate) fn git_repository() -> Self {
        Self::of_format("sha1")
    }

    pub(crate) fn of_format(format: &str) -> Self {
        let repo = Self::plain();
        repo.git(&["init", "-q", &format!("--object-format={format}")]);
        repo
    }

    pub(crate) fn top(&self) -> PathBuf {
        self.home.path().join("top")
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    pub(crate) fn scratch(&self) -> PathBuf {
        self.home.path().join("scratch")
    }

    pub(crate) fn git(&self, args: &[&str]) -> String {
        git_in(&self.top(), args)
    }

    pub(crate) fn write(&self, name: impl AsRef<[u8]>, content: impl AsRef<[u8]>) {
        let file = self.top().join(path(name.as_ref()));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }

    pub(crate) fn mode(&self, name: impl AsRef<[u8]>, mode: u32) {
        fs::set_permissions(self.top().join(path(name.as_ref())), fs::Permissions::from_mode(mode)).unwrap();
    }

    pub(crate) fn commit(&self) -> String {
        commit(&self.top())
    }

    pub(crate) fn open(&self) -> Workspace {
        self.try_open(&self.top()).unwrap()
    }

    pub(crate) fn try_open(&self, path: &Path) -> Result<Workspace, WorkspaceError> {
        Workspace::open(path, Identity::own(), &self.scratch(), Cancel::default())
    }
}

/// What an entry is, and what it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Thing {
    File(u32, Vec<u8>),
    Directory(u32),
    Link(Vec<u8>),
    Other,
}

/// What is below a directory, without what is in a `.git`, or that itself.
pub(crate) fn things(top: &Path) -> BTreeMap<Vec<u8>, Thing> {
    let mut found = BTreeMap::new();
    walk(top, b"", &mut |path, file| {
        if path.split(|byte| *byte == b'/').any(|name| name == b".git") {
            return false;
        }
        let about = fs::symlink_metadata(file).unwrap();
        let mode = about.permissions().mode() & 0o777;
        let thing = if about.is_dir() {
            Thing::Directory(mode)
        } else if about.is_symlink() {
            Thing::Link(fs::read_link(file).unwrap().as_os_str().as_bytes().to_vec())
        } else if about.is_file() {
            Thing::File(mode, fs::read(file).unwrap())
        } else {
            Thing::Other
        };
        found.insert(path.to_vec(), thing);
        true
    });
    found
}

/// Tells of every entry below a directory; `each` says whether to go into it.
pub(crate) fn walk(directory: &Path, prefix: &[u8], each: &mut dyn FnMut(&[u8], &Path) -> bool) {
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let mut name = prefix.to_vec();
        name.extend_from_slice(entry.file_name().as_bytes());
        if each(&name, &entry.path()) && entry.file_type().unwrap().is_dir() {
            name.push(b'/');
            walk(&entry.path(), &name, each);
        }
    }
}

/// What the workspace has, read anew.
pub(crate) fn things_of(workspace: &Workspace) -> BTreeMap<Vec<u8>, Thing> {
    let all = things(workspace.top());
    workspace.files().iter().map(|entry| (entry.path.clone(), all[&entry.path].clone())).collect()
}
