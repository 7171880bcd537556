//! Plugins' disks, made and grown by the real tools.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt, symlink},
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use vm_disk::{DiskError, Disks};
use vm_host::{HostCommand, HostRunner, RunError, RunOutput, Runner};
use vm_types::{Effect, Handle, Observed};

const MIB: u64 = 1 << 20;

fn disk(path: impl AsRef<Path>, size_bytes: u64) -> Effect {
    Effect::Disk { path: path.as_ref().to_owned(), size_bytes, filesystem: Some("ext4".into()) }
}

fn bare(path: impl AsRef<Path>, size_bytes: u64) -> Effect {
    Effect::Disk { path: path.as_ref().to_owned(), size_bytes, filesystem: None }
}

fn real(root: &Path) -> Disks {
    Disks::new([root.to_owned()], Arc::new(HostRunner))
}

/// Runs a program to its success; returns what it said.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Refuses a filesystem with any fault.
fn is_whole(path: &Path) {
    run("e2fsck", &["-f", "-n", path.to_str().unwrap()]);
}

fn filesystem_bytes(path: &Path) -> u64 {
    let shown = run("dumpe2fs", &["-h", path.to_str().unwrap()]);
    let number = |key: &str| -> u64 {
        let line = shown.lines().find(|line| line.starts_with(key)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    number("Block count:") * number("Block size:")
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Puts a file on a filesystem, as a guest would.
fn write_file(disk: &Path, content: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), content).unwrap();
    let request = format!("write {} /precious", file.path().display());
    run("debugfs", &["-w", "-R", &request, disk.to_str().unwrap()]);
}

fn read_file(disk: &Path) -> String {
    run("debugfs", &["-R", "cat /precious", disk.to_str().unwrap()])
}

#[tokio::test]
async fn a_new_disk_is_sparse_formatted_and_private() {
    let root = tempfile::tempdir().unwrap();
    let disks = real(root.path());
    let path = root.path().join("plugins/work/data.raw");
    let effect = disk(&path, 10 << 30);
    assert_eq!(disks.observe(&effect).await.unwrap(), Observed::Absent);
    assert_eq!(disks.apply(&effect).await.unwrap(), Handle::None);
    assert_eq!(disks.observe(&effect).await.unwrap(), Observed::Present(Handle::None));

    let about = fs::metadata(&path).unwrap();
    assert_eq!((about.len(), about.mode() & 0o7777), (10 << 30, 0o600));
    assert!(about.blocks() * 512 < 64 * MIB, "{} bytes taken", about.blocks() * 512);
    assert_eq!(filesystem_bytes(&path), 10 << 30);
    is_whole(&path);
    assert_eq!(names(path.parent().unwrap()), ["data.raw"]);

    for _ in 0..2 {
        disks.undo(&effect, &Handle::None).await.unwrap();
        assert_eq!(disks.observe(&effect).await.unwrap(), Observed::Absent);
    }
    assert!(names(path.parent().unwrap()).is_empty());
}

#[tokio::test]
async fn what_is_on_a_disk_stays_when_it_grows_and_it_never_shrinks() {
    let root = tempfile::tempdir().unwrap();
    let disks = real(root.path());
    let path = root.path().join("data.raw");
    disks.apply(&disk(&path, 64 * MIB)).await.unwrap();
    write_file(&path, "years of work");
    let inode = fs::metadata(&path).unwrap().ino();

    disks.apply(&disk(&path, 64 * MIB)).await.unwrap();
    let larger = disk(&path, 400 * MIB + 1);
    assert!(matches!(disks.observe(&larger).await.unwrap(), Observed::Foreign(_)));
    for _ in 0..2 {
        disks.apply(&larger).await.unwrap();
        assert_eq!(disks.observe(&larger).await.unwrap(), Observed::Present(Handle::None));
    }
    let length = fs::metadata(&path).unwrap().len();
    assert!(length > 400 * MIB && length.is_multiple_of(4096));
    assert!(filesystem_bytes(&path) > 390 * MIB);
    is_whole(&path);

    disks.apply(&disk(&path, 32 * MIB)).await.unwrap();
    assert_eq!(disks.observe(&disk(&path, 32 * MIB)).await.unwrap(), Observed::Present(Handle::None));
    let about = fs::metadata(&path).unwrap();
    assert_eq!((about.len(), about.ino()), (length, inode));
    assert_eq!(read_file(&path), "years of work");
    assert_eq!(names(root.path()), ["data.raw"]);
}

#[tokio::test]
async fn growing_that_was_broken_off_is_finished() {
    let root = tempfile::tempdir().unwrap();
    let disks = real(root.path());
    let path = root.path().join("data.raw");
    disks.apply(&disk(&path, 64 * MIB)).await.unwrap();
    write_file(&path, "years of work");
    let larger = disk(&path, 256 * MIB);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(256 * MIB).unwrap();
    assert!(matches!(disks.observe(&larger).await.unwrap(), Observed::Foreign(_)));
    disks.apply(&larger).await.unwrap();
    assert_eq!(disks.observe(&larger).await.unwrap(), Observed::Present(Handle::None));
    assert_eq!(filesystem_bytes(&path), 256 * MIB);
    assert_eq!(read_file(&path), "years of work");
    is_whole(&path);
}

#[tokio::test]
async fn what_a_guest_made_of_its_disk_is_not_formatted() {
    let root = tempfile::tempdir().unwrap();
    let disks = real(root.path());
    let path = root.path().join("data.raw");
    disks.apply(&bare(&path, 16 * MIB)).await.unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    file.write_all_at(b"LUKS", 0).unwrap();
    file.write_all_at(b"end", 16 * MIB - 3).unwrap();
    drop(file);

    disks.apply(&disk(&path, 32 * MIB)).await.unwrap();
    assert_eq!(disks.observe(&disk(&path, 32 * MIB)).await.unwrap(), Observed::Present(Handle::None));
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len() as u64, 32 * MIB);
    assert!(bytes.starts_with(b"LUKS") && bytes[..16 << 20].ends_with(b"end"));
    assert!(bytes[4..(16 << 20) - 3].iter().all(|&byte| byte == 0));
}

