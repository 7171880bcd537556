//! One contract for every backend of [`Cow`], then what only the real one can show.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    time::{Duration, Instant},
};

use vm_disk::{Backend, BackendChoice, Cow, DiskError, FakeCow, HostCow};
use vm_types::{Effect, Handle, Observed};

const MIB: u64 = 1 << 20;

fn disk(dir: &Path, size_bytes: u64) -> Effect {
    Effect::CowDisk { base: dir.join("base.ext4"), path: dir.join("disk.raw"), size_bytes, delta: false }
}

/// A base with data at both ends and a hole between.
fn make_base(dir: &Path, data_bytes: u64, size_bytes: u64) {
    let file = File::create(dir.join("base.ext4")).unwrap();
    let block: Vec<u8> = (0..MIB).map(|n| (n % 251) as u8 + 1).collect();
    for n in 0..data_bytes / MIB {
        file.write_all_at(&block, n * MIB).unwrap();
    }
    file.set_len(size_bytes).unwrap();
    file.write_all_at(b"end", size_bytes - 3).unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

async fn contract(cow: &dyn Cow, dir: &Path, make_foreign: impl Fn(&Path)) {
    let effect = disk(dir, 64 * MIB);
    assert_eq!(cow.observe(&effect).await.unwrap(), Observed::Absent);
    let handle = cow.apply(&effect).await.unwrap();
    assert_eq!(cow.observe(&effect).await.unwrap(), Observed::Present(handle.clone()));
    assert_eq!(cow.apply(&effect).await.unwrap(), handle, "a second apply is no error");

    // What is there but smaller than wanted is not touched by apply.
    let larger = disk(dir, 128 * MIB);
    assert!(matches!(cow.observe(&larger).await.unwrap(), Observed::Foreign(_)));
    assert!(matches!(cow.apply(&larger).await, Err(DiskError::Foreign { .. })));

    cow.undo(&effect, &handle).await.unwrap();
    assert_eq!(cow.observe(&effect).await.unwrap(), Observed::Absent);
    cow.undo(&effect, &handle).await.unwrap();

    let error = cow.apply(&disk(dir, 16 * MIB)).await.unwrap_err();
    assert!(
        matches!(error, DiskError::SmallerThanBase { base_bytes, .. } if base_bytes == 32 * MIB),
        "{error:?}"
    );
    assert_eq!(error.hint().unwrap(), "use `--disk 32M` or more");
    assert_eq!(cow.observe(&effect).await.unwrap(), Observed::Absent);

    make_foreign(&dir.join("disk.raw"));
    assert!(matches!(cow.observe(&effect).await.unwrap(), Observed::Foreign(_)));
    for result in [cow.apply(&effect).await.map(|_| ()), cow.undo(&effect, &Handle::None).await] {
        assert!(matches!(result, Err(DiskError::Foreign { .. })), "{result:?}");
    }

    let other = Effect::Sysctl { key: "a".into(), value: "b".into() };
    for result in [
        cow.observe(&other).await.map(|_| ()),
        cow.apply(&other).await.map(|_| ()),
        cow.undo(&other, &Handle::None).await,
    ] {
        assert!(matches!(result, Err(DiskError::NotMine { .. })), "{result:?}");
    }
}

#[tokio::test]
async fn the_fake_keeps_the_contract() {
    let cow = FakeCow::new();
    let dir = Path::new("/pretended");
    cow.set_base(dir.join("base.ext4"), 32 * MIB);
    contract(&cow, dir, |path| cow.put_foreign(path)).await;
}

#[tokio::test]
async fn the_fake_fails_when_told() {
    let cow = FakeCow::new();
    cow.fail_apply(2);
    let effect = disk(Path::new("/pretended"), MIB);
    cow.apply(&effect).await.unwrap();
    assert!(matches!(cow.apply(&effect).await, Err(DiskError::Injected { .. })));
    cow.apply(&effect).await.unwrap();
    assert_eq!(cow.disks().len(), 1);
}

#[tokio::test]
async fn copies_keep_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    make_base(dir.path(), 8 * MIB, 32 * MIB);
    let cow = HostCow::probe(BackendChoice::Copy, dir.path(), dir.path()).unwrap();
    assert_eq!(cow.backend(), Backend::Copy);
    contract(&cow, dir.path(), |path| fs::create_dir(path).unwrap()).await;
    assert_eq!(names(dir.path()), ["base.ext4", "disk.raw"]);
}

