//! Packs a file, or a directory with all below it, as a tar archive.
//!
//! Every name is opened relative to its open directory and never through a link, and all that is said of it is said of what
//! was opened. So whoever renames or swaps files meanwhile gets other files into the archive, but none of elsewhere. Only the
//! names of the directories on the way to the current file are kept, and those of files with several links.

use std::{
    collections::HashMap,
    ffi::{CStr, CString, OsStr},
    fs::File,
    io::Read,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Component, Path, PathBuf},
    vec,
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, Statx, StatxFlags, getxattr, listxattr, openat,
        readlinkat, seek, statx,
    },
    io::Errno,
};
use tar::EntryType;
use vm_types::guest::files::{FileError, PackOptions, PackReport, code};

use crate::{
    Failure, Output,
    draft::is_draft,
    look::{Mount, about, below, by_descriptor, kind_of, look, mount_of},
    pax::{BLOCK, Entry, Xattrs, storable},
    wire::{Archive, CopyError},
};

/// Contents by path, nothing for files that are left out.
pub type Replaced = HashMap<PathBuf, Option<Vec<u8>>>;

/// Directories within each other. Each is open while what is in it is packed.
const DEPTH: usize = 512;
/// The most that is remembered of the names of files with several links, in bytes. Beyond it such files are packed as if
/// they had one.
const LINKS: usize = 32 << 20;
/// Parts of a sparse file. All that is behind the last is packed with its holes.
const PARTS: usize = 1 << 16;
/// Files with smaller holes, all taken together, are packed with them, in bytes.
const HOLES: u64 = 64 << 10;
/// Files that say they have no more are read before their header is written, in bytes: a kernel's (/proc, /sys) say 0, or a
/// page, whatever they have.
const PAGE: u64 = 4 << 10;
/// The most that such a file may have, in bytes. It is kept in memory.
const UNTOLD: u64 = 16 << 20;
/// What may be told of warnings, in bytes as they are sent.
const WARNINGS: usize = 32 << 10;
/// The most that an extended attribute, or their list, may have (xattr(7)), in bytes.
const XATTR: usize = 64 << 10;

/// Packs `path`, under this name in the archive if there is one ([`PackOptions::name`] is the caller's affair). Contents in
/// `replaced`, by absolute path, are packed instead of the files' own; nothing stands for those that are left out.
///
/// # Errors
/// What cannot be read, a receiver that has gone.
pub fn pack(
    path: &Path,
    name: Option<&OsStr>,
    options: &PackOptions,
    replaced: Replaced,
    output: &Output,
) -> Result<PackReport, Failure> {
    Packer::new(plain(path)?, options, replaced, output)?.run(name)
}

/// Packs those entries of a directory whose paths `next` gives, until it gives none. Otherwise as [`pack`].
///
/// # Errors
/// Those of `next`, what cannot be read, a receiver that has gone.
pub fn pack_selected(
    directory: &Path,
    options: &PackOptions,
    replaced: Replaced,
    mut next: impl FnMut() -> Result<Option<Vec<u8>>, Failure>,
    output: &Output,
) -> Result<PackReport, Failure> {
    let mut packer = Packer::new(plain(directory)?, options, replaced, output)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = openat(CWD, directory, flags, Mode::empty()).map_err(|errno| packer.failed(errno))?;
    while let Some(path) = next()? {
        packer.name = path;
        if packer.is_whiteout() {
            packer.leave_whiteout();
            continue;
        }
        let found = match below(&top, &packer.name, OFlags::PATH) {
            Ok(Some(file)) => about(&file).map(|about| Some((file, about))),
            Ok(None) => Ok(None),
            Err(errno) => Err(errno),
        };
        match found {
            Ok(Some((file, about))) if kind_of(&about) == FileType::Directory => {
                if !packer.is_excluded() {
                    packer.directory(&file, &about)?;
                }
            }
            Ok(Some((file, about))) => packer.put(&file, &about)?,
            Ok(None) => packer.vanished(),
            Err(errno) => return Err(packer.failed(errno)),
        }
    }
    packer.archive.finish()?;
    Ok(packer.report)
}

