//! What importers are tried with: a manager that has them, a directory of the host, and another one for a guest.

use std::{
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use jsonrpsee::core::async_trait;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use vm_engine::ports::{ImportFailure, ImportRequest, ImportSource, ImportWatch, Imported, Importers};
use vm_plugin::{
    PluginError,
    ports::{Blob, FileMode, GuestCommand, GuestOutput, Sandbox},
};
use vm_types::{
    Layout,
    guest::files::{Account, Seen, SeenKind},
};
use vm_workspace::{Baseline, Cancel, Identity, Workspace};

use super::super::super::{
    manager::Manager,
    sandbox::GuestFiles,
    tests::{Bench, params},
};

/// Plugins as `plugins/build` builds them, once.
pub(super) fn built(fixtures: bool) -> PathBuf {
    static BUILT: [OnceLock<PathBuf>; 2] = [OnceLock::new(), OnceLock::new()];
    let out = BUILT[usize::from(fixtures)].get_or_init(|| {
        let own = std::env::current_exe().unwrap();
        // Where cargo keeps what tests make, beside `deps`.
        let scratch = own.ancestors().nth(3).unwrap().join("tmp");
        let out = scratch.join(if fixtures { "vmd-fixtures" } else { "vmd-plugins" });
        let mut build = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/build"));
        build
            .arg(&out)
            .args(fixtures.then_some("--fixtures"))
            .env("PLUGINS_TARGET", scratch.join("plugins/build"));
        let build =
            build.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env("CARGO", env!("CARGO"));
        let output = build.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        out
    });
    out.clone()
}

/// A guest that is a directory of this host; what is absolute in the guest is below it.
pub(super) struct Directory {
    pub(super) root: PathBuf,
    pub(super) changes: AtomicUsize,
    pub(super) commands: Mutex<Vec<Vec<String>>>,
}

fn failed(error: std::io::Error) -> PluginError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<PluginError>()) {
        Some(error) => error.clone(),
        None => PluginError::new("guest.failed", error.to_string()),
    }
}

fn walk(directory: &Path, prefix: &[u8], seen: &mut Vec<Seen>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.map(Result::unwrap) {
        let about = entry.path().symlink_metadata().unwrap();
        let mut path = prefix.to_vec();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(entry.file_name().as_bytes());
        let kind = match about.file_type() {
            kind if kind.is_dir() => SeenKind::Directory,
            kind if kind.is_symlink() => SeenKind::Symlink,
            kind if kind.is_file() => SeenKind::File,
            _ => SeenKind::Other,
        };
        let nanos = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        if kind == SeenKind::Directory {
            walk(&entry.path(), &path, seen);
        }
        seen.push(Seen {
            path,
            kind,
            mode: about.mode() & 0o7777,
            uid: about.uid(),
            gid: about.gid(),
            size: if kind == SeenKind::Directory { 0 } else { about.size() },
            mtime: nanos(about.mtime(), about.mtime_nsec()),
            ctime: nanos(about.ctime(), about.ctime_nsec()),
            inode: about.ino(),
            target: fs::read_link(entry.path()).ok().map(|target| target.into_os_string().into_vec()),
        });
    }
}

impl Directory {
    pub(super) fn new() -> (tempfile::TempDir, Arc<Self>) {
        let root = tempfile::tempdir().unwrap();
        let guest =
            Self { root: root.path().to_owned(), changes: AtomicUsize::new(0), commands: Mutex::default() };
        (root, Arc::new(guest))
    }

    pub(super) fn place(&self, path: &str) -> PathBuf {
        self.root.join(path.strip_prefix('/').unwrap())
    }