#[tokio::test]
async fn a_disk_in_use_does_not_grow_and_is_otherwise_fine() {
    let root = tempfile::tempdir().unwrap();
    let disks = real(root.path());
    let path = root.path().join("data.raw");
    disks.apply(&disk(&path, 32 * MIB)).await.unwrap();
    let vmm = File::open(&path).unwrap();
    disks.apply(&disk(&path, 32 * MIB)).await.unwrap();
    let error = disks.apply(&disk(&path, 64 * MIB)).await.unwrap_err();
    assert!(matches!(error, DiskError::InUse { .. }) && error.hint().is_some(), "{error:?}");
    assert_eq!(fs::metadata(&path).unwrap().len(), 32 * MIB);
    drop(vmm);
    disks.apply(&disk(&path, 64 * MIB)).await.unwrap();
    is_whole(&path);
}

/// A host where a tool fails, after it has spoilt what it was to work on.
#[derive(Debug, Default)]
struct Failing(Mutex<Vec<String>>);

#[async_trait]
impl Runner for Failing {
    async fn run(&self, command: HostCommand) -> Result<RunOutput, RunError> {
        self.0.lock().unwrap().push(command.program.to_string_lossy().into_owned());
        let path = command.args.last().unwrap();
        OpenOptions::new().write(true).open(path).unwrap().write_all_at(b"half", 0).unwrap();
        let command = command.display();
        Err(RunError::Failed { command, status: "exit status: 8".to_owned(), stderr_tail: "no".to_owned() })
    }
}

