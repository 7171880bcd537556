//! Unpacks a tar archive below a directory and nowhere else.
//!
//! Names with `..` and absolute ones are refused. All others are opened beneath the directory by openat2(2), so a link that
//! leads out of it, be it planted by the archive or put there meanwhile by somebody in the guest, cannot be gone through.
//! What has the name of a new entry is replaced and not written through, but for directories, which stay.

use std::{
    cell::Cell,
    ffi::OsStr,
    fs,
    io::{self, ErrorKind, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
    rc::Rc,
    time::{Duration, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::{Mode, fchmod, mkdirat},
    unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, mkfifoat, symlinkat, unlinkat},
};
use tar::EntryType;
use vm_types::guest::files::code;

use super::{Failure, Gone, Input, operations::copy};
use crate::draft::Draft;

/// The most that may describe one entry: its headers with names and attributes, in bytes. They are kept in memory.
const HEADERS: u64 = 1 << 20;

/// How often openat2(2) is asked for one directory.
const TRIES: usize = 16;

/// Unpacks `archive` below `directory`, which is made with all above it.
pub(super) fn unpack(directory: &Path, owner: (u32, u32), archive: Input) -> Result<(), Failure> {
    let name = directory.display().to_string();
    let below = Below::make(directory, owner).map_err(|error| Failure::of(&name, &error))?;
    let state = Rc::<State>::default();
    let mut archive = tar::Archive::new(Guarded { archive, state: Rc::clone(&state) });
    let mut last = PathBuf::new();
    let malformed = |error: io::Error, last: &Path| {
        if error.get_ref().is_some_and(|inner| inner.is::<Gone>()) {
            return Failure::Gone;
        }
        let place = if last.as_os_str().is_empty() {
            "at its beginning".to_owned()
        } else {
            format!("behind {}", last.display())
        };
        Failure::new(code::MALFORMED, format!("not a tar archive, {place}: {error}"))
    };
    let mut entries = archive.entries().map_err(|error| malformed(error, &last))?;
    loop {
        state.headers.set(Some(HEADERS));
        let Some(entry) = entries.next() else { break };
        state.headers.set(None);
        let mut entry = entry.map_err(|error| malformed(error, &last))?;
        last = entry.path().map_err(|error| malformed(error, &last))?.into_owned();
        below.put(&mut entry, &last)?;
        // What an entry has beyond what was taken is passed over here, where it counts for nothing.
        copy(&mut entry, &mut io::sink()).map_err(|error| malformed(error, &last))?;
    }
    if state.ended.get() {
        return Err(Failure::new(code::TRUNCATED, "the archive ends without its end mark"));
    }
    Ok(())
}

/// What the reader below the archive knows.
#[derive(Default)]
struct State {
    /// What headers may still have; no matter while content is read.
    headers: Cell<Option<u64>>,
    /// The input's end was met.
    ended: Cell<bool>,
}

/// Keeps headers from filling the memory.
struct Guarded {
    archive: Input,
    state: Rc<State>,
}

impl Read for Guarded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.archive.read(buffer)?;
        if let Some(left) = self.state.headers.get() {
            let left = left.checked_sub(length as u64).ok_or_else(|| {
                io::Error::new(ErrorKind::InvalidData, "a name is longer than any real one")
            })?;
            self.state.headers.set(Some(left));
        }
        if length == 0 && !buffer.is_empty() {
            self.state.ended.set(true);
        }
        Ok(length)
    }
}

/// A directory, and who owns what is put below it.
struct Below {
    directory: OwnedFd,
    owner: (Uid, Gid),
}

/// An entry's place: the directory it is in and its name there.
struct Place<'a> {
    directory: OwnedFd,
    name: &'a OsStr,
}