#[tokio::test]
async fn the_probed_backend_keeps_the_contract_and_probing_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cow = HostCow::probe(BackendChoice::Auto, dir.path(), dir.path()).unwrap();
    assert!(names(dir.path()).is_empty());
    make_base(dir.path(), 8 * MIB, 32 * MIB);
    contract(&cow, dir.path(), |path| std::os::unix::fs::symlink("base.ext4", path).unwrap()).await;
    // Undo and apply did not reach through the link.
    assert_eq!(fs::metadata(dir.path().join("base.ext4")).unwrap().len(), 32 * MIB);
    match HostCow::probe(BackendChoice::Reflink, dir.path(), dir.path()) {
        Ok(_) => assert_eq!(cow.backend(), Backend::Reflink),
        Err(error) => {
            let next = match HostCow::probe(BackendChoice::DmSnapshot, dir.path(), dir.path()) {
                Ok(_) => Backend::DmSnapshot,
                Err(_) => Backend::Copy,
            };
            assert_eq!(cow.backend(), next);
            assert!(matches!(error, DiskError::Unsupported { .. }) && error.hint().is_some(), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_copy_is_exact_sparse_private_and_as_large_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    make_base(dir.path(), 64 * MIB, 512 * MIB);
    let cow = HostCow::probe(BackendChoice::Copy, dir.path(), dir.path()).unwrap();
    let started = Instant::now();
    cow.apply(&disk(dir.path(), 4096 * MIB)).await.unwrap();
    let elapsed = started.elapsed().as_secs_f64();
    println!("64 MiB of data in {elapsed:.3} s: {:.0} MiB/s", 64.0 / elapsed);
    let (base, made) = (dir.path().join("base.ext4"), dir.path().join("disk.raw"));
    let about = fs::metadata(&made).unwrap();
    assert_eq!(about.len(), 4096 * MIB);
    assert_eq!(about.mode() & 0o777, 0o600);
    assert!(about.blocks() * 512 < 70 * MIB, "holes were filled: {}", about.blocks() * 512);
    let (base, made) = (File::open(base).unwrap(), File::open(made).unwrap());
    let (mut left, mut right) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for n in (0..64).chain([200, 511]) {
        base.read_exact_at(&mut left, n * MIB).unwrap();
        made.read_exact_at(&mut right, n * MIB).unwrap();
        assert!(left == right, "MiB {n} differs");
    }
}

#[tokio::test]
async fn a_missing_base_is_named_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cow = HostCow::probe(BackendChoice::Copy, dir.path(), dir.path()).unwrap();
    let error = cow.apply(&disk(dir.path(), MIB)).await.unwrap_err();
    assert!(error.to_string().contains("base.ext4") && error.hint().is_some(), "{error:?}");
    assert!(names(dir.path()).is_empty());
}

#[tokio::test]
async fn what_a_killed_daemon_left_half_made_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    make_base(dir.path(), MIB, 2 * MIB);
    let cow = HostCow::probe(BackendChoice::Copy, dir.path(), dir.path()).unwrap();
    let effect = disk(dir.path(), 4 * MIB);
    let stale = dir.path().join("disk.raw.partial-1-0");
    fs::write(&stale, "half").unwrap();
    assert_eq!(cow.observe(&effect).await.unwrap(), Observed::Absent);
    cow.undo(&effect, &Handle::None).await.unwrap();
    assert_eq!(names(dir.path()), ["base.ext4"]);
    fs::write(&stale, "half").unwrap();
    cow.apply(&effect).await.unwrap();
    assert_eq!(names(dir.path()), ["base.ext4", "disk.raw"]);
}

#[tokio::test]
async fn a_cancelled_apply_never_shows_a_disk_later() {
    let dir = tempfile::tempdir().unwrap();
    make_base(dir.path(), 256 * MIB, 300 * MIB);
    let cow = HostCow::probe(BackendChoice::Copy, dir.path(), dir.path()).unwrap();
    let effect = disk(dir.path(), 300 * MIB);
    let mut work = Box::pin(cow.apply(&effect));
    // The first poll starts the copy; the second look is when it has surely begun.
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut finished = false;
    while names(dir.path()).len() < 2 && !finished {
        assert!(Instant::now() < deadline);
        finished = tokio::time::timeout(Duration::from_millis(1), &mut work).await.is_ok();
    }
    drop(work);
    if finished {
        return;
    }
    // Unless it was in place at that moment it is not and never will be, and the rest goes away.
    let was_there = cow.observe(&effect).await.unwrap() != Observed::Absent;
    while names(dir.path()).iter().any(|name| name.contains("partial")) {
        assert!(Instant::now() < deadline, "{:?}", names(dir.path()));
        tokio::task::yield_now().await;
    }
    assert_eq!(dir.path().join("disk.raw").exists(), was_there);
}

/// Runs `work` with a tmpfs of so many bytes, in a mount namespace of a thread of its own.
fn on_a_tmpfs<T: Send + 'static>(bytes: u64, work: impl FnOnce(&Path) -> T + Send + 'static) -> T {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().to_owned();
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(none, "/", none, private, none).unwrap();
        let size = format!("size={bytes}");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), &mount, Some("tmpfs"), flags, Some(&*size)).unwrap();
        work(&mount)
    });
    thread.join().unwrap()
}

#[test]
fn with_no_space_to_try_reflinks_there_is_a_backend_all_the_same() {
    on_a_tmpfs(MIB, |full| {
        let written = fs::write(full.join("all"), vec![1; 2 << 20]);
        assert_eq!(written.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
        let cow = HostCow::probe(BackendChoice::Auto, full, full).unwrap();
        assert_ne!(cow.backend(), Backend::Reflink);
        let (backend, why) = &cow.passed_over()[0];
        assert!(*backend == Backend::Reflink && why.contains("could not be tried"), "{why}");
        // Who wants nothing else is told what to do.
        let error = HostCow::probe(BackendChoice::Reflink, full, full).unwrap_err();
        assert!(error.hint().unwrap().contains("free some space"), "{error:?}");
    });
}

#[test]
fn a_full_filesystem_is_told_in_bytes() {
    let (result, left) = on_a_tmpfs(80 * MIB, |mount| {
        make_base(mount, 20 * MIB, 32 * MIB);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let cow = HostCow::probe(BackendChoice::Auto, mount, mount).unwrap();
        let result = runtime.block_on(cow.apply(&disk(mount, 32 * MIB)));
        (result, names(mount))
    });
    let error = result.unwrap_err();
    let DiskError::NoSpace { needed_bytes, available_bytes, .. } = &error else { panic!("{error:?}") };
    assert!(*needed_bytes > 84 * MIB && *available_bytes < 60 * MIB, "{error}");
    assert!(error.hint().unwrap().contains("vm rm"));
    assert_eq!(left, ["base.ext4"]);
}
