//! A directory that stands for a guest's.

use std::{
    fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use vm_types::guest::files::{Seen, SeenKind};
use vm_workspace::{Baseline, Difference, History, Selection, Workspace};

use crate::repo::{git_in, path, walk};

pub(crate) struct Guest {
    home: TempDir,
}

impl Guest {
    pub(crate) fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn top(&self) -> PathBuf {
        self.home.path().to_owned()
    }

    pub(crate) fn git(&self, args: &[&str]) -> String {
        git_in(&self.top(), args)
    }

    pub(crate) fn unpack(&self, tar: &[u8]) {
        let mut archive = tar::Archive::new(tar);
        archive.set_preserve_permissions(true);
        archive.set_overwrite(true);
        archive.unpack(self.home.path()).unwrap();
    }

    /// As the agent does: files and links; directories that are empty by then.
    pub(crate) fn remove(&self, paths: &[Vec<u8>]) {
        for name in paths {
            let file = self.top().join(path(name));
            match fs::symlink_metadata(&file) {
                Ok(about) if about.is_dir() => _ = fs::remove_dir(&file),
                Ok(_) => fs::remove_file(&file).unwrap(),
                Err(error) => assert!(
                    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory),
                    "{error}"
                ),
            }
        }
    }

    pub(crate) fn survey(&self) -> Vec<Seen> {
        let mut tree = Vec::new();
        walk(&self.top(), b"", &mut |name, file| {
            tree.push(seen(name, file));
            true
        });
        tree.sort_by(|a, b| a.path.cmp(&b.path));
        tree
    }

    pub(crate) fn digests(&self, paths: &[Vec<u8>]) -> Vec<Option<[u8; 32]>> {
        let digest = |name: &Vec<u8>| -> Option<[u8; 32]> {
            let file = self.top().join(path(name));
            let regular = fs::symlink_metadata(&file).is_ok_and(|about| about.is_file());
            regular.then(|| Sha256::digest(fs::read(&file).unwrap()).into())
        };
        paths.iter().map(digest).collect()
    }

    /// Gets all of a workspace.
    pub(crate) fn prepare(&self, workspace: &Workspace, depth: Option<u32>) -> Baseline {
        let history = workspace.head().is_some().then(|| self.take_git(workspace, depth));
        let mut tar = Vec::new();
        let sent = workspace.archive(Selection::All, &mut tar).unwrap();
        self.unpack(&tar);
        Baseline::new(workspace, "test", history, sent, self.survey())
    }

    pub(crate) fn take_git(&self, workspace: &Workspace, depth: Option<u32>) -> History {
        let mut tar = Vec::new();
        let history = workspace.git_directory(depth, &mut tar).unwrap();
        self.unpack(&tar);
        history
    }

    pub(crate) fn difference(&self, workspace: &Workspace, baseline: &Baseline) -> Difference {
        baseline.difference(workspace, &self.survey(), &mut |paths| Ok(self.digests(paths))).unwrap()
    }

    /// Makes up for a difference.
    pub(crate) fn catch_up(&self, workspace: &Workspace, baseline: &Baseline) -> (Difference, Baseline) {
        let difference = self.difference(workspace, baseline);
        self.remove(&difference.remove);
        let mut tar = Vec::new();
        let sent = workspace.archive(Selection::Paths(&difference.send), &mut tar).unwrap();
        self.unpack(&tar);
        let history = match &baseline.history {
            Some(history) if difference.history => {
                let mut tar = Vec::new();
                let history = workspace.git_update(history, &mut tar).unwrap();
                self.unpack(&tar);
                Some(history)
            }
            _ => None,
        };
        let after = baseline.after(workspace, &difference, sent, history, self.survey());
        (difference, after)
    }
}

fn seen(name: &[u8], file: &Path) -> Seen {
    let about = fs::symlink_metadata(file).unwrap();
    let kind = match about.file_type() {
        kind if kind.is_file() => SeenKind::File,
        kind if kind.is_dir() => SeenKind::Directory,
        kind if kind.is_symlink() => SeenKind::Symlink,
        _ => SeenKind::Other,
    };
    let time = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    Seen {
        path: name.to_vec(),
        kind,
        mode: about.mode() & 0o7777,
        uid: about.uid(),
        gid: about.gid(),
        size: if kind == SeenKind::Directory { 0 } else { about.len() },
        mtime: time(about.mtime(), about.mtime_nsec()),
        ctime: time(about.ctime(), about.ctime_nsec()),
        inode: about.ino(),
        target: (kind == SeenKind::Symlink)
            .then(|| fs::read_link(file).unwrap().as_os_str().as_bytes().to_vec()),
    }
}

/// What git says of a working tree, file by file.
pub(crate) fn said(top: &Path) -> String {
    let status =
        git_in(top, &["status", "--porcelain=v2", "--branch", "--untracked-files=all", "--no-renames"]);
    // What is known of the remote does not go along.
    let upstream = |line: &&str| line.starts_with("# branch.upstream") || line.starts_with("# branch.ab");
    let mut said: String =
        status.lines().filter(|line| !upstream(line)).flat_map(|line| [line, "\n"]).collect();
    said += &git_in(top, &["ls-files", "--stage", "-v"]);
    for args in [&["rev-parse", "HEAD", "HEAD^{tree}"][..], &["symbolic-ref", "-q", "HEAD"]] {
        let output = crate::repo::try_git(top, args);
        said += "\n";
        said += &String::from_utf8_lossy(&output.stdout);
    }
    said
}
