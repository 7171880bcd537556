//! Unpacks a tar archive below a directory and nowhere else.
//!
//! Names with `..` and absolute ones are refused. All others are opened beneath the directory by openat2(2), so a link that
//! leads out of it, be it planted by the archive or put there meanwhile by somebody else, cannot be gone through.
//! What has the name of a new entry is replaced and not written through, but for directories, which stay.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs,
    io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, lchown},
        },
    },
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, fchmod, fstatat, futimens, mkdirat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, mkfifoat, symlinkat, unlinkat},
};
use rustix::fs::{XattrFlags, fsetxattr, lsetxattr};
use tar::EntryType;
use vm_types::guest::files::{FileError, PackReport, UnpackOptions, code};

use crate::{
    Draft, Failure, Gone, copy_by,
    draft::sweep,
    look::{by_descriptor, look},
    read::{Member, Members, Truncated},
};

/// How much of an archive is read at once, in bytes: headers of many small files.
const BUFFER: usize = 64 << 10;
/// How much of a file is written at once, in bytes.
const WRITE: usize = 256 << 10;
/// How often openat2(2) is asked for one directory.
const TRIES: usize = 16;
/// Directories whose modes and times wait until they are filled. Each is open.
const UNSETTLED: usize = 256;
/// Warnings that are told of.
const WARNINGS: usize = 100;
/// Directories that are remembered to have no drafts of others.
const SWEPT: usize = 1 << 16;

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
    /// What else of the archive counts.
    pub options: UnpackOptions,
}

/// Unpacks `archive` below `directory`, which is made with all above it. Tells what was unpacked.
///
/// # Errors
/// What is no whole archive, or would be outside, or cannot be made; what was made before stays, but no half file.
pub fn unpack(directory: &Path, how: Unpacking<'_>, archive: impl Read) -> Result<PackReport, Failure> {
    let name = directory.display().to_string();
    let mut below = Below::make(directory, how).map_err(|error| Failure::of(&name, &error))?;
    let mut members = Members::new(BufReader::with_capacity(BUFFER, archive));
    let mut last = PathBuf::new();
    while let Some(member) = members.next_member().map_err(|error| malformed(&error, &last))? {
        last = PathBuf::from(OsStr::from_bytes(&member.name));
        below.put(&member, &last, &mut members)?;
    }
    below.settle(None)?;
    Ok(std::mem::take(&mut below.report))
}

/// Of reading what is between contents.
fn malformed(error: &io::Error, last: &Path) -> Failure {
    if error.get_ref().is_some_and(|inner| inner.is::<Gone>()) {
        return Failure::Gone;
    }
    if error.get_ref().is_some_and(|inner| inner.is::<Truncated>()) {
        return Failure::new(code::TRUNCATED, error.to_string());
    }
    let place = if last.as_os_str().is_empty() {
        "at its beginning".to_owned()
    } else {
        format!("behind {}", last.display())
    };
    Failure::new(code::MALFORMED, format!("not a tar archive, {place}: {error}"))
}

/// A directory, and what becomes of what is put below it.
struct Below<'a> {
    directory: Rc<OwnedFd>,
    how: Unpacking<'a>,
    /// The directory that the last entry is in: most are where the one before them is.
    last: Option<(PathBuf, Rc<OwnedFd>)>,
    /// Directories that were made and are being filled, each within the one before.
    unsettled: Vec<Unsettled>,
    /// Directories in which nobody's drafts are left.
    swept: HashSet<PathBuf>,
    report: PackReport,
    /// For content.
    buffer: Vec<u8>,
}

/// Numbers of user and group, if not those of whoever makes it.
type Owner = Option<(u32, u32)>;