    pub(super) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Sandbox for Directory {
    async fn run(&self, command: GuestCommand, _: usize) -> Result<GuestOutput, PluginError> {
        self.commands.lock().unwrap().push(command.command);
        Ok(GuestOutput { code: Some(0), ..GuestOutput::default() })
    }

    async fn write_file(&self, path: &str, content: Arc<dyn Blob>, _: FileMode) -> Result<(), PluginError> {
        self.changed();
        fs::write(self.place(path), content.read(0, usize::MAX).await?).map_err(failed)
    }

    async fn read_file(&self, path: &str, _: usize) -> Result<Vec<u8>, PluginError> {
        fs::read(self.place(path)).map_err(failed)
    }

    async fn fetch_file(&self, _: &str) -> Result<Arc<dyn Blob>, PluginError> {
        Err(PluginError::new("guest.failed", "not here"))
    }

    async fn unpack(
        &self,
        archive: Arc<dyn Blob>,
        directory: &str,
        _: u32,
        _: u32,
    ) -> Result<(), PluginError> {
        self.changed();
        let mut bytes = Vec::new();
        archive.stream().expect("it is streamed").read_to_end(&mut bytes).await.map_err(failed)?;
        let place = self.place(directory);
        fs::create_dir_all(&place).map_err(failed)?;
        let mut unpack = tar::Archive::new(bytes.as_slice());
        unpack.set_preserve_permissions(true);
        unpack.unpack(place).map_err(failed)?;
        archive.unpacked(directory);
        Ok(())
    }

    async fn is_empty(&self, directory: &str) -> Result<bool, PluginError> {
        Ok(self.survey(directory).await?.is_empty())
    }

    async fn clear(&self, directory: &str) -> Result<(), PluginError> {
        let paths: Vec<_> = self.survey(directory).await?.into_iter().rev().map(|seen| seen.path).collect();
        self.remove_below(directory, &paths).await
    }

    async fn remove(&self, path: &str) -> Result<(), PluginError> {
        self.changed();
        fs::remove_dir_all(self.place(path)).map_err(failed)
    }
}

#[async_trait]
impl GuestFiles for Directory {
    async fn survey(&self, directory: &str) -> Result<Vec<Seen>, PluginError> {
        let mut seen = Vec::new();
        walk(&self.place(directory), b"", &mut seen);
        seen.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(seen)
    }

    async fn digests(
        &self,
        directory: &str,
        paths: &[Vec<u8>],
    ) -> Result<Vec<Option<[u8; 32]>>, PluginError> {
        let place = self.place(directory);
        let digest = |path: &Vec<u8>| {
            let content = fs::read(place.join(std::ffi::OsStr::from_bytes(path))).ok()?;
            Some(Sha256::digest(content).into())
        };
        Ok(paths.iter().map(digest).collect())
    }

    async fn remove_below(&self, directory: &str, paths: &[Vec<u8>]) -> Result<(), PluginError> {
        self.changed();
        for path in paths {
            let path = self.place(directory).join(std::ffi::OsStr::from_bytes(path));
            // What is not empty stays.
            let _ = if path.is_dir() && !path.is_symlink() {
                fs::remove_dir(path)
            } else {
                fs::remove_file(path)
            };
        }
        Ok(())
    }

    async fn account(&self, user: &str) -> Result<Account, PluginError> {
        match user {
            "dev" => Ok(Account { uid: 1000, gid: 1000, home: "/home/dev".to_owned() }),
            _ => Err(PluginError::new("user.unknown", format!("the guest has no user {user}"))),
        }
    }
}

/// Counts, and may object.
#[derive(Default)]
pub(super) struct Watch {
    pub(super) begun: AtomicUsize,
    pub(super) objects: bool,
    pub(super) steps: Mutex<Vec<(String, u64)>>,
}

#[async_trait]
impl ImportWatch for Watch {
    async fn begins(&self) -> Result<(), ImportFailure> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        if !self.objects {
            return Ok(());
        }
        Err(ImportFailure {
            plugin: String::new(),
            code: "store.full".to_owned(),
            message: "it cannot be written down".to_owned(),
            hint: Some("free space".to_owned()),
        })
    }

    fn progress(&self, step: &str, done: u64, _: Option<u64>) {
        self.steps.lock().unwrap().push((step.to_owned(), done));
    }
}

/// A manager with importers, a directory of the host, and a guest.
pub(super) struct Trial {
    pub(super) bench: Bench,
    pub(super) manager: Arc<Manager>,
    pub(super) host: tempfile::TempDir,
    pub(super) scratch: tempfile::TempDir,
    pub(super) _root: tempfile::TempDir,
    pub(super) guest: Arc<Directory>,
    pub(super) watch: Arc<Watch>,
    pub(super) former: Option<Arc<Baseline>>,
}

pub(super) const DESTINATION: &str = "/work/site";

impl Trial {
    pub(super) async fn new() -> Self {
        let bench = Bench::new();
        let manager = bench.open().await;
        for name in ["copy", "git", "incremental"] {
            let source = built(false).join(name);
            manager.install(params(source.to_str().unwrap())).await.unwrap();
        }
        let (root, guest) = Directory::new();
        Self {
            bench,
            manager,
            host: tempfile::tempdir().unwrap(),
            scratch: tempfile::tempdir().unwrap(),
            _root: root,
            guest,
            watch: Arc::default(),
            former: None,
        }
    }

    pub(super) fn source(&self) -> ImportSource {
        let opened =
            Workspace::open(self.host.path(), Identity::own(), self.scratch.path(), Cancel::default())
                .unwrap();
        ImportSource {
            workspace: Arc::new(opened),
            former: self.former.clone(),
            scratch: self.scratch.path().to_owned(),
        }
    }

