//! The importers themselves, with real workspaces, and a directory for a guest.

use std::{
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use vm_engine::ports::ImportWatch;
use vm_plugin::ports::{Blob, FileMode, GuestCommand, GuestOutput, Sandbox};
use vm_types::{
    Layout,
    guest::files::{Account, Seen, SeenKind},
};
use vm_workspace::{Baseline, Cancel, Identity, Workspace};

use super::{
    super::tests::{Bench, params},
    *,
};

/// Plugins as `plugins/build` builds them, once.
fn built(fixtures: bool) -> PathBuf {
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
struct Directory {
    root: PathBuf,
    changes: AtomicUsize,
    commands: Mutex<Vec<Vec<String>>>,
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
    fn new() -> (tempfile::TempDir, Arc<Self>) {
        let root = tempfile::tempdir().unwrap();
        let guest =
            Self { root: root.path().to_owned(), changes: AtomicUsize::new(0), commands: Mutex::default() };
        (root, Arc::new(guest))
    }

    fn place(&self, path: &str) -> PathBuf {
        self.root.join(path.strip_prefix('/').unwrap())
    }

    fn changed(&self) {
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
struct Watch {
    begun: AtomicUsize,
    objects: bool,
    steps: Mutex<Vec<(String, u64)>>,
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
struct Trial {
    _bench: Bench,
    manager: Arc<Manager>,
    host: tempfile::TempDir,
    scratch: tempfile::TempDir,
    _root: tempfile::TempDir,
    guest: Arc<Directory>,
    watch: Arc<Watch>,
    former: Option<Arc<Baseline>>,
}

const DESTINATION: &str = "/work/site";

impl Trial {
    async fn new() -> Self {
        let bench = Bench::new();
        let manager = bench.open().await;
        for name in ["copy", "git", "incremental"] {
            let source = built(false).join(name);
            manager.install(params(source.to_str().unwrap())).await.unwrap();
        }
        let (root, guest) = Directory::new();
        Self {
            _bench: bench,
            manager,
            host: tempfile::tempdir().unwrap(),
            scratch: tempfile::tempdir().unwrap(),
            _root: root,
            guest,
            watch: Arc::default(),
            former: None,
        }
    }

    fn source(&self) -> ImportSource {
        let opened =
            Workspace::open(self.host.path(), Identity::own(), self.scratch.path(), Cancel::default())
                .unwrap();
        ImportSource {
            workspace: Arc::new(opened),
            former: self.former.clone(),
            scratch: self.scratch.path().to_owned(),
        }
    }

    async fn offered(&self) -> Vec<String> {
        let probed = self.manager.probe(&self.source()).await;
        assert!(probed.failures.is_empty(), "{:?}", probed.failures);
        probed.offers.iter().map(|offer| format!("{}/{}", offer.plugin, offer.strategy)).collect()
    }

    fn request(&self, way: &str, replace: bool) -> ImportRequest {
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

    async fn attempt(&self, request: ImportRequest) -> Result<Imported, ImportFailure> {
        self.manager.bring(request, self.guest.clone()).await
    }

    /// Brings it, and remembers what was brought.
    async fn bring(&mut self, way: &str, replace: bool) -> Imported {
        let imported =
            self.attempt(self.request(way, replace)).await.unwrap_or_else(|failure| panic!("{failure:?}"));
        self.former = Some(Arc::new(imported.baseline.clone()));
        imported
    }

    async fn refused(&self, way: &str) -> ImportFailure {
        self.attempt(self.request(way, false)).await.map(|imported| imported.findings).unwrap_err()
    }

    fn write(&self, path: &str, content: &str) {
        write(&self.host.path().join(path), content);
    }

    fn in_guest(&self, path: &str) -> PathBuf {
        self.guest.place(DESTINATION).join(path)
    }

    fn git(&self, arguments: &[&str]) -> String {
        git(self.host.path(), arguments)
    }

    /// A repository with two commits, and work that is not committed.
    fn repository(&self) {
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
    fn same_to_git(&self) {
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

fn write(path: &Path, content: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn git(directory: &Path, arguments: &[&str]) -> String {
    let mut git = Command::new("git");
    git.arg("-C").arg(directory).args(arguments).env("GIT_CONFIG_GLOBAL", "/dev/null");
    for who in ["AUTHOR", "COMMITTER"] {
        git.env(format!("GIT_{who}_NAME"), "A").env(format!("GIT_{who}_EMAIL"), "a@example.org");
    }
    let output = git.output().unwrap();
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn a_repository_is_brought_and_then_what_has_changed() {
    let mut trial = Trial::new().await;
    trial.repository();
    assert_eq!(trial.offered().await, ["git/shallow", "git/full", "copy/files"]);
    let imported = trial.bring("git/shallow", false).await;
    trial.same_to_git();
    assert!(!trial.in_guest("target").exists());
    assert!(imported.bytes > 0 && imported.findings[0].subject == DESTINATION, "{imported:?}");
    assert_eq!((imported.baseline.importer.as_str(), imported.baseline.whole), ("git/shallow", true));
    assert_eq!(imported.baseline.base.as_deref(), Some(trial.git(&["rev-parse", "HEAD"]).trim()));
    assert_eq!(git(&trial.guest.place(DESTINATION), &["rev-list", "--count", "HEAD"]), "1\n");
    assert_eq!(trial.watch.begun.load(Ordering::SeqCst), 1);
    assert!(
        trial
            .watch
            .steps
            .lock()
            .unwrap()
            .iter()
            .any(|(step, done)| step.starts_with("sending") && *done == 0)
    );

    // The guest works, and so does the host.
    write(&trial.in_guest("own.txt"), "the guest's");
    write(&trial.in_guest("result"), "the guest's");
    trial.write("src/main.rs", "fn main() {}");
    fs::remove_file(trial.host.path().join("new.txt")).unwrap();
    trial.git(&["commit", "-qam", "three"]);
    assert_eq!(trial.offered().await[0], "incremental/changes");
    let imported = trial.bring("incremental/changes", false).await;
    assert_eq!(trial.watch.begun.load(Ordering::SeqCst), 1, "what is known was not thrown away");
    assert_eq!(fs::read_to_string(trial.in_guest("src/main.rs")).unwrap(), "fn main() {}");
    assert!(!trial.in_guest("new.txt").exists());
    let guest = trial.guest.place(DESTINATION);
    assert_eq!(git(&guest, &["rev-parse", "HEAD"]), trial.git(&["rev-parse", "HEAD"]));
    assert_eq!(git(&guest, &["status", "--porcelain"]), " M own.txt\n?? result\n");
    assert_eq!((imported.baseline.importer.as_str(), imported.baseline.whole), ("git/shallow", true));
    // What the guest has changed is still known as its own.
    let then = |path: &str| imported.baseline.guest.iter().find(|seen| seen.path == path.as_bytes()).cloned();
    let now = trial.guest.survey(DESTINATION).await.unwrap();
    let now = |path: &str| now.iter().find(|seen| seen.path == path.as_bytes()).cloned();
    assert!(then("own.txt") != now("own.txt") && then("result").is_none());
    assert_eq!(then("src/main.rs"), now("src/main.rs"));

    // Both at once.
    trial.write("own.txt", "the host's");
    let failure = trial.refused("incremental/changes").await;
    assert_eq!((failure.code.as_str(), failure.plugin.as_str()), ("workspace.guest-changed", "incremental"));
    assert!(failure.message.contains("own.txt") && failure.hint.unwrap().contains("--replace"));
    assert_eq!(fs::read_to_string(trial.in_guest("own.txt")).unwrap(), "the guest's");
    trial.bring("incremental/changes", true).await;
    assert_eq!(fs::read_to_string(trial.in_guest("own.txt")).unwrap(), "the host's");

    // Commits of the guest count as its work, too.
    git(&guest, &["commit", "-qam", "the guest's"]);
    trial.git(&["commit", "-qam", "the host's"]);
    let failure = trial.refused("incremental/changes").await;
    assert!(failure.message.contains("\".git\""), "{failure:?}");
    // Nothing new: nothing to do.
    trial.git(&["reset", "-q", "--soft", "HEAD^"]);
    let before = trial.guest.changes.load(Ordering::SeqCst);
    trial.git(&["reset", "-q"]);
    let imported = trial.bring("incremental/changes", false).await;
    assert_eq!(imported.findings[0].message, "nothing has changed");
    assert_eq!(trial.guest.changes.load(Ordering::SeqCst), before);
}

#[tokio::test]
async fn all_of_the_history_comes_if_somebody_wants_it() {
    let mut trial = Trial::new().await;
    trial.repository();
    trial.bring("git/full", false).await;
    trial.same_to_git();
    let guest = trial.guest.place(DESTINATION);
    assert_eq!(git(&guest, &["log", "--format=%H %s"]), trial.git(&["log", "--format=%H %s"]));
}

#[tokio::test]
async fn a_plain_directory_is_copied_and_what_is_there_is_not_thrown_away_unasked() {
    let mut trial = Trial::new().await;
    trial.write("a/b", "c");
    fs::create_dir(trial.host.path().join("empty")).unwrap();
    assert_eq!(trial.offered().await, ["copy/files"]);
    write(&trial.in_guest("precious"), "somebody's");
    let failure = trial.refused("copy/files").await;
    assert_eq!(failure.code, "workspace.destination-not-empty");
    assert_eq!(
        (trial.watch.begun.load(Ordering::SeqCst), trial.guest.changes.load(Ordering::SeqCst)),
        (0, 0)
    );

    let imported = trial.bring("copy/files", true).await;
    assert_eq!(trial.watch.begun.load(Ordering::SeqCst), 1);
    assert!(!trial.in_guest("precious").exists() && trial.in_guest("empty").is_dir());
    assert_eq!(fs::read_to_string(trial.in_guest("a/b")).unwrap(), "c");
    assert!(imported.baseline.history.is_none() && imported.baseline.base.is_none());

    trial.write("a/b", "d");
    assert_eq!(trial.offered().await, ["incremental/changes", "copy/files"]);
    trial.bring("incremental/changes", false).await;
    assert_eq!(fs::read_to_string(trial.in_guest("a/b")).unwrap(), "d");

    // Its disk is gone: what was known of it is worth nothing.
    fs::remove_dir_all(trial.guest.place(DESTINATION)).unwrap();
    assert_eq!(trial.refused("incremental/changes").await.code, "workspace.not-prepared");
}

#[tokio::test]
async fn what_is_in_the_guest_is_safe_from_importers_that_do_not_look() {
    let (_root, guest) = Directory::new();
    let watch = Arc::new(Watch::default());
    write(&guest.place(DESTINATION).join("precious"), "somebody's");
    let blob = || -> Arc<dyn Blob> { Arc::new(vm_plugin::ports::MemoryBlob(b"x"[..].into())) };
    let watched = |replace| Watched::new(guest.clone(), watch.clone(), DESTINATION, replace);
    let careful = watched(false);
    let mode = FileMode { mode: 0o644, uid: 0, gid: 0 };
    for refused in [
        careful.clear(DESTINATION).await,
        careful.remove("/work/site/precious").await,
        careful.write_file("/work/site/precious", blob(), mode).await,
        careful.unpack(blob(), DESTINATION, 0, 0).await,
    ] {
        assert_eq!(refused.unwrap_err().code, "workspace.destination-not-empty");
    }
    // A command is not refused, and is no beginning: the next import would throw away what is there.
    careful.run(GuestCommand::default(), 0).await.unwrap();
    let begun = || watch.begun.load(Ordering::SeqCst);
    assert_eq!((begun(), guest.changes.load(Ordering::SeqCst)), (0, 0));

    watched(true).clear(DESTINATION).await.unwrap();
    assert_eq!(begun(), 1);
    let empty = watched(false);
    empty.write_file("/work/site/mine", blob(), mode).await.unwrap();
    // It stays its own, though there is something now.
    empty.write_file("/work/site/too", blob(), mode).await.unwrap();
    assert_eq!(begun(), 2);
}

#[tokio::test]
async fn a_base_that_the_host_has_no_more_is_found_out_before_anything_is_done() {
    let mut trial = Trial::new().await;
    trial.repository();
    trial.bring("git/shallow", false).await;
    trial.git(&["commit", "-q", "--amend", "-am", "another"]);
    trial.git(&["reflog", "expire", "--expire=all", "--expire-unreachable=all", "--all"]);
    trial.git(&["gc", "-q", "--prune=now"]);
    trial.write("src/main.rs", "fn main() {}");
    let before = trial.guest.changes.load(Ordering::SeqCst);
    assert_eq!(trial.refused("incremental/changes").await.code, "workspace.not-prepared");
    assert_eq!(trial.guest.changes.load(Ordering::SeqCst), before);
}

#[tokio::test]
async fn nothing_is_changed_if_it_cannot_be_written_down_and_errors_say_whose_they_are() {
    let mut trial = Trial::new().await;
    trial.write("a", "a");
    trial.watch = Arc::new(Watch { objects: true, ..Watch::default() });
    let failure = trial.refused("copy/files").await;
    assert_eq!((failure.code.as_str(), failure.hint.as_deref()), ("store.full", Some("free space")));
    assert_eq!(trial.guest.changes.load(Ordering::SeqCst), 0);

    let nobody = ImportRequest { user: "nobody".to_owned(), ..trial.request("copy/files", false) };
    assert_eq!(trial.attempt(nobody).await.unwrap_err().code, "user.unknown");
    let failure = trial.refused("zip/files").await;
    assert!(failure.code == "plugin.unknown" && failure.message.contains("zip"), "{failure:?}");
    assert_eq!(trial.refused("copy/tar").await.code, "workspace.unknown-strategy");
    trial.manager.set_enabled("copy", false).await.unwrap();
    assert_eq!(trial.refused("copy/files").await.code, "plugin.disabled");
    assert!(trial.offered().await.is_empty());
    let source = trial._bench.source("from", "cap", "full", "");
    trial.manager.install(params(&source)).await.unwrap();
    assert_eq!(trial.refused("cap/files").await.code, "plugin.no-importer");
}

#[tokio::test]
async fn what_cannot_be_read_is_named_and_is_no_fault_of_the_importer() {
    let mut trial = Trial::new().await;
    trial.write("fine", "fine");
    trial.write("gone/file", "x");
    let request = trial.request("copy/files", false);
    // As if somebody removed it between looking and reading.
    fs::remove_dir_all(trial.host.path()).unwrap();
    for _ in 0..4 {
        let failure = trial.attempt(request.clone()).await.map(|imported| imported.findings).unwrap_err();
        assert!(failure.code.starts_with("workspace.") && failure.hint.is_some(), "{failure:?}");
    }
    let plugin = trial.manager.find("copy").unwrap();
    assert!(plugin.loaded().unwrap().disabled().is_none());
    trial.host = tempfile::tempdir().unwrap();
    trial.write("fine", "fine");
    trial.bring("copy/files", true).await;
}

#[tokio::test]
async fn a_part_that_somebody_elses_importer_brings_is_not_taken_for_all() {
    let mut trial = Trial::new().await;
    let source = built(true).join("slice");
    let mut install = params(source.to_str().unwrap());
    install.config = Some(json!({ "directories": ["src"], "command": ["make"] }));
    trial.manager.install(install).await.unwrap();
    trial.repository();
    let imported = trial.bring("slice/directories", false).await;
    let mut brought: Vec<_> = fs::read_dir(trial.guest.place(DESTINATION))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    brought.sort();
    assert_eq!(brought, ["SLICE.json", "src"]);
    assert_eq!(*trial.guest.commands.lock().unwrap(), [["make"]]);
    assert!(
        !imported.baseline.whole && imported.baseline.sent.entries.contains_key(b"src/main.rs".as_slice())
    );
    // What it wrote itself counts as the guest's work.
    let known: Vec<_> = imported.baseline.guest.iter().map(|seen| seen.path.as_slice()).collect();
    assert!(known.contains(&b"src/main.rs".as_slice()) && !known.contains(&b"SLICE.json".as_slice()));
    assert!(!trial.offered().await.contains(&"incremental/changes".to_owned()));
    assert_eq!(trial.refused("incremental/changes").await.code, "workspace.not-prepared");
}

#[tokio::test]
async fn all_of_them_pass_the_test_that_every_plugin_has_to_pass() {
    let bench = Bench::new();
    let manager = bench.open().await;
    for (name, fixture) in [("copy", false), ("git", false), ("incremental", false), ("slice", true)] {
        let checks = manager.test(built(fixture).join(name).to_str().unwrap()).await.unwrap();
        let hooks: Vec<_> = checks.iter().map(|check| check.check.as_str()).collect();
        assert_eq!(hooks, ["manifest", "configuration", "loads", "probe", "import"]);
        assert!(checks.iter().all(|check| check.ok), "{name}: {checks:?}");
        let import = &checks.last().unwrap().detail;
        assert!(!import.starts_with("0 inputs"), "{name}: {import}");
    }
}
