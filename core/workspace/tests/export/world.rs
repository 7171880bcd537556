//! A host's workspace and a directory in place of a guest.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    io::Write,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{MetadataExt, PermissionsExt, chown, lchown},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;
use vm_types::guest::files::{Seen, SeenKind};
use vm_workspace::{
    Baseline, Cancel, Identity, Selection, Workspace,
    export::{Export, ExportError, Wish},
};

/// The path of bytes.
pub(crate) fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// A directory with both sides in it.
pub(crate) struct World {
    directory: TempDir,
    baseline: Option<Baseline>,
    identity: Identity,
}

impl World {
    /// A host's directory without git, and nothing in the guest.
    pub(crate) fn plain() -> Self {
        let world =
            Self { directory: tempfile::tempdir().unwrap(), baseline: None, identity: Identity::own() };
        for name in ["host", "guest", "scratch"] {
            fs::create_dir(world.directory.path().join(name)).unwrap();
        }
        world
    }

    /// A host's repository with one commit of these files.
    pub(crate) fn with(files: &[(&str, &str)]) -> Self {
        let world = Self::plain();
        git(&world.host(), &["init", "--quiet", "--initial-branch=main"]);
        git(&world.host(), &["config", "user.name", "A B"]);
        git(&world.host(), &["config", "user.email", "a@b.example"]);
        for (name, content) in files {
            write(&world.host().join(name), content.as_bytes());
        }
        git(&world.host(), &["add", "--all"]);
        git(&world.host(), &["commit", "--quiet", "--allow-empty", "-m", "first"]);
        world
    }

    pub(crate) fn host(&self) -> PathBuf {
        self.directory.path().join("host")
    }

    pub(crate) fn guest(&self) -> PathBuf {
        self.directory.path().join("guest")
    }

    /// A place for other things.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn workspace(&self) -> Workspace {
        Workspace::open(&self.host(), self.identity.clone(), &self.beside("scratch"), Cancel::default())
            .unwrap()
    }

    /// Makes the host's side that of a user, for whom is acted from here on.
    pub(crate) fn give_to(&mut self, user: u32) {
        let (uid, gid) = (Some(user), Some(user));
        fs::set_permissions(self.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(self.beside("scratch"), fs::Permissions::from_mode(0o711)).unwrap();
        chown(self.host(), uid, gid).unwrap();
        for seen in survey(&self.host()) {
            lchown(self.host().join(path(&seen.path)), uid, gid).unwrap();
        }
        self.identity = Identity { uid: user, gid: user, groups: vec![user] };
    }

    /// Puts the workspace into the guest, with its history where there is any and `history` says so.
    pub(crate) fn prepare(&mut self, history: bool) {
        let workspace = self.workspace();
        let mut archive = Vec::new();
        let sent = workspace.archive(Selection::All, &mut archive).unwrap();
        self.unpack(&archive);
        let history = history.then(|| {
            let mut archive = Vec::new();
            let history = workspace.git_directory(None, &mut archive).unwrap();
            self.unpack(&archive);
            git(&self.guest(), &["config", "user.name", "Guest"]);
            git(&self.guest(), &["config", "user.email", "guest@b.example"]);
            history
        });
        self.baseline = Some(Baseline::new(&workspace, "test", history, sent, survey(&self.guest())));
        // What is done in the same tick of the clock may not show in any time of a file's.
        let tick = self.beside("tick");
        let time = || {
            fs::write(&tick, "").unwrap();
            let about = fs::metadata(&tick).unwrap();
            (about.ctime(), about.ctime_nsec())
        };
        let now = time();
        while time() == now {}
    }

    fn unpack(&self, archive: &[u8]) {
        let mut archive = tar::Archive::new(archive);
        archive.set_preserve_permissions(true);
        archive.set_overwrite(true);
        archive.unpack(self.guest()).unwrap();
    }

    pub(crate) fn baseline(&self) -> Baseline {
        self.baseline.clone().unwrap()
    }

    /// Begins to bring back what the guest has now, and fetches it.
    pub(crate) fn export(&self, wish: Wish) -> Export {
        self.try_export(wish).unwrap()
    }

    pub(crate) fn try_export(&self, wish: Wish) -> Result<Export, ExportError> {
        let mut export = Export::begin(&self.workspace(), self.baseline(), survey(&self.guest()), wish)?;
        let mut rounds = 0;
        loop {
            let wanted = export.wanted()?;
            if wanted.is_empty() {
                return Ok(export);
            }
            rounds += 1;
            assert!(rounds <= 2, "two rounds at most, and then {wanted:?}");
            export.take(pack(&self.guest(), &wanted).as_slice())?;
        }
    }

    /// The tree that git makes of the guest's working tree.
    pub(crate) fn guest_tree(&self) -> String {
        tree_of(&self.guest(), &self.beside("guest-index"))
    }
}

/// The tree that git makes of a working tree, which keeps the index that it has.
pub(crate) fn tree_of(top: &Path, index: &Path) -> String {
    let own = top.join(git(top, &["rev-parse", "--git-path", "index"]));
    if own.exists() {
        fs::copy(&own, index).unwrap();
        // Git looks again at files that are not older than the index.
        let time = fs::metadata(own).unwrap().modified().unwrap();
        fs::File::options().write(true).open(index).unwrap().set_modified(time).unwrap();
    }
    let index = index.to_str().unwrap();
    git_with(top, &["add", "--all"], &[("GIT_INDEX_FILE", index)], b"").unwrap();
    git_with(top, &["write-tree"], &[("GIT_INDEX_FILE", index)], b"").unwrap()
}

