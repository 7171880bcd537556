//! A filesystem with a base on it, and disks of that base.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use vm_disk::{Backend, BackendChoice, Cow, DiskError, HostCow, dm};
use vm_types::{Effect, Handle, InstanceId, Observed, VmId};

pub(crate) const MIB: u64 = 1 << 20;
/// Size of the filesystem. Its file is sparse.
const GROUND_BYTES: u64 = 1 << 30;
/// What the base has of data, and its size.
pub(crate) const DATA_BYTES: u64 = MIB;
pub(crate) const BASE_BYTES: u64 = 32 * MIB;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ground {
    Copy,
    Xfs,
    Btrfs,
    Dm,
}

impl Ground {
    fn filesystem(self) -> &'static str {
        match self {
            Self::Copy | Self::Dm => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    fn choice(self) -> BackendChoice {
        match self {
            Self::Copy => BackendChoice::Copy,
            // What is found without being told.
            Self::Xfs | Self::Btrfs => BackendChoice::Auto,
            Self::Dm => BackendChoice::DmSnapshot,
        }
    }

    fn backend(self) -> Backend {
        match self {
            Self::Copy => Backend::Copy,
            Self::Xfs | Self::Btrfs => Backend::Reflink,
            Self::Dm => Backend::DmSnapshot,
        }
    }
}

pub(crate) struct Bench {
    pub(crate) cow: HostCow,
    pub(crate) dir: PathBuf,
    pub(crate) ground: Ground,
    /// Unlike that of any other test on this host.
    pub(crate) instance: InstanceId,
}

/// A disk, and the device of it if it is one of differences.
pub(crate) struct Disk {
    pub(crate) file: Effect,
    pub(crate) device: Option<Effect>,
}

/// Writes where the test harness does not keep it back.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Runs a case on a filesystem of its own.
pub(crate) fn on<F>(ground: Ground, case: F)
where
    F: AsyncFnOnce(&Bench) + Send + 'static,
{
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("ground.img");
    let place = dir.path().join("ground");
    fs::create_dir(&place).unwrap();
    File::create(&image).unwrap().set_len(GROUND_BYTES).unwrap();
    run(Command::new(format!("mkfs.{}", ground.filesystem())).arg("-q").arg(&image)).unwrap();
    // The namespace is this thread's and that of those it starts, and ends with them: so do the mount and its loop device.
    let work = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        if let Err(error) = run(Command::new("mount").arg("-oloop").arg(&image).arg(&place)) {
            say(&format!("NOT TESTED: this kernel cannot mount {}: {error}", ground.filesystem()));
            return;
        }
        let cow = match HostCow::probe(ground.choice(), &place, &place) {
            Ok(cow) => cow,
            Err(error @ DiskError::Unsupported { backend: Backend::DmSnapshot, .. }) => {
                let why = std::error::Error::source(&error).unwrap().to_string();
                assert!(std::env::var_os("VM_TEST_REQUIRE_DM").is_none(), "no device-mapper: {why}");
                say(&format!("NOT TESTED: disks by dm-snapshot, for this host has no device-mapper: {why}"));
                return;
            }
            Err(error) => panic!("{error:?}"),
        };
        assert_eq!(cow.backend(), ground.backend(), "{:?}", cow.passed_over());
        let bench = Bench { cow, dir: place, ground, instance: instance(0) };
        bench.make_base();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(case(&bench));
        assert_eq!(bench.base(), block(0, DATA_BYTES), "the base was written to");
        assert!(bench.devices().is_empty(), "left: {:?}", bench.devices());
    });
    if let Err(panic) = work.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Four hexadecimal digits that no other test has.
pub(crate) fn instance(more: u32) -> InstanceId {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = std::process::id().wrapping_mul(64).wrapping_add(NUMBER.fetch_add(1, Ordering::Relaxed));
    format!("{:04x}", (number.wrapping_add(more)) & 0xffff).parse().unwrap()
}

pub(crate) fn run(command: &mut Command) -> Result<(), String> {
    let done = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    match done.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&done.stderr))),
    }
}

/// Bytes that are nowhere zero, and different for each `seed`.
pub(crate) fn block(seed: u8, bytes: u64) -> Vec<u8> {
    (0..bytes).map(|n| (n % 241) as u8 ^ (seed & 0x7) << 5 | 1).collect()
}

impl Bench {
    pub(crate) fn base_path(&self) -> PathBuf {
        self.dir.join("base.ext4")
    }

    fn make_base(&self) {
        let file = File::create(self.base_path()).unwrap();
        file.write_all_at(&block(0, DATA_BYTES), 0).unwrap();
        file.set_len(BASE_BYTES).unwrap();
        file.sync_all().unwrap();
    }