/// A path without dots and doubled slashes. One that goes up means something only to who follows links.
fn plain(path: &Path) -> Result<PathBuf, Failure> {
    let refused = || Failure::new(code::REQUEST, format!("{}: goes up by `..`", path.display()));
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(refused());
    }
    Ok(path.components().collect())
}

struct Packer<'a> {
    archive: Archive<'a>,
    /// What is packed.
    base: PathBuf,
    /// Its name in the archive.
    root: Vec<u8>,
    /// What the names of entries below it begin with, in bytes.
    prefix: usize,
    /// The current entry's, in the archive.
    name: Vec<u8>,
    options: &'a PackOptions,
    /// Whether only what is in it.
    excluded: HashMap<PathBuf, bool>,
    replaced: Replaced,
    /// The mount that must not be left.
    home: Option<Mount>,
    /// Files with links that have not been met, by device and number: how many, and the first's name.
    links: HashMap<(u32, u32, u64), (u32, Vec<u8>)>,
    /// Bytes of these names.
    links_size: usize,
    report: PackReport,
    /// Bytes of the warnings.
    told: usize,
    /// For attributes.
    buffer: Vec<u8>,
}

/// A directory that is being packed.
struct Level {
    directory: OwnedFd,
    names: vec::IntoIter<CString>,
    /// Bytes of its own name in the archive, the slash included.
    name: usize,
}

impl<'a> Packer<'a> {
    fn new(
        base: PathBuf,
        options: &'a PackOptions,
        replaced: Replaced,
        output: &'a Output,
    ) -> Result<Self, Failure> {
        let mut excluded = HashMap::new();
        for text in &options.exclude {
            excluded.insert(plain(Path::new(text))?, text.ends_with('/'));
        }
        Ok(Self {
            archive: Archive::new(output),
            base,
            root: Vec::new(),
            prefix: 0,
            name: Vec::new(),
            options,
            excluded,
            replaced,
            home: None,
            links: HashMap::new(),
            links_size: 0,
            report: PackReport::default(),
            told: 0,
            buffer: vec![0; XATTR],
        })
    }

    fn run(mut self, name: Option<&OsStr>) -> Result<PackReport, Failure> {
        let (file, about) = look(CWD, &self.base).map_err(|errno| self.failed(errno))?;
        self.home = self.options.one_filesystem.then(|| mount_of(&about));
        if kind_of(&about) != FileType::Directory {
            self.root = match name {
                Some(name) => name.as_bytes().to_vec(),
                // A path that is not one of a directory has a last name.
                None => self.base.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default(),
            };
            self.name.clone_from(&self.root);
            self.put(&file, &about)?;
        } else {
            (self.root, self.prefix) = match name {
                Some(name) => ([name.as_bytes(), b"/"].concat(), name.len() + 1),
                None => (b"./".to_vec(), 0),
            };
            self.name.clone_from(&self.root);
            let mut levels = Vec::new();
            self.enter(file, &about, &mut levels)?;
            if let Some(first) = levels.last_mut() {
                first.name = self.prefix;
            }
            while let Some(level) = levels.last_mut() {
                self.name.truncate(level.name);
                let Some(name) = level.names.next() else {
                    levels.pop();
                    continue;
                };
                self.name.extend_from_slice(name.to_bytes());
                if self.is_whiteout() {
                    self.leave_whiteout();
                    continue;
                }
                match look(&level.directory, &name) {
                    Ok((file, about)) if kind_of(&about) == FileType::Directory => {
                        self.enter(file, &about, &mut levels)?;
                    }
                    Ok((file, about)) => self.put(&file, &about)?,
                    Err(Errno::NOENT | Errno::STALE) => self.vanished(),
                    Err(errno) => return Err(self.failed(errno)),
                }
            }
        }
        self.archive.finish()?;
        Ok(self.report)
    }

    /// Whether the current entry would hide another one in an image's layer, as far down as its name is given.
    fn is_whiteout(&self) -> bool {
        let names = || self.name[self.prefix..].split(|byte| *byte == b'/');
        self.options.generalize && names().any(|name| name.starts_with(b".wh."))
    }