/// Runs git without anybody's configuration; what it says.
pub(crate) fn git(directory: &Path, args: &[&str]) -> String {
    git_with(directory, args, &[], b"").unwrap_or_else(|error| panic!("git {args:?}: {error}"))
}

pub(crate) fn git_with(
    directory: &Path,
    args: &[&str],
    env: &[(&str, &str)],
    input: &[u8],
) -> Result<String, String> {
    let mut child = Command::new("git")
        .current_dir(directory)
        .args(args)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .envs([("HOME", "/nonexistent"), ("LC_ALL", "C"), ("GIT_CONFIG_NOSYSTEM", "1")])
        .envs([("GIT_COMMITTER_DATE", "2020-01-02T03:04:05Z"), ("GIT_AUTHOR_DATE", "2020-01-02T03:04:05Z")])
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may end without reading all of it.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Writes a file and the directories above it.
pub(crate) fn write(file: &Path, content: &[u8]) {
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, content).unwrap();
}

pub(crate) fn make_executable(file: &Path) {
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
}

/// All that is below a directory, as a guest's agent tells it.
pub(crate) fn survey(top: &Path) -> Vec<Seen> {
    let mut list = Vec::new();
    walk(top, b"", &mut list);
    list.sort_by(|one, other| one.path.cmp(&other.path));
    list
}

fn walk(top: &Path, below: &[u8], list: &mut Vec<Seen>) {
    for entry in fs::read_dir(top.join(path(below))).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_vec();
        let path = if below.is_empty() { name } else { [below, b"/", &name].concat() };
        let about = entry.metadata().unwrap();
        let kind = match about.file_type() {
            kind if kind.is_file() => SeenKind::File,
            kind if kind.is_dir() => SeenKind::Directory,
            kind if kind.is_symlink() => SeenKind::Symlink,
            _ => SeenKind::Other,
        };
        let time = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        list.push(Seen {
            kind,
            mode: about.mode() & 0o7777,
            uid: about.uid(),
            gid: about.gid(),
            size: about.len(),
            mtime: time(about.mtime(), about.mtime_nsec()),
            ctime: time(about.ctime(), about.ctime_nsec()),
            inode: about.ino(),
            target: (kind == SeenKind::Symlink)
                .then(|| fs::read_link(entry.path()).unwrap().into_os_string().into_vec()),
            path: path.clone(),
        });
        if kind == SeenKind::Directory {
            walk(top, &path, list);
        }
    }
}

/// Some files, as a guest's agent packs them.
pub(crate) fn pack(top: &Path, wanted: &[Vec<u8>]) -> Vec<u8> {
    let files: Vec<_> =
        wanted.iter().map(|name| (name.as_slice(), fs::read(top.join(path(name))).unwrap())).collect();
    let modes: Vec<u32> =
        wanted.iter().map(|name| fs::metadata(top.join(path(name))).unwrap().mode() & 0o7777).collect();
    archive(files.iter().zip(modes).map(|((name, content), mode)| (*name, content.as_slice(), mode)))
}

/// An archive of files with such names, whatever they are.
pub(crate) fn archive<'a>(files: impl IntoIterator<Item = (&'a [u8], &'a [u8], u32)>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content, mode) in files {
        builder.append_pax_extensions([("path", name)]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Every byte of a tree, for comparing: what each path is, its permissions, its content.
pub(crate) fn snapshot(top: &Path) -> BTreeMap<Vec<u8>, (SeenKind, u32, Vec<u8>)> {
    let all = survey(top).into_iter();
    all.map(|seen| {
        let content = match seen.kind {
            SeenKind::File => fs::read(top.join(path(&seen.path))).unwrap(),
            _ => seen.target.unwrap_or_default(),
        };
        (seen.path, (seen.kind, seen.mode, content))
    })
    .collect()
}

/// The paths at which two trees differ.
pub(crate) fn differing<T: PartialEq>(
    one: &BTreeMap<Vec<u8>, T>,
    other: &BTreeMap<Vec<u8>, T>,
) -> Vec<String> {
    let paths = one.keys().chain(other.keys().filter(|path| !one.contains_key(*path)));
    let differing = paths.filter(|path| one.get(*path) != other.get(*path));
    differing.map(|path| String::from_utf8_lossy(path).into_owned()).collect()
}

/// The same of files and links that are not git's own, with permissions as git has them.
pub(crate) fn files_of(top: &Path) -> BTreeMap<Vec<u8>, (SeenKind, bool, Vec<u8>)> {
    let all = snapshot(top).into_iter();
    all.filter(|(path, (kind, ..))| {
        *kind != SeenKind::Directory && !path.split(|byte| *byte == b'/').any(|name| name == b".git")
    })
    .map(|(path, (kind, mode, content))| (path, (kind, kind == SeenKind::File && mode & 0o100 != 0, content)))
    .collect()
}
