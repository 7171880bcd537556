//! The entries of a workspace.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::{archive::HostStat, tree::Look};

/// The most that is read of a small file of a repository's, in bytes.
const SMALL: u64 = 16 << 20;

/// Opens a regular file that somebody else may have chosen: nothing waits for a pipe or is done to a device. With `follow`
/// it may be reached through a link.
///
/// # Errors
/// Those of open(2); [`io::ErrorKind::InvalidInput`] where it is no regular file.
pub(crate) fn open_regular(path: &Path, follow: bool) -> io::Result<File> {
    let mut flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    flags.set(OFlags::NOFOLLOW, !follow);
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Reads a small file in the way of [`open_regular`].
///
/// # Errors
/// As [`open_regular`], and [`io::ErrorKind::FileTooLarge`] above 16 MiB.
pub(crate) fn read_small(path: &Path, follow: bool) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    open_regular(path, follow)?.take(SMALL + 1).read_to_end(&mut content)?;
    if content.len() as u64 > SMALL { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(content) }
}

/// What an entry is. There are no others: pipes, sockets and devices do not go into a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

/// One entry of a workspace, as it was when the workspace was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the workspace's top.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, nine of them.
    pub mode: u32,
    /// Of a file, in bytes; of others 0.
    pub size: u64,
    /// Times and number.
    pub stat: HostStat,
    /// Whether git keeps it; directories, which git does not keep, have `false`.
    pub tracked: bool,
}

impl EntryKind {
    pub(crate) fn of(kind: FileType) -> Option<Self> {
        match kind {
            FileType::RegularFile => Some(Self::File),
            FileType::Directory => Some(Self::Directory),
            FileType::Symlink => Some(Self::Symlink),
            _ => None,
        }
    }
}

impl Entry {
    pub(crate) fn of(path: Vec<u8>, look: &Look, tracked: bool) -> Option<Self> {
        let kind = EntryKind::of(look.kind)?;
        let size = if kind == EntryKind::File { look.size } else { 0 };
        Some(Self { path, kind, mode: look.mode, size, stat: look.stat, tracked })
    }
}