    fn leave_whiteout(&mut self) {
        self.warn(
            code::LEFT_OUT,
            "is left out: in an image, names that begin with `.wh.` say that a file is gone",
        );
    }

    /// Where the current entry is.
    fn path(&self) -> PathBuf {
        if self.name == self.root {
            return self.base.clone();
        }
        let name = &self.name[self.prefix..];
        self.base.join(OsStr::from_bytes(name.strip_suffix(b"/").unwrap_or(name)))
    }

    fn failed(&self, errno: Errno) -> Failure {
        Failure::of(&self.path().display().to_string(), &errno.into())
    }

    fn warn(&mut self, code: &str, what: &str) {
        let warning =
            FileError { code: code.to_owned(), message: format!("{}: {what}", self.path().display()) };
        let size = serde_json::to_vec(&warning).map_or(WARNINGS, |text| text.len() + 1);
        if self.report.more == 0 && self.told + size <= WARNINGS {
            self.told += size;
            self.report.warnings.push(warning);
        } else {
            self.report.more += 1;
        }
    }

    fn vanished(&mut self) {
        self.warn(code::VANISHED, "removed meanwhile, left out");
    }

    /// Whether the current entry is not to be packed at all.
    fn is_excluded(&self) -> bool {
        self.excluded.get(&self.path()) == Some(&false) || self.replaced.get(&self.path()) == Some(&None)
    }

    fn is_elsewhere(&self, about: &Statx) -> bool {
        self.home.is_some_and(|home| home != mount_of(about))
    }

