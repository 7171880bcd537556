//! Files that are whole or absent, whatever happens half way.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    sys::statvfs::{Statvfs, fstatvfs, statvfs},
};
use serde::{Serialize, de::DeserializeOwned};

/// What is left free on a disk that images are written to, in bytes: for VMs to go on.
pub const RESERVE: u64 = 256 << 20;

/// Whether so many bytes more can be written to the disk that `path` is on, with [`RESERVE`] left free.
///
/// # Errors
/// [`io::ErrorKind::StorageFull`] where they cannot, or the disk cannot be looked at.
pub fn room(path: &Path, bytes: u64) -> io::Result<()> {
    enough(&statvfs(path)?, bytes)
}

/// [`room`] on the disk of an open file.
///
/// # Errors
/// As [`room`].
pub fn room_of(file: &File, bytes: u64) -> io::Result<()> {
    enough(&fstatvfs(file)?, bytes)
}

fn enough(disk: &Statvfs, bytes: u64) -> io::Result<()> {
    let free = disk.blocks_available().saturating_mul(disk.fragment_size());
    // With its number, so that it is told like the kernel's own.
    if bytes.saturating_add(RESERVE) <= free { Ok(()) } else { Err(Errno::ENOSPC.into()) }
}

/// A whole file, if it is no more than so many bytes.
///
/// # Errors
/// It cannot be read, or [`io::ErrorKind::FileTooLarge`].
pub fn read_at_most(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
}

/// Writes `content` to `path` so that a reader sees the old or the new file, never a part, also
/// after a crash of the host: temporary file, fsync, rename, fsync of the directory.
///
/// # Errors
/// Any of those steps failing; the temporary file is removed.
pub fn write_atomic(path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
    replace(path, mode, content, true)
}

/// Like [`write_atomic`], but not flushed: whole or absent whatever becomes of this process, not so if the host loses
/// power. For what is void after a reboot anyhow.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_volatile(path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
    replace(path, mode, content, false)
}

fn replace(path: &Path, mode: u32, content: &[u8], flush: bool) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    // Two writers of one file, also in one process, must not share it.
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    name.push(format!(".tmp{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    let temporary = dir.join(name);
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        if !flush {
            return fs::rename(&temporary, path);
        }
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(dir)?.sync_all()
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// [`write_atomic`] of a value as JSON.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_json<T: Serialize>(path: &Path, mode: u32, value: &T) -> io::Result<()> {
    write_atomic(path, mode, &serde_json::to_vec_pretty(value)?)
}

/// Reads JSON; `None` where there is no such file.
///
/// # Errors
/// Reading, or a text that does not fit the type.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a file; its absence is success.
///
/// # Errors
/// Anything but absence.
pub fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_atomic(&path, 0o640, b"old").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        let target_is_directory = dir.path().join("d");
        fs::create_dir(&target_is_directory).unwrap();
        assert!(write_atomic(&target_is_directory, 0o640, b"new").is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