    pub(super) async fn offered(&self) -> Vec<String> {
        let probed = self.manager.probe(&self.source()).await;
        assert!(probed.failures.is_empty(), "{:?}", probed.failures);
        probed.offers.iter().map(|offer| format!("{}/{}", offer.plugin, offer.strategy)).collect()
    }

    pub(super) fn request(&self, way: &str, replace: bool) -> ImportRequest {
        let (plugin, strategy) = way.split_once('/').unwrap();
        let layout = Layout { run: PathBuf::new(), state: PathBuf::new(), config: PathBuf::new() };
        let vm = json!({
            "id": "0123456789ab", "name": "dev", "image_reference": "debian:bookworm", "image_digest": "sha256:00",
            "image_properties": {}, "kernel_release": "6.1.0", "cpus": 1, "memory_bytes": 1 << 20, "disk_bytes": 1,
            "network": "nat", "addresses": ["192.0.2.7"], "labels": {}, "temporary": false,
        });
        ImportRequest {
            plugin: plugin.to_owned(),
            strategy: strategy.to_owned(),
            source: self.source(),
            vm: serde_json::from_value(vm).unwrap(),
            guest: layout.vm(&"0123456789ab".parse().unwrap()),
            destination: DESTINATION.to_owned(),
            user: "dev".to_owned(),
            replace,
            time_limit: Duration::from_secs(300),
            watch: self.watch.clone(),
        }
    }

    pub(super) async fn attempt(&self, request: ImportRequest) -> Result<Imported, ImportFailure> {
        self.manager.bring(request, self.guest.clone()).await
    }

    /// Brings it, and remembers what was brought.
    pub(super) async fn bring(&mut self, way: &str, replace: bool) -> Imported {
        let imported =
            self.attempt(self.request(way, replace)).await.unwrap_or_else(|failure| panic!("{failure:?}"));
        self.former = Some(Arc::new(imported.baseline.clone()));
        imported
    }

    pub(super) async fn refused(&self, way: &str) -> ImportFailure {
        self.attempt(self.request(way, false)).await.map(|imported| imported.findings).unwrap_err()
    }

    pub(super) fn write(&self, path: &str, content: &str) {
        write(&self.host.path().join(path), content);
    }

    pub(super) fn in_guest(&self, path: &str) -> PathBuf {
        self.guest.place(DESTINATION).join(path)
    }

    pub(super) fn git(&self, arguments: &[&str]) -> String {
        git(self.host.path(), arguments)
    }

    /// A repository with two commits, and work that is not committed.
    pub(super) fn repository(&self) {
        self.git(&["init", "-q", "-b", "main"]);
        for path in ["README.md", "src/main.rs", "src/deep/er.rs", "a name\nof two lines", "own.txt"] {
            self.write(path, path);
        }
        self.git(&["add", "-A"]);
        self.git(&["commit", "-qm", "one"]);
        self.write("run", "#!/bin/sh\n");
        fs::set_permissions(self.host.path().join("run"), fs::Permissions::from_mode(0o755)).unwrap();
        symlink("nowhere", self.host.path().join("link")).unwrap();
        self.write(".gitignore", "target/\n");
        self.git(&["add", "-A"]);
        self.git(&["commit", "-qm", "two"]);
        self.write("README.md", "changed");
        self.write("new.txt", "new");
        self.write("target/big", "ignored");
        fs::remove_file(self.host.path().join("src/deep/er.rs")).unwrap();
    }

    /// What git says of host and guest is the same.
    pub(super) fn same_to_git(&self) {
        let guest = self.guest.place(DESTINATION);
        for ask in [
            &["status", "--porcelain=v2", "--branch", "-z", "--untracked-files=all"][..],
            &["rev-parse", "HEAD", "HEAD^{tree}"],
            &["diff", "HEAD"],
        ] {
            assert_eq!(git(&guest, ask), self.git(ask), "{ask:?}");
        }
    }
}

pub(super) fn write(path: &Path, content: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

pub(super) fn git(directory: &Path, arguments: &[&str]) -> String {
    let mut git = Command::new("git");
    git.arg("-C").arg(directory).args(arguments).env("GIT_CONFIG_GLOBAL", "/dev/null");
    for who in ["AUTHOR", "COMMITTER"] {
        git.env(format!("GIT_{who}_NAME"), "A").env(format!("GIT_{who}_EMAIL"), "a@example.org");
    }
    let output = git.output().unwrap();
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
