//! A directory tree that is filled by names which nobody vouches for.
//!
//! Every name is walked component by component from the root's descriptor and no symbolic link is ever followed, so
//! whatever an archive says, nothing outside is read or written.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, RawMode, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};

use super::archive::{Entry, Kind};

/// Why an entry could not be made.
pub(super) enum Refusal {
    /// The archive is at fault.
    Archive(String),
    /// The host is.
    Host(&'static str, io::Error),
}

impl From<(&'static str, Errno)> for Refusal {
    fn from((action, errno): (&'static str, Errno)) -> Self {
        Self::Host(action, errno.into())
    }
}

/// How many directories above the current one are kept open.
const OPEN_MAX: usize = 128;

/// The tree.
pub(super) struct Tree {
    root: OwnedFd,
    /// Open directories, each in the one before it.
    open: Vec<(Vec<u8>, OwnedFd)>,
    /// Directories that no entry named (yet) when they were needed.
    implied: Vec<Vec<u8>>,
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Splits a name; an error says in words why it must not be used.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    if path.starts_with(b"/") {
        return Err("is an absolute path");
    }
    if path.contains(&0) {
        return Err("contains a zero byte");
    }
    let parts: Vec<&[u8]> =
        path.split(|&b| b == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        return Err("leads out of the archive with \"..\"");
    }
    Ok(parts)
}

impl Tree {
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        Ok(Self {
            root: rustix::fs::open(root, DIRECTORY, Mode::empty())?,
            open: Vec::new(),
            implied: Vec::new(),
        })
    }

    /// The directory of these components. Missing ones are made (root's, mode 0755) if `create`.
    fn directory(&mut self, parts: &[&[u8]], create: bool) -> Result<BorrowedFd<'_>, Refusal> {
        let common = self.open.iter().zip(parts).take_while(|((name, _), part)| name == *part).count();
        self.open.truncate(common);
        let mut beyond: Option<OwnedFd> = None;
        for (depth, &part) in parts.iter().enumerate().skip(common) {
            let at = beyond.as_ref().or(self.open.last().map(|(_, fd)| fd)).unwrap_or(&self.root).as_fd();
            let fd = match rustix::fs::openat(at, part, DIRECTORY, Mode::empty()) {
                Err(Errno::NOENT) if create => {
                    let mode = Mode::from_raw_mode(0o755);
                    rustix::fs::mkdirat(at, part, mode).map_err(|e| ("make a directory for", e))?;
                    let made = rustix::fs::openat(at, part, DIRECTORY, Mode::empty())
                        .map_err(|e| ("open a directory of", e))?;
                    // Whatever the daemon's umask.
                    rustix::fs::fchmod(&made, mode).map_err(|e| ("make a directory for", e))?;
                    self.implied.push(parts[..=depth].join(&b'/'));
                    made
                }
                Err(Errno::NOENT) => {
                    return Err(Refusal::Archive("is a link to something that is not there".into()));
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    return Err(Refusal::Archive(match kind_of(at, part) {
                        Some(FileType::Symlink) => {
                            format!("passes through the symbolic link {:?}", String::from_utf8_lossy(part))
                        }
                        _ => format!("lies below {:?}, which is no directory", String::from_utf8_lossy(part)),
                    }));
                }
                other => other.map_err(|e| ("open a directory of", e))?,
            };
            if beyond.is_none() && self.open.len() < OPEN_MAX {
                self.open.push((part.to_vec(), fd));
            } else {
                beyond = Some(fd);
            }
        }
        match beyond {
            // Too deep to be kept with its ancestors: it takes the last one's place under a name that matches nothing.
            Some(fd) => {
                self.open.truncate(OPEN_MAX);
                self.open.push((Vec::new(), fd));
                Ok(self.open.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd()))
            }
            None => Ok(self.open.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd())),
        }
    }

    /// Makes what an entry names, without a file's content; for a file, answers it open for writing. An entry of a name
    /// that is there already replaces it, as the last one of an archive does; directories are merged.
    pub(super) fn make(&mut self, entry: &Entry) -> Result<Option<File>, Refusal> {
        let parts = components(&entry.path).map_err(|reason| Refusal::Archive(reason.into()))?;
        let Some((&name, parents)) = parts.split_last() else {
            return match entry.kind {
                Kind::Directory => attributes(self.root.as_fd(), entry).map(|()| None),
                _ => Err(Refusal::Archive("takes the place of the root directory".into())),
            };
        };
        if let Kind::Hardlink(target) = &entry.kind {
            return self.hardlink(parents, name, target).map(|()| None);
        }
        let depth = parents.len();
        let is_directory = entry.kind == Kind::Directory;
        let at = self.directory(parents, true)?;
        match kind_of(at, name) {
            Some(FileType::Directory) if is_directory => {}
            Some(there) => {
                let flags = if there == FileType::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
                match rustix::fs::unlinkat(at, name, flags) {
                    Err(Errno::NOTEMPTY) => {
                        return Err(Refusal::Archive(
                            "takes the place of a directory that is not empty".into(),
                        ));
                    }
                    other => other.map_err(|e| ("replace", e))?,
                }
                self.open.truncate(depth);
            }
            None => {}
        }
        let at = self.directory(parents, false)?;
        let writable = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match &entry.kind {
            Kind::File => {
                let fd = rustix::fs::openat(at, name, writable, Mode::RUSR | Mode::WUSR)
                    .map_err(|e| ("make", e))?;
                // Attributes come after the content: writing would strip set-user-id bits and capabilities again.
                return Ok(Some(fd.into()));
            }
            Kind::Directory => {
                match rustix::fs::mkdirat(at, name, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(("make", errno).into()),
                }
                let fd = rustix::fs::openat(at, name, DIRECTORY, Mode::empty()).map_err(|e| ("open", e))?;
                attributes(fd.as_fd(), entry)?;
            }
            Kind::Symlink(target) => {
                if target.is_empty() {
                    return Err(Refusal::Archive("is a symbolic link to nothing".into()));
                }
                rustix::fs::symlinkat(&target[..], at, name).map_err(|e| ("make", e))?;
                attributes_at(at, name, entry)?;
            }
            Kind::CharDevice(major, minor) => {
                special(at, name, entry, FileType::CharacterDevice, *major, *minor)?
            }
            Kind::BlockDevice(major, minor) => {
                special(at, name, entry, FileType::BlockDevice, *major, *minor)?
            }
            Kind::Fifo => special(at, name, entry, FileType::Fifo, 0, 0)?,
            Kind::Hardlink(_) => {}
        }
        Ok(None)
    }

    fn hardlink(&mut self, parents: &[&[u8]], name: &[u8], target: &[u8]) -> Result<(), Refusal> {
        let shown = String::from_utf8_lossy(target).into_owned();
        let to = components(target)
            .map_err(|reason| Refusal::Archive(format!("is a hard link to {shown:?}, which {reason}")))?;
        let Some((&to_name, to_parents)) = to.split_last() else {
            return Err(Refusal::Archive("is a hard link to the root directory".into()));
        };
        if to_parents == parents && to_name == name {
            return Ok(());
        }
        let from =
            self.directory(to_parents, false)?.try_clone_to_owned().map_err(|e| Refusal::Host("link", e))?;
        let at = self.directory(parents, true)?;
        if kind_of(from.as_fd(), to_name).is_some()
            && kind_of(at, name).is_some_and(|k| k != FileType::Directory)
        {
            rustix::fs::unlinkat(at, name, AtFlags::empty()).map_err(|e| ("replace", e))?;
        }
        match rustix::fs::linkat(&from, to_name, at, name, AtFlags::empty()) {
            Err(Errno::NOENT) => {
                Err(Refusal::Archive(format!("is a hard link to {shown:?}, which is not there")))
            }
            Err(Errno::PERM) => Err(Refusal::Archive(format!("is a hard link to {shown:?}, a directory"))),
            other => other.map_err(|e| ("link", e).into()),
        }
    }

    /// Directories that were made without an entry, for which the archive has perhaps no time.
    pub(super) fn implied(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.implied)
    }

    /// Sets a directory's time, after the last change in it.
    pub(super) fn set_directory_time(&mut self, path: &[u8], mtime: (i64, u32)) -> Result<(), Refusal> {
        let parts = components(path).map_err(|reason| Refusal::Archive(reason.into()))?;
        let fd = self.directory(&parts, false)?;
        rustix::fs::futimens(fd, &times(mtime)).map_err(|e| ("set the time of", e).into())
    }
}