    /// Packs the current entry, a directory, and goes into it where what is in it is wanted.
    fn enter(&mut self, file: OwnedFd, about: &Statx, levels: &mut Vec<Level>) -> Result<(), Failure> {
        // What was asked for is packed, whatever is excluded.
        if !levels.is_empty() && self.is_excluded() {
            return Ok(());
        }
        self.directory(&file, about)?;
        let emptied = self.excluded.get(&self.path()) == Some(&true);
        if emptied || self.is_elsewhere(about) {
            return Ok(());
        }
        if levels.len() == DEPTH {
            self.warn(code::LEFT_OUT, "what is in it is left out, it is too deep");
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(&file, ".", flags, Mode::empty()).map_err(|errno| self.failed(errno))?;
        let names = match names_in(&directory) {
            Ok(names) => names.into_iter(),
            // It was removed since it was opened.
            Err(Errno::NOENT) => Vec::new().into_iter(),
            Err(errno) => return Err(self.failed(errno)),
        };
        levels.push(Level { directory, names, name: self.name.len() });
        Ok(())
    }

    /// Packs the current entry, a directory, without what is in it.
    fn directory(&mut self, file: &OwnedFd, about: &Statx) -> Result<(), Failure> {
        if !self.name.ends_with(b"/") {
            self.name.push(b'/');
        }
        // Those of what is mounted say nothing of the directory below.
        let xattrs = if self.is_elsewhere(about) { Vec::new() } else { self.xattrs(file)? };
        self.header(about, EntryType::Directory, b"", 0, &xattrs, None)
    }

    /// Packs the current entry, which is no directory.
    fn put(&mut self, file: &OwnedFd, about: &Statx) -> Result<(), Failure> {
        if self.is_excluded() || self.is_elsewhere(about) {
            return Ok(());
        }
        let kind = match kind_of(about) {
            FileType::RegularFile => EntryType::Regular,
            FileType::Symlink => EntryType::Symlink,
            FileType::CharacterDevice => EntryType::Char,
            FileType::BlockDevice => EntryType::Block,
            FileType::Fifo => EntryType::Fifo,
            // They mean nothing without the program behind them.
            FileType::Socket => return Ok(()),
            FileType::Directory | FileType::Unknown => {
                self.warn(code::LEFT_OUT, "of a kind that no archive has");
                return Ok(());
            }
        };
        if kind.is_file()
            && let Some(Some(content)) = self.replaced.remove(&self.path())
        {
            self.header(about, kind, b"", content.len() as u64, &[], None)?;
            self.archive.write(&content)?;
            return self.archive.fill();
        }
        if about.stx_nlink > 1
            && (!self.options.selected || self.options.links)
            && let Some(first) = self.linked(about)
        {
            return self.header(about, EntryType::Link, &first, 0, &[], None);
        }
        let xattrs = self.xattrs(file)?;
        match kind {
            EntryType::Regular => self.content(file, about, &xattrs),
            EntryType::Symlink => {
                let target = readlinkat(file, "", Vec::new()).map_err(|errno| self.failed(errno))?;
                self.header(about, kind, target.to_bytes(), 0, &xattrs, None)
            }
            _ => self.header(about, kind, b"", 0, &xattrs, None),
        }
    }

    fn header(
        &mut self,
        about: &Statx,
        kind: EntryType,
        link: &[u8],
        size: u64,
        xattrs: &[(Vec<u8>, Vec<u8>)],
        sparse: Option<u64>,
    ) -> Result<(), Failure> {
        self.report.entries += 1;
        if kind == EntryType::Regular {
            self.report.files += 1;
            self.report.content += sparse.unwrap_or(size);
        }
        self.archive.entry(&Entry {
            name: &self.name,
            kind,
            mode: about.stx_mode.into(),
            uid: about.stx_uid,
            gid: about.stx_gid,
            mtime: (about.stx_mtime.tv_sec, about.stx_mtime.tv_nsec),
            link,
            size,
            device: (about.stx_rdev_major, about.stx_rdev_minor),
            xattrs,
            sparse,
        })
    }

    /// The name under which the file is in the archive already. If it is not, it will be under the current one.
    fn linked(&mut self, about: &Statx) -> Option<Vec<u8>> {
        let key = (about.stx_dev_major, about.stx_dev_minor, about.stx_ino);
        if let Some((left, first)) = self.links.get_mut(&key) {
            *left -= 1;
            let first = if *left == 0 { self.links.remove(&key)?.1 } else { return Some(first.clone()) };
            self.links_size -= first.len();
            return Some(first);
        }
        if self.links_size + self.name.len() <= LINKS {
            self.links_size += self.name.len();
            self.links.insert(key, (about.stx_nlink - 1, self.name.clone()));
        } else {
            self.warn(
                code::LEFT_OUT,
                "its hard links are files of their own, there are too many to remember",
            );
        }
        None
    }

    /// Header and content of a regular file.
    fn content(
        &mut self,
        file: &OwnedFd,
        about: &Statx,
        xattrs: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<(), Failure> {
        let size = about.stx_size;
        // Not by its name, which may be another file's by now.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file =
            openat(CWD, by_descriptor(file), flags, Mode::empty()).map_err(|errno| self.failed(errno))?;
        let mut file = File::from(file);
        let parts = match size > PAGE && self.options.sparse && about.stx_blocks.saturating_mul(512) < size {
            true => parts(&file, size).map_err(|errno| self.failed(errno))?,
            false => None,
        };
        let mut whole = true;
        if size <= PAGE {
            let mut content = Vec::new();
            let read = (&mut file).take(UNTOLD).read_to_end(&mut content);
            read.map_err(|error| Failure::of(&self.path().display().to_string(), &error))?;
            self.header(about, EntryType::Regular, b"", content.len() as u64, xattrs, None)?;
            self.archive.write(&content)?;
            if content.len() as u64 == UNTOLD {
                self.warn(
                    code::LEFT_OUT,
                    "said that it is empty: what is behind its first 16 MiB is left out",
                );
            }
        } else if let Some(parts) = parts {
            let map = map_of(&parts);
            let stored = map.len() as u64 + parts.iter().map(|(_, length)| length).sum::<u64>();
            self.header(about, EntryType::Regular, b"", stored, xattrs, Some(size))?;
            self.archive.write(&map)?;
            for (offset, length) in parts {
                if length > 0 {
                    seek(&file, SeekFrom::Start(offset)).map_err(|errno| self.failed(errno))?;
                    whole &= self.copy(&mut file, length)?;
                }
            }
        } else {
            self.header(about, EntryType::Regular, b"", size, xattrs, None)?;
            whole = self.copy(&mut file, size)?;
        }
        self.archive.fill()?;
        let after = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS);
        let after = after.map_err(|errno| self.failed(errno))?;
        let state = |about: &Statx| (about.stx_size, about.stx_mtime.tv_sec, about.stx_mtime.tv_nsec);
        if !whole || state(&after) != state(about) {
            self.warn(code::CHANGED, "changed while it was read");
        }
        Ok(())
    }

    /// Copies so much of a file. Where it has become shorter, zeros are in its place, as its header tells a length.
    fn copy(&mut self, file: &mut File, length: u64) -> Result<bool, Failure> {
        let copied = self.archive.copy(file, length).map_err(|error| match error {
            CopyError::Gone(failure) => failure,
            CopyError::Read(error) => Failure::of(&self.path().display().to_string(), &error),
        })?;
        self.archive.zeros(length - copied)?;
        Ok(copied == length)
    }

    /// Extended attributes that say something of the file, rather than of its filesystem, by name.
    fn xattrs(&mut self, file: &OwnedFd) -> Result<Xattrs, Failure> {
        let way = by_descriptor(file);
        let length = match listxattr(&way, self.buffer.as_mut_slice()) {
            Ok(0) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Vec::new()),
            Ok(length) => length,
            Err(errno) => return Err(self.failed(errno)),
        };
        let names = self.buffer[..length].split_inclusive(|byte| *byte == 0);
        let mut names: Vec<CString> = names
            .filter_map(|name| CStr::from_bytes_with_nul(name).ok())
            .filter(|name| is_wanted(name))
            .map(CStr::to_owned)
            .collect();
        names.sort_unstable();
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            if !storable(&name) {
                self.warn(
                    code::LEFT_OUT,
                    &format!("its attribute {name:?} has a name that no archive can have"),
                );
                continue;
            }
            match getxattr(&way, name.as_c_str(), self.buffer.as_mut_slice()) {
                Ok(length) => found.push((name.into_bytes(), self.buffer[..length].to_vec())),
                // Removed meanwhile; one that cannot be read at all is none to others either.
                Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(self.failed(errno)),
            }
        }
        Ok(found)
    }
}