#[tokio::test]
async fn a_disk_that_cannot_be_made_is_not_there_in_part() {
    let root = tempfile::tempdir().unwrap();
    let runner = Arc::new(Failing::default());
    let disks = Disks::new([root.path().to_owned()], Arc::clone(&runner) as Arc<dyn Runner>);
    let effect = disk(root.path().join("data.raw"), 32 * MIB);
    let error = disks.apply(&effect).await.unwrap_err();
    assert!(matches!(error, DiskError::Tool { .. }) && error.hint().is_some(), "{error:?}");
    assert!(error.to_string().ends_with("data.raw"), "{error}");
    assert_eq!(*runner.0.lock().unwrap(), ["mkfs.ext4"]);
    assert!(names(root.path()).is_empty());

    // What a daemon that was killed left is removed by the next.
    fs::write(root.path().join("data.raw.partial-1-0"), "half").unwrap();
    real(root.path()).apply(&effect).await.unwrap();
    assert_eq!(names(root.path()), ["data.raw"]);
    fs::write(root.path().join("data.raw.partial-1-0"), "half").unwrap();
    disks.undo(&effect, &Handle::None).await.unwrap();
    assert!(names(root.path()).is_empty());
}

/// A host where somebody else puts a disk there meanwhile.
#[derive(Debug)]
struct Overtaking(std::path::PathBuf);

#[async_trait]
impl Runner for Overtaking {
    async fn run(&self, _: HostCommand) -> Result<RunOutput, RunError> {
        fs::write(&self.0, "years of work").unwrap();
        Ok(RunOutput::default())
    }
}

#[tokio::test]
async fn a_disk_that_came_meanwhile_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("data.raw");
    let disks = Disks::new([root.path().to_owned()], Arc::new(Overtaking(path.clone())));
    disks.apply(&disk(&path, 32 * MIB)).await.unwrap_err();
    assert_eq!(fs::read_to_string(&path).unwrap(), "years of work");
    assert_eq!(names(root.path()), ["data.raw"]);
}

#[tokio::test]
async fn what_is_not_ours_or_cannot_be_is_refused() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("root");
    fs::create_dir_all(root.join("directory")).unwrap();
    fs::write(outer.path().join("precious"), "data").unwrap();
    symlink("../precious", root.join("link")).unwrap();
    symlink("..", root.join("up")).unwrap();
    run("mkfifo", &[root.join("pipe").to_str().unwrap()]);
    let disks = real(&root);
    for name in ["directory", "link", "pipe"] {
        let effect = disk(root.join(name), 32 * MIB);
        assert!(matches!(disks.observe(&effect).await.unwrap(), Observed::Foreign(_)), "{name}");
        for result in [disks.apply(&effect).await.map(|_| ()), disks.undo(&effect, &Handle::None).await] {
            let error = result.unwrap_err();
            assert!(
                matches!(error, DiskError::Foreign { .. }) && error.hint().is_some(),
                "{name}: {error:?}"
            );
        }
    }
    for path in [outer.path().join("precious"), root.join("up/precious"), root.join("../precious")] {
        let effect = disk(&path, 32 * MIB);
        for result in [disks.apply(&effect).await.map(|_| ()), disks.undo(&effect, &Handle::None).await] {
            assert!(matches!(result, Err(DiskError::OutsideRoots { .. })), "{path:?}: {result:?}");
        }
    }
    assert_eq!(fs::read(outer.path().join("precious")).unwrap(), b"data");

    let path = root.join("data.raw");
    let other =
        |name: &str| Effect::Disk { path: path.clone(), size_bytes: 32 * MIB, filesystem: Some(name.into()) };
    for name in ["xfs", "EXT4", "", "ext4 -E x", "../sh"] {
        let error = disks.apply(&other(name)).await.unwrap_err();
        assert!(matches!(error, DiskError::Filesystem { .. }) && error.hint().is_some(), "{error:?}");
        disks.undo(&other(name), &Handle::None).await.unwrap();
    }
    for effect in [disk(&path, MIB), bare(&path, 0)] {
        let error = disks.apply(&effect).await.unwrap_err();
        assert!(matches!(error, DiskError::TooSmall { .. }) && error.hint().is_some(), "{error:?}");
    }
    assert!(disks.apply(&bare(&path, u64::MAX)).await.is_err());
    let tap = Effect::Tap { name: "vt0".into(), bridge: "br0".into() };
    assert!(matches!(disks.apply(&tap).await, Err(DiskError::NotMine { .. })));
    assert_eq!(names(&root), ["directory", "link", "pipe", "up"]);
}
