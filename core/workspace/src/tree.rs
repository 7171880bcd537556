//! A directory and what is below it, reached by open directories and never through a link.
//!
//! Whoever swaps names meanwhile gets other files looked at, but none of elsewhere.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    fcntl::AtFlags,
    sys::stat::{FileStat, fstat, fstatat},
};
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, openat, readlinkat};

use crate::archive::HostStat;

const SECOND: i128 = 1_000_000_000;

/// What stat(2) says of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    pub(crate) kind: FileType,
    /// Permission bits: nine, as the others give no rights that a guest's user would want of a host's file.
    pub(crate) mode: u32,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) stat: HostStat,
}

/// An open directory. Keeps the directories on the way to the entry that it was asked for last open, so that asking for
/// entries in the order of their paths opens each directory once.
#[derive(Debug)]
pub struct Tree {
    top: OwnedFd,
    way: Vec<(Vec<u8>, OwnedFd)>,
}

/// An entry's name in its directory; the directory itself is `.`.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None if path.is_empty() => (b"", b"."),
        None => (b"", path),
    }
}

impl Tree {
    /// Opens the directory at a path of the host.
    ///
    /// # Errors
    /// Those of open(2); `NotADirectory` where it is something else.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { top: openat(CWD, path, flags, Mode::empty())?, way: Vec::new() })
    }

    /// The open directory that has an entry, and the entry's name in it. The path is one within the tree
    /// ([`vm_types::guest::files::is_within`]), or empty for its top.
    ///
    /// # Errors
    /// Those of open(2); `NotADirectory` where a link or a file is on the way.
    pub fn parent<'p>(&mut self, path: &'p [u8]) -> io::Result<(BorrowedFd<'_>, &'p [u8])> {
        let (above, name) = split(path);
        let names: Vec<&[u8]> = above.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).collect();
        let common = self.way.iter().zip(&names).take_while(|((open, _), name)| open == *name).count();
        self.way.truncate(common);
        for name in &names[common..] {
            let at = self.way.last().map_or(&self.top, |(_, directory)| directory);
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let next = openat(at, *name, flags, Mode::empty())?;
            self.way.push((name.to_vec(), next));
        }
        Ok((self.way.last().map_or(&self.top, |(_, directory)| directory).as_fd(), name))
    }

    /// Looks at an entry; `None` where there is none of this path, or only through a link.
    pub(crate) fn look(&mut self, path: &[u8]) -> io::Result<Option<Look>> {
        let outcome = self
            .parent(path)
            .and_then(|(directory, name)| Ok(fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?));
        absent(outcome.map(|stat| Look::of(&stat)))
    }

    /// Opens a regular file for reading; `None` where there is none.
    pub(crate) fn file(&mut self, path: &[u8]) -> io::Result<Option<File>> {
        let outcome = self.parent(path).and_then(|(directory, name)| {
            // Opening a pipe or a device would wait or do something; what was opened is looked at.
            let flags =
                OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let file = File::from(openat(directory, name, flags, Mode::empty())?);
            Ok((Look::of(&fstat(&file)?).kind == FileType::RegularFile).then_some(file))
        });
        absent(outcome).map(Option::flatten)
    }

    /// Where a symbolic link leads; `None` where there is none.
    pub(crate) fn target(&mut self, path: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let outcome = self
            .parent(path)
            .and_then(|(directory, name)| Ok(readlinkat(directory, name, Vec::new())?.into_bytes()));
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(None),
            outcome => absent(outcome),
        }
    }

    /// The names in a directory, unsorted; `None` where there is none.
    pub(crate) fn names(&mut self, path: &[u8]) -> io::Result<Option<Vec<CString>>> {
        let outcome = self.parent(path).and_then(|(directory, name)| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut names = Vec::new();
            for entry in Dir::new(openat(directory, name, flags, Mode::empty())?)? {
                let entry = entry?;
                if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                    names.push(entry.file_name().to_owned());
                }
            }
            Ok(names)
        });
        absent(outcome)
    }
}

/// `None` where something is not there, or something else is.
fn absent<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    use io::ErrorKind::{NotADirectory, NotFound};
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), NotFound | NotADirectory) => Ok(None),
        // A link where none is followed; a socket, or a device without a driver.
        Err(error)
            if [rustix::io::Errno::LOOP, rustix::io::Errno::NXIO]
                .iter()
                .any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Look {
    pub(crate) fn of(stat: &FileStat) -> Self {
        let time = |seconds: i64, nanos: i64| i128::from(seconds) * SECOND + i128::from(nanos);
        Self {
            kind: FileType::from_raw_mode(stat.st_mode),
            mode: stat.st_mode & 0o777,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            stat: HostStat {
                mtime: time(stat.st_mtime, stat.st_mtime_nsec),
                ctime: time(stat.st_ctime, stat.st_ctime_nsec),
                inode: stat.st_ino,
            },
        }
    }

    pub(crate) fn of_file(file: &File) -> io::Result<Self> {
        Ok(Self::of(&fstat(file)?))
    }
}