/// Attributes of the namespace `system` are the filesystem's own, but for access lists.
fn is_wanted(name: &CStr) -> bool {
    let name = name.to_bytes();
    !name.starts_with(b"system.") || name.starts_with(b"system.posix_acl_")
}

/// Sorted, without files that are being made.
fn names_in(directory: &OwnedFd) -> rustix::io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") && !is_draft(name.to_bytes()) {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Where a file has data, as offsets and lengths, the last of which reaches its end; `None` if its holes are not worth it.
fn parts(file: &File, size: u64) -> rustix::io::Result<Option<Vec<(u64, u64)>>> {
    let mut parts = Vec::new();
    let (mut at, mut data) = (0, 0);
    while at < size {
        let begin = match seek(file, SeekFrom::Data(at)) {
            Ok(begin) if begin < size => begin,
            // A hole reaches the end.
            Ok(_) | Err(Errno::NXIO) => break,
            // A filesystem without holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let end = match parts.len() + 1 < PARTS {
            true => seek(file, SeekFrom::Hole(begin))?.min(size),
            false => size,
        };
        parts.push((begin, end - begin));
        data += end - begin;
        at = end;
    }
    seek(file, SeekFrom::Start(0))?;
    if size - data < HOLES {
        return Ok(None);
    }
    // As GNU tar does it: an empty part at the end of a file that ends in a hole.
    if at < size || parts.is_empty() {
        parts.push((size, 0));
    }
    Ok(Some(parts))
}

/// What stands before the content: the number of parts, then offset and length of each, filled up to a block.
fn map_of(parts: &[(u64, u64)]) -> Vec<u8> {
    let mut map = format!("{}\n", parts.len());
    for (offset, length) in parts {
        map.push_str(&format!("{offset}\n{length}\n"));
    }
    let mut map = map.into_bytes();
    map.resize((map.len() as u64).next_multiple_of(BLOCK) as usize, 0);
    map
}