    /// The base's data.
    fn base(&self) -> Vec<u8> {
        read(&self.base_path(), 0, DATA_BYTES)
    }

    pub(crate) fn disk(&self, number: u32, size_bytes: u64) -> Disk {
        self.disk_of(&self.instance, number, size_bytes)
    }

    pub(crate) fn disk_of(&self, instance: &InstanceId, number: u32, size_bytes: u64) -> Disk {
        let vm: VmId = format!("{number:012x}").parse().unwrap();
        let delta = self.cow.backend() == Backend::DmSnapshot;
        let path = self.dir.join(format!("{instance}-{vm}.disk"));
        let device = delta.then(|| Effect::DmSnapshot {
            name: dm::device_name(instance, &vm),
            base: self.base_path(),
            delta: path.clone(),
            node: path.with_extension("dev"),
            size_bytes,
        });
        Disk { file: Effect::CowDisk { base: self.base_path(), path, size_bytes, delta }, device }
    }

    /// Devices of this test's, as the kernel lists them: one without a table is not in sysfs.
    pub(crate) fn devices(&self) -> Vec<String> {
        if self.ground != Ground::Dm {
            return Vec::new();
        }
        let listed = Command::new("dmsetup").arg("ls").output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let names = listed.lines().filter_map(|line| line.split_whitespace().next());
        names.filter(|name| name.starts_with(&dm::device_prefix(&self.instance))).map(str::to_owned).collect()
    }

    /// Loop devices of a file.
    pub(crate) fn loops(&self, file: &Path) -> usize {
        let behind = |entry: &fs::DirEntry| fs::read_to_string(entry.path().join("loop/backing_file")).ok();
        let entries = fs::read_dir("/sys/block").unwrap().flatten();
        // A path is shown as it is in the namespace of whoever reads it.
        entries.filter_map(|entry| behind(&entry)).filter(|path| Path::new(path.trim()) == file).count()
    }

    /// What the filesystem has free, all that was written being on it.
    pub(crate) fn free_bytes(&self) -> u64 {
        run(Command::new("sync").arg("--file-system").arg(&self.dir)).unwrap();
        vm_disk::free_bytes(&self.dir).unwrap()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "lost+found");
        names.sort();
        names
    }

    /// Makes a disk and puts it together.
    pub(crate) async fn make(&self, disk: &Disk) -> Result<(), DiskError> {
        self.cow.apply(&disk.file).await?;
        self.start(disk).await
    }

    pub(crate) async fn start(&self, disk: &Disk) -> Result<(), DiskError> {
        match &disk.device {
            Some(device) => self.cow.apply(device).await.map(drop),
            None => Ok(()),
        }
    }

    pub(crate) async fn stop(&self, disk: &Disk) -> Result<(), DiskError> {
        match &disk.device {
            Some(device) => self.cow.undo(device, &Handle::None).await,
            None => Ok(()),
        }
    }

    pub(crate) async fn remove(&self, disk: &Disk) -> Result<(), DiskError> {
        self.stop(disk).await?;
        self.cow.undo(&disk.file, &Handle::None).await
    }

    /// Whether all that a VM needs of the disk is there.
    pub(crate) async fn is_up(&self, disk: &Disk) -> bool {
        for effect in [Some(&disk.file), disk.device.as_ref()].into_iter().flatten() {
            if self.cow.observe(effect).await.unwrap() != Observed::Present(Handle::None) {
                return false;
            }
        }
        true
    }
}

impl Disk {
    /// What a VMM opens.
    pub(crate) fn path(&self) -> &Path {
        match (&self.device, &self.file) {
            (Some(Effect::DmSnapshot { node, .. }), _) => node,
            (_, Effect::CowDisk { path, .. }) => path,
            _ => unreachable!("made above"),
        }
    }

    pub(crate) fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.path()).unwrap()
    }

    pub(crate) fn size(&self) -> u64 {
        use std::io::Seek;
        self.open().seek(std::io::SeekFrom::End(0)).unwrap()
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        let file = self.open();
        file.write_all_at(bytes, at).unwrap();
        file.sync_all().unwrap();
    }

    pub(crate) fn read(&self, at: u64, bytes: u64) -> Vec<u8> {
        read(self.path(), at, bytes)
    }

    /// What it takes on the host.
    pub(crate) fn used_bytes(&self) -> u64 {
        let Effect::CowDisk { path, .. } = &self.file else { unreachable!("made above") };
        fs::metadata(path).unwrap().blocks() * 512
    }
}

fn read(path: &Path, at: u64, bytes: u64) -> Vec<u8> {
    let mut content = vec![0; bytes as usize];
    File::open(path).unwrap().read_exact_at(&mut content, at).unwrap();
    content
}
