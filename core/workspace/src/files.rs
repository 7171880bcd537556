//! The entries of a workspace.

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};

use crate::{archive::HostStat, tree::Look};

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