/// A directory whose mode might forbid to fill it, and whose time changes as it is filled.
struct Unsettled {
    path: PathBuf,
    directory: OwnedFd,
    mode: Mode,
    modified: TimeSpec,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Unsettled {
    fn settle(&self) -> nix::Result<()> {
        fchmod(&self.directory, self.mode)?;
        for (name, value) in &self.xattrs {
            fsetxattr(&self.directory, name.as_slice(), value, XattrFlags::empty())
                .map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
        }
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
        // Those above it, too, belong to whom it is for.
        let is_missing = |path: &&Path| !path.as_os_str().is_empty() && fs::symlink_metadata(path).is_err();
        let missing: Vec<_> = path.ancestors().take_while(is_missing).collect();
        for above in missing.into_iter().rev() {
            match fs::create_dir(above) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                Ok(()) => {
                    if let Some((uid, gid)) = how.owner {
                        lchown(above, Some(uid), Some(gid))?;
                    }
                }
                Err(_) => {}
            }
        }
        let directory = open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let below = Self {
            directory: Rc::new(directory),
            how,
            last: None,
            unsettled: Vec::new(),
            swept: HashSet::new(),
            report: PackReport::default(),
            buffer: vec![0; WRITE],
        };
        Ok(below)
    }

    /// Puts one entry where it belongs.
    fn put<R: Read>(
        &mut self,
        member: &Member,
        path: &Path,
        content: &mut Members<R>,
    ) -> Result<(), Failure> {
        let text = path.display().to_string();
        let failed = |error: io::Error| Failure::of(&text, &error);
        let names = self.inside(path).ok_or_else(|| outside(&text, ""))?;
        let Some((name, above)) = names.split_last() else { return Ok(()) };
        let whole: PathBuf = names.iter().collect();
        self.settle(Some(&whole))?;
        let directory = self.parent(above).map_err(|error| refused(&text, error))?;
        let place = Place { directory, name };
        let mode = self.how.options.mode.unwrap_or(member.mode) & self.how.modes;
        let modified = member.modified;
        let owner = if self.how.options.owners {
            let nobody = || Failure::new(code::MALFORMED, format!("{text}: an owner that nobody can be"));
            Some(member.owner.ok_or_else(nobody)?)
        } else {
            self.how.owner
        };
        self.report.entries += 1;
        match member.kind {
            // A name that ends in a slash was a directory before directories had a type of their own.
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse
                if !path.as_os_str().as_bytes().ends_with(b"/") =>
            {
                self.file(place, member, (mode, owner), content).map_err(failed)
            }
            EntryType::Regular | EntryType::Directory => {
                self.folder(whole, &place, member, (mode, owner)).map_err(|errno| refused(&text, errno))
            }
            EntryType::Symlink => {
                let target = link_target(member).map_err(failed)?;
                self.symlink(&place, target, member, owner).map_err(|errno| failed(errno.into()))
            }
            EntryType::Link => {
                let target = link_target(member).map_err(failed)?;
                let leads = || format!(", a link to {}", target.display());
                let names = self.inside(target).ok_or_else(|| outside(&text, &leads()))?;
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
                mkfifoat(&*place.directory, place.name, Mode::S_IRUSR)
                    .and_then(|()| place.own(owner))
                    .map_err(|errno| failed(errno.into()))?;
                // By what was looked at: somebody may swap the name for a link.
                let (pipe, _) = look(&*place.directory, place.name).map_err(|errno| failed(errno.into()))?;
                fs::set_permissions(by_descriptor(&pipe), fs::Permissions::from_mode(mode))
                    .map_err(failed)?;
                place.set_modified(&modified).map_err(|errno| failed(errno.into()))
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
        if self.swept.len() < SWEPT && self.swept.insert(path.clone()) {
            sweep(&directory);
        }
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
                    own_directory(&made, self.how.owner)?;
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

    /// Those that are to be set.
    fn xattrs<'m>(&self, member: &'m Member) -> &'m [(Vec<u8>, Vec<u8>)] {
        if self.how.options.xattrs { &member.xattrs } else { &[] }
    }

    /// A file appears when it is whole.
    fn file<R: Read>(
        &mut self,
        place: Place<'_>,
        member: &Member,
        (mode, owner): (u32, Owner),
        content: &mut Members<R>,
    ) -> io::Result<()> {
        let mut draft = Draft::within(place.directory, place.name)?;
        match &member.parts {
            None => drop(copy_by(&mut self.buffer, content, &mut draft)?),
            Some(parts) => {
                for (offset, length) in parts {
                    draft.seek(SeekFrom::Start(*offset))?;
                    copy_by(&mut self.buffer, &mut content.take(*length), &mut draft)?;
                }
                draft.set_len(member.size)?;
            }
        }
        draft.set_modified(&member.modified)?;
        draft.commit_with(mode, owner, self.xattrs(member))?;
        self.report.files += 1;
        self.report.content += member.size;
        Ok(())
    }

    /// A directory that is there stays as it is, if it is not to become as the archive has it. Behind a link it always does.
    fn folder(
        &mut self,
        path: PathBuf,
        place: &Place<'_>,
        member: &Member,
        (mode, owner): (u32, Owner),
    ) -> Result<(), Errno> {
        match self.beneath(&path) {
            Ok(_) if self.how.options.overlay && place.is_directory()? => {}
            result => {
                match result {
                    Err(Errno::ENOENT) => place.clear()?,
                    Err(Errno::ENOTDIR) if !self.how.careful => place.clear()?,
                    result => return result.map(drop),
                }
                mkdirat(&*place.directory, place.name, Mode::S_IRWXU)?;
                if self.swept.len() < SWEPT {
                    self.swept.insert(path.clone());
                }
            }
        }
        let directory = self.beneath(&path)?;
        own_directory(&directory, owner)?;
        let (mode, modified) = (Mode::from_bits_truncate(mode), member.modified);
        let made = Unsettled { path, directory, mode, modified, xattrs: self.xattrs(member).to_vec() };
        if self.unsettled.len() == UNSETTLED {
            return made.settle();
        }
        self.unsettled.push(made);
        Ok(())
    }

    fn symlink(&self, place: &Place<'_>, target: &Path, member: &Member, owner: Owner) -> nix::Result<()> {
        place.clear()?;
        symlinkat(target, &*place.directory, place.name)?;
        place.own(owner)?;
        for (name, value) in self.xattrs(member) {
            let path = Path::new(&by_descriptor(&place.directory)).join(place.name);
            lsetxattr(path, name.as_slice(), value, XattrFlags::empty())
                .map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
        }
        // Not all filesystems have times of links.
        let _ = place.set_modified(&member.modified);
        Ok(())
    }
}

impl Place<'_> {
    /// Whether what has the name is a directory itself, and no link to one.
    fn is_directory(&self) -> nix::Result<bool> {
        let about = fstatat(&*self.directory, self.name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        Ok(SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR)
    }

    /// Gives what has the name, or the link that has it, to somebody.
    fn own(&self, owner: Owner) -> nix::Result<()> {
        let Some((uid, gid)) = owner else { return Ok(()) };
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        fchownat(&*self.directory, self.name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// Of what has the name, if that is a link of the link.
    fn set_modified(&self, time: &TimeSpec) -> nix::Result<()> {
        let flags = UtimensatFlags::NoFollowSymlink;
        utimensat(&*self.directory, self.name, &TimeSpec::UTIME_OMIT, time, flags)
    }

    /// Removes what has the name, but no directory.
    fn clear(&self) -> nix::Result<()> {
        match unlinkat(&*self.directory, self.name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn own_directory(directory: impl AsFd, owner: Owner) -> nix::Result<()> {
    let Some((uid, gid)) = owner else { return Ok(()) };
    fchown(directory, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
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

fn link_target(member: &Member) -> io::Result<&Path> {
    match member.link.as_slice() {
        [] => Err(io::Error::new(ErrorKind::InvalidData, "a link without a target")),
        link => Ok(Path::new(OsStr::from_bytes(link))),
    }
}
