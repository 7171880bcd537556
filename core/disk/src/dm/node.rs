//! Device nodes, made without udev.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    libc,
    sys::stat::{Mode, SFlag, mknod},
};
use vm_host::files::remove_if_there;

/// Beginning of the names of nodes that are there for the moment in which they are opened.
const TRANSIENT: &str = ".node-";

/// Opens a device by its number. The node for that is in `directory` for a moment; those of the system are not needed, and may be
/// missing where there is no udev.
pub(crate) fn open(directory: &Path, kind: SFlag, dev: u64, write: bool) -> io::Result<File> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = directory.join(format!("{TRANSIENT}{}-{number}", std::process::id()));
    mknod(&path, kind, Mode::from_bits_truncate(0o600), dev)?;
    let opened = OpenOptions::new().read(true).write(write).custom_flags(libc::O_NOFOLLOW).open(&path);
    remove_if_there(&path)?;
    opened
}

/// Removes what a daemon that was killed at that moment left.
pub(crate) fn tidy(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let process = name.to_str().and_then(|name| name.strip_prefix(TRANSIENT)?.split_once('-'));
        let Some((process, _)) = process else { continue };
        let left = !Path::new("/proc").join(process).exists() && is_node(&path);
        if left && let Err(error) = remove_if_there(&path) {
            tracing::warn!(path = %path.display(), %error, "could not be removed");
        }
    }
}

/// What is at the path of a disk's node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    Nothing,
    /// A node of this device.
    Node(u64),
    Foreign,
}

pub(crate) fn look(path: &Path) -> io::Result<Found> {
    match fs::symlink_metadata(path) {
        Ok(about) if about.file_type().is_block_device() => Ok(Found::Node(about.rdev())),
        Ok(_) => Ok(Found::Foreign),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::Nothing),
        Err(error) => Err(error),
    }
}

/// Makes a block device's node, in place of one that a former device of that name left. What is no node stays.
pub(crate) fn make(path: &Path, dev: u64) -> io::Result<()> {
    match look(path)? {
        Found::Node(there) if there == dev => return Ok(()),
        Found::Node(_) => remove_if_there(path)?,
        Found::Nothing => {}
        Found::Foreign => return Err(Errno::EEXIST.into()),
    }
    mknod(path, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), dev)?;
    Ok(())
}

/// Removes a node, and nothing else.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match look(path)? {
        Found::Node(_) => remove_if_there(path),
        Found::Nothing => Ok(()),
        Found::Foreign => Err(Errno::EEXIST.into()),
    }
}

fn is_node(path: &Path) -> bool {
    fs::symlink_metadata(path)
        .is_ok_and(|about| about.file_type().is_block_device() || about.file_type().is_char_device())
}

/// The number of a device from sysfs, which has it as `MAJOR:MINOR`.
pub(crate) fn number_in(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    let (major, minor) = text.trim().split_once(':').unwrap_or_default();
    match (major.parse(), minor.parse()) {
        (Ok(major), Ok(minor)) => Ok(libc::makedev(major, minor)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no device number"))),
    }
}

/// As tables and sysfs have it.
pub(crate) fn text(dev: u64) -> String {
    format!("{}:{}", libc::major(dev), libc::minor(dev))
}