impl Below {
    fn make(path: &Path, (uid, gid): (u32, u32)) -> io::Result<Self> {
        let owner = (Uid::from_raw(uid), Gid::from_raw(gid));
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let made = match fs::create_dir(path) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            Err(error) => return Err(error),
        };
        let directory = open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        if made {
            fchown(&directory, Some(owner.0), Some(owner.1))?;
        }
        Ok(Self { directory, owner })
    }

    /// Puts one entry where it belongs.
    fn put(&self, entry: &mut tar::Entry<'_, Guarded>, path: &Path) -> Result<(), Failure> {
        let text = path.display().to_string();
        let failed = |error: io::Error| Failure::of(&text, &error);
        let kind = entry.header().entry_type();
        // Describes the archive or others, and has no place of its own.
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let names = inside(path).ok_or_else(|| outside(&text, ""))?;
        let Some((name, above)) = names.split_last() else { return Ok(()) };
        let place =
            Place { directory: self.enter(above, true).map_err(|error| refused(&text, error))?, name };
        let mode = Mode::from_bits_truncate(entry.header().mode().map_err(failed)? & 0o7777);
        match kind {
            // A name that ends in a slash was a directory before directories had a type of their own.
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse
                if !path.as_os_str().as_bytes().ends_with(b"/") =>
            {
                self.file(place, entry, mode.bits()).map_err(failed)
            }
            EntryType::Regular | EntryType::Directory => {
                self.folder(&names, &place, mode).map_err(|errno| refused(&text, errno))
            }
            EntryType::Symlink => {
                let target = link_target(entry).map_err(failed)?;
                self.symlink(&place, &target).map_err(|errno| failed(errno.into()))
            }
            EntryType::Link => {
                let target = link_target(entry).map_err(failed)?;
                let leads = || format!(", a link to {}", target.display());
                let names = inside(&target).ok_or_else(|| outside(&text, &leads()))?;
                let (name, above) = names.split_last().ok_or_else(|| outside(&text, &leads()))?;
                let from = self.enter(above, false).map_err(|errno| match errno {
                    Errno::EXDEV => outside(&text, &leads()),
                    errno => failed(errno.into()),
                })?;
                place.clear().map_err(|errno| failed(errno.into()))?;
                linkat(&from, *name, &place.directory, place.name, AtFlags::empty())
                    .map_err(|errno| failed(errno.into()))
            }
            EntryType::Fifo => {
                place.clear().map_err(|errno| failed(errno.into()))?;
                mkfifoat(&place.directory, place.name, mode)
                    .and_then(|()| self.own(&place))
                    .map_err(|errno| failed(errno.into()))
            }
            _ => Err(Failure::new(
                code::UNSUPPORTED,
                format!("{text}: neither file, directory, link nor pipe"),
            )),
        }
    }

    /// Opens a directory below, with `make` after making what is missing on the way.
    fn enter(&self, names: &[&OsStr], make: bool) -> Result<OwnedFd, Errno> {
        let path: PathBuf = names.iter().collect();
        match beneath(&self.directory, &path) {
            Err(Errno::ENOENT) if make => {}
            result => return result,
        }
        let mut path = PathBuf::new();
        let mut above = beneath(&self.directory, &path)?;
        for name in names {
            path.push(name);
            let next = match beneath(&self.directory, &path) {
                Err(Errno::ENOENT) => {
                    match mkdirat(&above, *name, Mode::from_bits_truncate(0o755)) {
                        // A link that leads nowhere.
                        Err(Errno::EEXIST) => return Err(Errno::ENOTDIR),
                        result => result?,
                    }
                    let made = beneath(&self.directory, &path)?;
                    fchown(&made, Some(self.owner.0), Some(self.owner.1))?;
                    Ok(made)
                }
                result => result,
            };
            above = next?;
        }
        Ok(above)
    }

    fn own(&self, place: &Place<'_>) -> nix::Result<()> {
        let (uid, gid) = self.owner;
        fchownat(&place.directory, place.name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// A file appears when it is whole.
    fn file(&self, place: Place<'_>, entry: &mut tar::Entry<'_, Guarded>, mode: u32) -> io::Result<()> {
        let mut draft = Draft::within(place.directory, place.name)?;
        let size = entry.size();
        if copy(entry, &mut draft)? < size {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the archive ends within it"));
        }
        if let Ok(seconds) = entry.header().mtime()
            && let Some(time) = UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
        {
            draft.set_modified(time)?;
        }
        draft.commit(mode, Some((self.owner.0.as_raw(), self.owner.1.as_raw())))
    }

    /// A directory that is there stays as it is, also behind a link that does not lead out; anything else gives way.
    fn folder(&self, names: &[&OsStr], place: &Place<'_>, mode: Mode) -> Result<(), Errno> {
        let path: PathBuf = names.iter().collect();
        match beneath(&self.directory, &path) {
            Err(Errno::ENOTDIR | Errno::ENOENT) => place.clear()?,
            result => return result.map(drop),
        }
        mkdirat(&place.directory, place.name, Mode::S_IRWXU)?;
        let directory = beneath(&self.directory, &path)?;
        fchown(&directory, Some(self.owner.0), Some(self.owner.1))?;
        fchmod(&directory, mode)
    }

    fn symlink(&self, place: &Place<'_>, target: &Path) -> nix::Result<()> {
        place.clear()?;
        symlinkat(target, &place.directory, place.name)?;
        self.own(place)
    }
}

impl Place<'_> {
    /// Removes what has the name, but no directory.
    fn clear(&self) -> nix::Result<()> {
        match unlinkat(&self.directory, self.name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// A directory beneath another, by a path that need not be one name.
fn beneath(directory: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    // The kernel asks for another try where something was renamed while it went up by `..`.
    for _ in 0..TRIES {
        match openat2(&directory, path, how) {
            Err(Errno::EAGAIN) => {}
            result => return result,
        }
    }
    Err(Errno::EAGAIN)
}

/// The names that lead to a path; `None` if it is absolute or goes up.
fn inside(path: &Path) -> Option<Vec<&OsStr>> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::CurDir => {}
            Component::Prefix(_) | Component::RootDir | Component::ParentDir => return None,
        }
    }
    Some(names)
}

fn outside(name: &str, how: &str) -> Failure {
    Failure::new(code::OUTSIDE, format!("{name}{how}: outside of the directory"))
}

/// Of opening what an entry is in.
fn refused(name: &str, errno: Errno) -> Failure {
    match errno {
        Errno::EXDEV => outside(name, ", behind a link"),
        errno => Failure::of(name, &errno.into()),
    }
}

fn link_target(entry: &tar::Entry<'_, Guarded>) -> io::Result<PathBuf> {
    let target = entry.link_name()?.map(std::borrow::Cow::into_owned);
    target.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "a link without a target"))
}