/// Owner, mode, extended attributes and (but for a directory, whose time the next entry in it would change) time.
pub(super) fn attributes(fd: BorrowedFd<'_>, entry: &Entry) -> Result<(), Refusal> {
    // Changing the owner clears set-user-id bits and capabilities, so it comes first.
    rustix::fs::fchown(fd, uid(entry), gid(entry)).map_err(|e| ("set the owner of", e))?;
    rustix::fs::fchmod(fd, mode(entry)).map_err(|e| ("set the mode of", e))?;
    for (name, value) in &entry.xattrs {
        rustix::fs::fsetxattr(fd, &name[..], value, XattrFlags::empty())
            .map_err(|e| ("set an extended attribute of", e))?;
    }
    if entry.kind != Kind::Directory {
        rustix::fs::futimens(fd, &times(entry.mtime)).map_err(|e| ("set the time of", e))?;
    }
    Ok(())
}

/// The same for what cannot be opened: links, devices, pipes.
fn attributes_at(at: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<(), Refusal> {
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(at, name, uid(entry), gid(entry), nofollow).map_err(|e| ("set the owner of", e))?;
    if !matches!(entry.kind, Kind::Symlink(_)) {
        rustix::fs::chmodat(at, name, mode(entry), AtFlags::empty()).map_err(|e| ("set the mode of", e))?;
    }
    if !entry.xattrs.is_empty() {
        // There is no lsetxattr below a descriptor; this path resolves to the very directory.
        let mut path = format!("/proc/self/fd/{}/", at.as_raw_fd()).into_bytes();
        path.extend_from_slice(name);
        for (key, value) in &entry.xattrs {
            rustix::fs::lsetxattr(&path[..], &key[..], value, XattrFlags::empty())
                .map_err(|e| ("set an extended attribute of", e))?;
        }
    }
    rustix::fs::utimensat(at, name, &times(entry.mtime), nofollow).map_err(|e| ("set the time of", e).into())
}

fn special(
    at: BorrowedFd<'_>,
    name: &[u8],
    entry: &Entry,
    kind: FileType,
    major: u32,
    minor: u32,
) -> Result<(), Refusal> {
    rustix::fs::mknodat(at, name, kind, Mode::RUSR | Mode::WUSR, rustix::fs::makedev(major, minor))
        .map_err(|e| ("make", e))?;
    attributes_at(at, name, entry)
}

fn kind_of(at: BorrowedFd<'_>, name: &[u8]) -> Option<FileType> {
    let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some(FileType::from_raw_mode(stat.st_mode))
}

fn uid(entry: &Entry) -> Option<Uid> {
    Some(Uid::from_raw(entry.uid))
}

fn gid(entry: &Entry) -> Option<Gid> {
    Some(Gid::from_raw(entry.gid))
}

fn mode(entry: &Entry) -> Mode {
    Mode::from_raw_mode(entry.mode as RawMode)
}

fn times((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}
