//! Unpacks a tar archive below a directory and nowhere else.
//!
//! Names with `..` and absolute ones are refused. All others are opened beneath the directory by openat2(2), so a link that
//! leads out of it, be it planted by the archive or put there meanwhile by somebody else, cannot be gone through.
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
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::{
        stat::{Mode, UtimensatFlags, fchmod, futimens, mkdirat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, mkfifoat, symlinkat, unlinkat},
};
use tar::EntryType;
use vm_types::guest::files::{FileError, PackReport, code};

use crate::{CHUNK, Draft, Failure, Gone, copy_by};

/// The most that may describe one entry: its headers with names and attributes, in bytes. They are kept in memory.
const HEADERS: u64 = 1 << 20;
/// How often openat2(2) is asked for one directory.
const TRIES: usize = 16;
/// Directories whose modes and times wait until they are filled. Each is open.
const UNSETTLED: usize = 256;
/// Warnings that are told of.
const WARNINGS: usize = 100;

/// How to unpack.
#[derive(Debug, Clone, Copy)]
pub struct Unpacking<'a> {
    /// Who owns all that is made; if absent, whoever makes it.
    pub owner: Option<(u32, u32)>,
    /// The permission bits that are kept, of 12.
    pub modes: u32,
    /// The name that everything in the archive must have, or be below.
    pub only: Option<&'a OsStr>,
    /// As cp(1) does it: links in the tree are not followed, only what is no directory gives way, and only to what is none, and
    /// what is neither file, directory nor link is left out with a warning. Otherwise links that stay in the tree are followed,
    /// all but directories gives way, pipes are made and devices refused.
    pub careful: bool,
}

/// Unpacks `archive` below `directory`, which is made with all above it. Tells what was unpacked.
///
/// # Errors
/// What is no whole archive, or would be outside, or cannot be made; what was made before stays, but no half file.
pub fn unpack(directory: &Path, how: Unpacking<'_>, archive: impl Read) -> Result<PackReport, Failure> {
    let name = directory.display().to_string();
    let mut below = Below::make(directory, how).map_err(|error| Failure::of(&name, &error))?;
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
        copy_by(&mut below.buffer, &mut entry, &mut io::sink()).map_err(|error| malformed(error, &last))?;
    }
    if state.ended.get() {
        return Err(Failure::new(code::TRUNCATED, "the archive ends without its end mark"));
    }
    below.settle(None)?;
    Ok(std::mem::take(&mut below.report))
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
struct Guarded<R> {
    archive: R,
    state: Rc<State>,
}

impl<R: Read> Read for Guarded<R> {
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

/// A directory, and what becomes of what is put below it.
struct Below<'a> {
    directory: Rc<OwnedFd>,
    how: Unpacking<'a>,
    /// The directory that the last entry is in: most are where the one before them is.
    last: Option<(PathBuf, Rc<OwnedFd>)>,
    /// Directories that were made and are being filled, each within the one before.
    unsettled: Vec<Unsettled>,
    report: PackReport,
    /// For content.
    buffer: Vec<u8>,
}

/// A directory whose mode might forbid to fill it, and whose time changes as it is filled.
struct Unsettled {
    path: PathBuf,
    directory: OwnedFd,
    mode: Mode,
    modified: TimeSpec,
}

impl Unsettled {
    fn settle(&self) -> nix::Result<()> {
        fchmod(&self.directory, self.mode)?;
        futimens(&self.directory, &TimeSpec::UTIME_OMIT, &self.modified)
    }
}

impl Drop for Below<'_> {
    fn drop(&mut self) {
        // Of an archive that was not unpacked to its end.
        for one in self.unsettled.iter().rev() {
            let _ = one.settle();
        }
    }
}

/// An entry's place: the directory it is in and its name there.
struct Place<'a> {
    directory: Rc<OwnedFd>,
    name: &'a OsStr,
}

