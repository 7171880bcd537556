//! What the tests share: archives made by hand, a runner that counts, a look into filesystems.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::{ffi::OsStrExt, fs::FileTypeExt, fs::MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use sha2::{Digest, Sha256};
use vm_host::HostRunner;
use vm_image::{ImageError, Progress, ProgressSink, rootfs};

pub(crate) fn silent() -> ProgressSink {
    Arc::new(|_| {})
}

/// A sink and what it got.
pub(crate) fn recorded() -> (ProgressSink, Arc<Mutex<Vec<Progress>>>) {
    let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let sink = Arc::clone(&seen);
    (Arc::new(move |progress| sink.lock().unwrap().push(progress)), seen)
}

/// A place for one build.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) runner: HostRunner,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), runner: HostRunner }
    }
    pub(crate) fn out(&self) -> PathBuf {
        self.dir.path().join("out.ext4")
    }
    pub(crate) fn scratch(&self) -> PathBuf {
        self.dir.path().join("scratch")
    }
    pub(crate) async fn build(&self, tar: Vec<u8>) -> Result<rootfs::BuiltRootfs, ImageError> {
        let length = Some(tar.len() as u64);
        let source = rootfs::TarSource::Reader { reader: Box::new(std::io::Cursor::new(tar)), length };
        rootfs::build(source, &self.out(), &self.scratch(), silent()).await
    }
    /// A failed build must leave nothing.
    pub(crate) fn assert_clean(&self) {
        assert!(!self.out().exists());
        assert_eq!(fs::read_dir(self.scratch()).map_or(0, Iterator::count), 0);
    }
    /// e2fsck finds nothing to complain about.
    pub(crate) fn check(&self) {
        let output = Command::new("e2fsck").arg("-fn").arg(self.out()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A tar archive by hand: names that no tool would write.
#[derive(Default)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

impl Tar {
    pub(crate) fn add(mut self, kind: u8, name: &str, link: &str, content: &[u8]) -> Self {
        self.push(kind, name, link, content);
        self
    }
    pub(crate) fn push(&mut self, kind: u8, name: &str, link: &str, content: &[u8]) {
        let mode = if kind == b'5' { 0o755 } else { 0o644 };
        self.push_as(kind, name, link, content, (mode, 0, 1_000_000_000));
    }
    /// The same with mode, owner and time.
    pub(crate) fn push_as(
        &mut self,
        kind: u8,
        name: &str,
        link: &str,
        content: &[u8],
        (mode, owner, time): (u32, u64, u64),
    ) {
        let mut header = tar::Header::new_ustar();
        let old = header.as_old_mut();
        assert!(name.len() <= 100 && link.len() <= 100);
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(time);
        header.set_size(content.len() as u64);
        if matches!(kind, b'3' | b'4') {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }
    /// A PAX header for the next entry.
    pub(crate) fn push_pax(&mut self, records: &[(&str, &[u8])]) {
        self.push_records(b'x', records);
    }
    /// A PAX header, for the next entry (`x`) or all to come (`g`).
    pub(crate) fn push_records(&mut self, kind: u8, records: &[(&str, &[u8])]) {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            write!(data, "{length} {key}=").unwrap();
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.push(kind, "pax", "", &data);
    }
    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// One thing of a tree, in every respect that is to be kept.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) device: u64,
    pub(crate) size: u64,
    pub(crate) mtime: (i64, i64),
    pub(crate) links: u64,
    pub(crate) target: Option<PathBuf>,
    pub(crate) content: Option<Vec<u8>>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path with the same inode.
    pub(crate) same_as: PathBuf,
}

/// Everything below a directory, itself included as the empty path; `lost+found` left out.
pub(crate) fn look(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut queue = vec![PathBuf::new()];
    while let Some(path) = queue.pop() {
        let full = root.join(&path);
        let about = fs::symlink_metadata(&full).unwrap();
        let kind = about.file_type();
        if kind.is_dir() {
            let mut names: Vec<_> =
                fs::read_dir(&full).unwrap().map(|e| path.join(e.unwrap().file_name())).collect();
            names.retain(|name| name != Path::new("lost+found"));
            names.sort();
            queue.extend(names.into_iter().rev());
        }
        let same_as = inodes.entry(about.ino()).or_insert_with(|| path.clone()).clone();
        let content = kind.is_file().then(|| Sha256::digest(fs::read(&full).unwrap()).to_vec());
        seen.insert(
            path.clone(),
            Seen {
                mode: about.mode(),
                owner: (about.uid(), about.gid()),
                device: if kind.is_char_device() || kind.is_block_device() { about.rdev() } else { 0 },
                size: if kind.is_dir() { 0 } else { about.len() },
                mtime: (about.mtime(), about.mtime_nsec()),
                links: if kind.is_dir() { 0 } else { about.nlink() },
                target: kind.is_symlink().then(|| fs::read_link(&full).unwrap()),
                content,
                xattrs: xattrs(&full),
                same_as,
            },
        );
    }
    seen
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let Ok(length) = rustix::fs::llistxattr(path, &mut names[..]) else { return BTreeMap::new() };
    names[..length]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 65536];
            let length =
                rustix::fs::lgetxattr(path, std::ffi::OsStr::from_bytes(name), &mut value[..]).unwrap();
            value.truncate(length);
            (name.to_vec(), value)
        })
        .collect()
}

/// Mounts an image read-only where only this call sees it and looks into it.
pub(crate) fn mounted<T: Send + 'static>(image: &Path, work: impl FnOnce(&Path) -> T + Send + 'static) -> T {
    // noload: the journal is empty, and the file is read-only.
    mounted_with(image, "loop,ro,noload", work)
}

/// The same with options of one's own.
pub(crate) fn mounted_with<T: Send + 'static>(
    image: &Path,
    options: &'static str,
    work: impl FnOnce(&Path) -> T + Send + 'static,
) -> T {
    let image = image.to_owned();
    privately(move || {
        let dir = tempfile::tempdir().unwrap();
        let status =
            Command::new("mount").args(["-o", options]).arg(&image).arg(dir.path()).status().unwrap();
        assert!(status.success());
        let result = work(dir.path());
        assert!(Command::new("umount").arg(dir.path()).status().unwrap().success());
        result
    })
}

/// Does something on a thread whose mounts nobody else sees.
pub(crate) fn privately<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        use nix::{
            mount::{MsFlags, mount},
            sched::{CloneFlags, unshare},
        };
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        work()
    });
    thread.join().unwrap()
}