impl<'a> Below<'a> {
    fn make(path: &Path, how: Unpacking<'a>) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let made = match fs::create_dir(path) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            Err(error) => return Err(error),
        };
        let directory = open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let below = Self {
            directory: Rc::new(directory),
            how,
            last: None,
            unsettled: Vec::new(),
            report: PackReport::default(),
            buffer: vec![0; CHUNK],
        };
        if made {
            below.own_directory(&below.directory)?;
        }
        Ok(below)
    }

    /// Puts one entry where it belongs.
    fn put<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, path: &Path) -> Result<(), Failure> {
        let text = path.display().to_string();
        let failed = |error: io::Error| Failure::of(&text, &error);
        let kind = entry.header().entry_type();
        // Describes the archive or others, and has no place of its own.
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let names = self.inside(path).ok_or_else(|| outside(&text, ""))?;
        let Some((name, above)) = names.split_last() else { return Ok(()) };
        let whole: PathBuf = names.iter().collect();
        self.settle(Some(&whole))?;
        let directory = self.parent(above).map_err(|error| refused(&text, error))?;
        let place = Place { directory, name };
        let mode = entry.header().mode().map_err(failed)? & 0o7777 & self.how.modes;
        let modified = modified(entry).map_err(failed)?;
        self.report.entries += 1;
        match kind {
            // A name that ends in a slash was a directory before directories had a type of their own.
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse
                if !path.as_os_str().as_bytes().ends_with(b"/") =>
            {
                self.file(place, entry, mode, modified).map_err(failed)
            }
            EntryType::Regular | EntryType::Directory => self
                .folder(whole, &place, Mode::from_bits_truncate(mode), modified)
                .map_err(|errno| refused(&text, errno)),
            EntryType::Symlink => {
                let target = link_target(entry).map_err(failed)?;
                self.symlink(&place, &target, modified).map_err(|errno| failed(errno.into()))
            }
            EntryType::Link => {
                let target = link_target(entry).map_err(failed)?;
                let leads = || format!(", a link to {}", target.display());
                let names = self.inside(&target).ok_or_else(|| outside(&text, &leads()))?;
                let (name, above) = names.split_last().ok_or_else(|| outside(&text, &leads()))?;
                let from = self.enter(above, false).map_err(|errno| match errno {
                    Errno::EXDEV => outside(&text, &leads()),
                    errno => failed(errno.into()),
                })?;
                place.clear().map_err(|errno| failed(errno.into()))?;
                linkat(&from, *name, &place.directory, place.name, AtFlags::empty())
                    .map_err(|errno| failed(errno.into()))
            }
            _ if self.how.careful => {
                self.report.entries -= 1;
                self.warn(format!("{text}: neither file, directory nor link, left out"));
                Ok(())
            }
            EntryType::Fifo => {
                place.clear().map_err(|errno| failed(errno.into()))?;
                mkfifoat(&*place.directory, place.name, Mode::from_bits_truncate(mode))
                    .and_then(|()| self.own(&place))
                    .map_err(|errno| failed(errno.into()))
            }
            _ => Err(Failure::new(
                code::UNSUPPORTED,
                format!("{text}: neither file, directory, link nor pipe"),
            )),
        }
    }

    fn warn(&mut self, message: String) {
        if self.report.warnings.len() < WARNINGS {
            self.report.warnings.push(FileError { code: code::LEFT_OUT.to_owned(), message });
        } else {
            self.report.more += 1;
        }
    }

    /// Gives those directories their modes and times that `path` is not in.
    fn settle(&mut self, path: Option<&Path>) -> Result<(), Failure> {
        while let Some(last) = self.unsettled.last()
            && path.is_none_or(|path| !path.starts_with(&last.path))
        {
            let settled = last.settle();
            let name = last.path.display().to_string();
            self.unsettled.pop();
            settled.map_err(|errno| Failure::of(&name, &errno.into()))?;
        }
        Ok(())
    }

    /// The names that lead to a path; `None` if it is absolute, goes up, or is not where it may be.
    fn inside<'p>(&self, path: &'p Path) -> Option<Vec<&'p OsStr>> {
        let mut names = Vec::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => names.push(name),
                Component::CurDir => {}
                Component::Prefix(_) | Component::RootDir | Component::ParentDir => return None,
            }
        }
        let wanted = self.how.only.is_none_or(|only| names.first().is_none_or(|first| *first == only));
        wanted.then_some(names)
    }

    /// The directory of an entry, made if need be.
    fn parent(&mut self, names: &[&OsStr]) -> Result<Rc<OwnedFd>, Errno> {
        let path: PathBuf = names.iter().collect();
        if let Some((last, directory)) = &self.last
            && *last == path
        {
            return Ok(Rc::clone(directory));
        }
        let directory = Rc::new(self.enter(names, true)?);
        self.last = Some((path, Rc::clone(&directory)));
        Ok(directory)
    }

    /// Opens a directory below, with `make` after making what is missing on the way.
    fn enter(&self, names: &[&OsStr], make: bool) -> Result<OwnedFd, Errno> {
        let path: PathBuf = names.iter().collect();
        match self.beneath(&path) {
            Err(Errno::ENOENT) if make => {}
            result => return result,
        }
        let mut path = PathBuf::new();
        let mut above = self.beneath(&path)?;
        for name in names {
            path.push(name);
            let next = match self.beneath(&path) {
                Err(Errno::ENOENT) => {
                    match mkdirat(&above, *name, Mode::from_bits_truncate(0o755)) {
                        // A link that leads nowhere.
                        Err(Errno::EEXIST) => return Err(Errno::ENOTDIR),
                        result => result?,
                    }
                    let made = self.beneath(&path)?;
                    self.own_directory(&made)?;
                    Ok(made)
                }
                result => result,
            };
            above = next?;
        }
        Ok(above)
    }

    /// A directory beneath this one, by a path that need not be one name.
    fn beneath(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let mut resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        if self.how.careful {
            resolve |= ResolveFlag::RESOLVE_NO_SYMLINKS;
        }
        let how =
            OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC).resolve(resolve);
        // The kernel asks for another try where something was renamed while it went up by `..`.
        for _ in 0..TRIES {
            match openat2(&*self.directory, path, how) {
                Err(Errno::EAGAIN) => {}
                result => return result,
            }
        }
        Err(Errno::EAGAIN)
    }

    fn own(&self, place: &Place<'_>) -> nix::Result<()> {
        let Some((uid, gid)) = self.how.owner else { return Ok(()) };
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        fchownat(&*place.directory, place.name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    fn own_directory(&self, directory: impl AsFd) -> nix::Result<()> {
        let Some((uid, gid)) = self.how.owner else { return Ok(()) };
        fchown(directory, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
    }

    /// A file appears when it is whole.
    fn file<R: Read>(
        &mut self,
        place: Place<'_>,
        entry: &mut tar::Entry<'_, R>,
        mode: u32,
        modified: TimeSpec,
    ) -> io::Result<()> {
        let mut draft = Draft::within(place.directory, place.name)?;
        let size = entry.size();
        if copy_by(&mut self.buffer, entry, &mut draft)? < size {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the archive ends within it"));
        }
        draft.set_modified(&modified)?;
        draft.commit(mode, self.how.owner)?;
        self.report.files += 1;
        self.report.content += size;
        Ok(())
    }

    /// A directory that is there stays as it is, also behind a link that is followed.
    fn folder(
        &mut self,
        path: PathBuf,
        place: &Place<'_>,
        mode: Mode,
        modified: TimeSpec,
    ) -> Result<(), Errno> {
        match self.beneath(&path) {
            Err(Errno::ENOENT) => place.clear()?,
            Err(Errno::ENOTDIR) if !self.how.careful => place.clear()?,
            result => return result.map(drop),
        }
        mkdirat(&*place.directory, place.name, Mode::S_IRWXU)?;
        let directory = self.beneath(&path)?;
        self.own_directory(&directory)?;
        let made = Unsettled { path, directory, mode, modified };
        if self.unsettled.len() == UNSETTLED {
            return made.settle();
        }
        self.unsettled.push(made);
        Ok(())
    }

    fn symlink(&self, place: &Place<'_>, target: &Path, modified: TimeSpec) -> nix::Result<()> {
        place.clear()?;
        symlinkat(target, &*place.directory, place.name)?;
        self.own(place)?;
        // Not all filesystems have times of links.
        let _ = utimensat(
            &*place.directory,
            place.name,
            &TimeSpec::UTIME_OMIT,
            &modified,
            UtimensatFlags::NoFollowSymlink,
        );
        Ok(())
    }
}

impl Place<'_> {
    /// Removes what has the name, but no directory.
    fn clear(&self) -> nix::Result<()> {
        match unlinkat(&*self.directory, self.name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn outside(name: &str, how: &str) -> Failure {
    Failure::new(code::OUTSIDE, format!("{name}{how}: outside of the directory"))
}

/// Of opening what an entry is in, or a directory that is one.
fn refused(name: &str, errno: Errno) -> Failure {
    match errno {
        Errno::EXDEV => outside(name, ", behind a link"),
        Errno::ELOOP => {
            Failure::new(code::NOT_DIRECTORY, format!("{name}: there is a symbolic link in the way"))
        }
        errno => Failure::of(name, &errno.into()),
    }
}

fn link_target<R: Read>(entry: &tar::Entry<'_, R>) -> io::Result<PathBuf> {
    let target = entry.link_name()?.map(std::borrow::Cow::into_owned);
    target.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "a link without a target"))
}

/// When an entry was modified: to the nanosecond where a record says so, else to the second.
fn modified<R: Read>(entry: &mut tar::Entry<'_, R>) -> io::Result<TimeSpec> {
    if let Some(records) = entry.pax_extensions()? {
        for record in records.flatten() {
            if record.key_bytes() == b"mtime"
                && let Some(time) = record.value().ok().and_then(time)
            {
                return Ok(time);
            }
        }
    }
    Ok(TimeSpec::new(i64::try_from(entry.header().mtime().unwrap_or(0)).unwrap_or(i64::MAX), 0))
}

/// A decimal number of seconds, see POSIX.1-2008, pax, "pax Extended Header".
fn time(text: &str) -> Option<TimeSpec> {
    let (before, text) = match text.strip_prefix('-') {
        Some(text) => (true, text),
        None => (false, text),
    };
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = seconds.parse().ok().filter(|seconds| *seconds >= 0)?;
    // What is finer than the kernel's times is cut off.
    let nanos: i64 = format!("{:0<9}", &fraction[..fraction.len().min(9)]).parse().ok()?;
    Some(match (before, nanos) {
        (false, _) => TimeSpec::new(seconds, nanos),
        (true, 0) => TimeSpec::new(-seconds, 0),
        (true, _) => TimeSpec::new(-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_their_nanoseconds() {
        for (text, seconds, nanos) in [
            ("12", 12, 0),
            ("12.5", 12, 500_000_000),
            ("12.000000005", 12, 5),
            ("12.0000000059", 12, 5),
            ("-0.5", -1, 500_000_000),
            ("-2.75", -3, 250_000_000),
            ("-3", -3, 0),
        ] {
            assert_eq!(time(text), Some(TimeSpec::new(seconds, nanos)), "{text}");
        }
        for text in ["", "x", "1.x", "--1", "1.-5", "99999999999999999999"] {
            assert_eq!(time(text), None, "{text}");
        }
    }
}
