//! The directory that a build takes files from. It is read relative to its open descriptor: a symbolic link is followed as far as
//! it stays inside, so nothing of the rest of the host comes into an image, whatever somebody puts there meanwhile.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::ffi::OsStrExt, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2, readlinkat,
        statat,
    },
    io::Errno,
};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::ignore::{Ignore, cleaned, fits, is_pattern, pattern};

/// How deep directories are nested; a path is no longer.
const DEPTH: usize = 1024;
/// The longest file that says what to leave out, in bytes.
const IGNORE_MAX: u64 = 1 << 20;
/// How often openat2(2) is asked, where something is renamed meanwhile.
const TRIES: usize = 16;
/// Bytes that are read at once.
const PIECE: usize = 256 << 10;

/// Why files cannot be taken from the directory.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// Something of it cannot be read.
    #[error("could not read {}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `.dockerignore` has a line that is no pattern.
    #[error("{}, line {line}: {problem}", path.display())]
    Ignore {
        /// The file.
        path: PathBuf,
        /// Which line.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A source that is none of the directory.
    #[error("{name} is outside of the build's directory")]
    Outside {
        /// As it is written, or the link that leads there.
        name: String,
    },
    /// No such file.
    #[error("the build's directory has no {name}{}", if *ignored { ", for .dockerignore leaves it out" } else { "" })]
    Missing {
        /// As it is written.
        name: String,
        /// It is there, and left out.
        ignored: bool,
    },
    /// A pattern that is none.
    #[error("{name} is no pattern: {problem}")]
    Pattern {
        /// As it is written.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Neither file, directory nor link.
    #[error("{} is neither file, directory nor link", path.display())]
    Kind {
        /// Which.
        path: PathBuf,
    },
    /// It is another file than a moment ago.
    #[error("{} has changed while it was read", path.display())]
    Changed {
        /// Which.
        path: PathBuf,
    },
}

impl ContextError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Read { .. } => "is the path right, and may the daemon read it?".into(),
            Self::Ignore { .. } => "patterns are such as *.log, **/target and !keep.log".into(),
            Self::Outside { .. } => "build with a directory that has it, or copy it there first".into(),
            Self::Missing { ignored: true, .. } => "take it back with a line that begins with !".into(),
            Self::Missing { .. } => "sources are relative to the directory that is given to the build".into(),
            Self::Pattern { .. } => "patterns are such as *.txt and src/[a-z]*.rs".into(),
            Self::Kind { .. } => "leave it out with .dockerignore".into(),
            Self::Changed { .. } => "build again when nobody writes to it".into(),
        }
    }
}

/// What a file to be copied is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum Content {
    /// With its SHA-256, as hexadecimal digits, and its size in bytes.
    File { digest: String, size: u64 },
    /// A directory.
    Directory,
    /// Where it leads.
    Link(Vec<u8>),
    /// What a regular file has in it that is none of the directory's.
    Text(String),
}

/// A file to be copied. Two that are equal in what is serialized make the same image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Item {
    /// Below the target's directory; empty for that itself.
    #[serde(serialize_with = "as_bytes")]
    pub(super) name: PathBuf,
    /// What it is.
    pub(super) content: Content,
    /// Permission bits.
    pub(super) mode: u32,
    /// Where it is in the build's directory, without links.
    #[serde(skip)]
    source: PathBuf,
    /// Seconds since the Unix epoch.
    #[serde(skip)]
    modified: u64,
}

impl Item {
    /// A file that is written in the build's file. It is as old as can be: the same text makes the same image.
    pub(super) fn written(name: &str, text: String) -> Self {
        Self {
            name: name.into(),
            content: Content::Text(text),
            mode: 0o644,
            source: PathBuf::new(),
            modified: 0,
        }
    }
}

/// A name need not be UTF-8, which serde asks of a path.
fn as_bytes<S: serde::Serializer>(name: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(name.as_os_str().as_bytes())
}

/// Something in the directory.
#[derive(Debug, Clone)]
struct Entry {
    path: PathBuf,
    kind: FileType,
    mode: u32,
    modified: u64,
}

impl Entry {
    fn new(path: PathBuf, about: &Stat) -> Self {
        Self {
            path,
            kind: FileType::from_raw_mode(about.st_mode),
            mode: about.st_mode & 0o7777,
            modified: u64::try_from(about.st_mtime).unwrap_or_default(),
        }
    }
}

/// The directory. Its functions block.
#[derive(Debug)]
pub(super) struct Context {
    /// As it is called, for errors.
    path: PathBuf,
    top: OwnedFd,
    ignore: Ignore,
    /// All that is not left out, sorted by path.
    entries: OnceLock<Vec<Entry>>,
}

impl Context {
    /// Opens the directory, and reads what it keeps to itself: beside the build file `FILE.dockerignore`, else `.dockerignore`
    /// in the directory.
    ///
    /// # Errors
    /// It is none, or cannot be read.
    pub(super) fn open(path: &Path, file: &Path) -> Result<Self, ContextError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = openat(CWD, path, flags, Mode::empty())
            .map_err(|errno| ContextError::Read { path: path.to_owned(), source: errno.into() })?;
        let mut own = file.as_os_str().to_owned();
        own.push(".dockerignore");
        let mut ignore = Ignore::default();
        for place in [PathBuf::from(own), path.join(".dockerignore")] {
            let text = match text(&place, IGNORE_MAX) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(ContextError::Read { path: place, source }),
            };
            ignore = Ignore::parse(&text).map_err(|(line, problem)| ContextError::Ignore {
                path: place,
                line,
                problem,
            })?;
            break;
        }
        Ok(Self { path: path.to_owned(), top, ignore, entries: OnceLock::new() })
    }

    /// What `sources` name, with the names they get in the target's directory. Contents of directories are copied, not
    /// the directories themselves. `renamed` is the name that a single file gets.
    ///
    /// # Errors
    /// A source that is not there, or outside; what cannot be read.
    pub(super) fn select(
        &self,
        sources: &[String],
        renamed: Option<&OsStr>,
    ) -> Result<Vec<Item>, ContextError> {
        let mut items = Vec::new();
        for source in sources {
            let name = || source.clone();
            let clean = cleaned(source).ok_or_else(|| ContextError::Outside { name: name() })?;
            let found = if is_pattern(&clean) {
                let pattern =
                    pattern(&clean).map_err(|problem| ContextError::Pattern { name: name(), problem })?;
                let all = self.entries()?.iter().filter(|entry| fits(&pattern, &entry.path));
                let found: Vec<_> = all.map(|entry| entry.path.clone()).collect();
                if found.is_empty() {
                    return Err(ContextError::Missing { name: name(), ignored: false });
                }
                found
            } else {
                vec![PathBuf::from(clean)]
            };
            for path in found {
                self.take(source, &path, renamed, &mut items)?;
            }
        }
        // One that is named twice is what it was named last.
        items.reverse();
        items.sort_by(|a, b| a.name.cmp(&b.name));
        items.dedup_by(|later, first| later.name == first.name);
        Ok(items)
    }

    /// Whether sources are one file, which a target without a slash renames.
    ///
    /// # Errors
    /// As of [`Context::select`].
    pub(super) fn is_one_file(&self, sources: &[String]) -> Result<bool, ContextError> {
        let [source] = sources else { return Ok(false) };
        match cleaned(source) {
            Some(clean) if !is_pattern(&clean) => {
                Ok(self.followed(source, Path::new(&clean))?.kind != FileType::Directory)
            }
            _ => {
                let items = self.select(sources, None)?;
                Ok(matches!(items.as_slice(), [item] if item.content != Content::Directory))
            }
        }
    }

    /// Adds one source.
    fn take(
        &self,
        source: &str,
        path: &Path,
        renamed: Option<&OsStr>,
        items: &mut Vec<Item>,
    ) -> Result<(), ContextError> {
        let entry = self.followed(source, path)?;
        let may_have_some = entry.kind == FileType::Directory && self.ignore.takes_back();
        // Neither by its name nor by that of a link which leads there.
        let left_out = self.ignore.leaves_out(path) || self.ignore.leaves_out(&entry.path);
        if left_out && !may_have_some {
            return Err(ContextError::Missing { name: source.to_owned(), ignored: true });
        }
        if entry.kind != FileType::Directory {
            let name = renamed.or_else(|| path.file_name()).unwrap_or_default();
            items.push(self.item(entry, PathBuf::from(name))?);
            return Ok(());
        }
        items.push(self.item(entry.clone(), PathBuf::new())?);
        let below = |other: &&Entry| other.path != entry.path && other.path.starts_with(&entry.path);
        for other in self.entries()?.iter().filter(below) {
            let name = other.path.strip_prefix(&entry.path).unwrap_or(&other.path).to_owned();
            items.push(self.item(other.clone(), name)?);
        }
        Ok(())
    }

    /// What a path leads to, with the place that it has without links.
    fn followed(&self, source: &str, path: &Path) -> Result<Entry, ContextError> {
        let file = self.open_at(path, OFlags::PATH, ResolveFlags::BENEATH).map_err(|errno| match errno {
            Errno::XDEV | Errno::LOOP => ContextError::Outside { name: source.to_owned() },
            Errno::NOENT | Errno::NOTDIR => ContextError::Missing { name: source.to_owned(), ignored: false },
            errno => self.unread(path, errno),
        })?;
        let about = fstat(&file).map_err(|errno| self.unread(path, errno))?;
        let place =
            |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd)));
        let real = place(&self.top).and_then(|top| Ok((place(&file)?, top)));
        let (real, top) = real.map_err(|source| ContextError::Read { path: self.path.join(path), source })?;
        let inside =
            real.strip_prefix(&top).map_err(|_| ContextError::Outside { name: source.to_owned() })?;
        Ok(Entry::new(inside.to_owned(), &about))
    }

    fn item(&self, entry: Entry, name: PathBuf) -> Result<Item, ContextError> {
        let unread = |errno| self.unread(&entry.path, errno);
        let content = match entry.kind {
            FileType::Directory => Content::Directory,
            FileType::Symlink => {
                let parent = entry.path.parent().unwrap_or(Path::new(""));
                let directory = self.open_plain(parent, OFlags::PATH | OFlags::DIRECTORY).map_err(unread)?;
                let last = entry.path.file_name().unwrap_or_default();
                Content::Link(readlinkat(&directory, last, Vec::new()).map_err(unread)?.into_bytes())
            }
            FileType::RegularFile => {
                let mut file = self.file(&entry.path)?;
                let mut hashed = Hashed { to: io::sink(), hasher: Sha256::new() };
                let size = copy(&mut file, &mut hashed, u64::MAX)
                    .map_err(|source| ContextError::Read { path: self.path.join(&entry.path), source })?;
                Content::File { digest: hashed.digest(), size }
            }
            _ => return Err(ContextError::Kind { path: self.path.join(&entry.path) }),
        };
        Ok(Item { name, content, mode: entry.mode, source: entry.path, modified: entry.modified })
    }

    /// Writes items as a tar archive. Whoever unpacks it says whose they are.
    ///
    /// # Errors
    /// What cannot be read, has changed since it was selected, or cannot be written.
    pub(super) fn archive(&self, items: &[Item], to: impl Write) -> Result<(), ContextError> {
        let mut tar = tar::Builder::new(to);
        for item in items {
            let path = self.path.join(&item.source);
            let failed = |source| ContextError::Read { path: path.clone(), source };
            let mut header = tar::Header::new_gnu();
            header.set_mode(item.mode);
            header.set_mtime(item.modified);
            header.set_size(0);
            match &item.content {
                Content::Directory => {
                    header.set_entry_type(tar::EntryType::Directory);
                    let name = if item.name.as_os_str().is_empty() { Path::new("./") } else { &item.name };
                    tar.append_data(&mut header, name, io::empty()).map_err(failed)?;
                }
                Content::Link(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    tar.append_link(&mut header, &item.name, OsStr::from_bytes(target)).map_err(failed)?;
                }
                Content::Text(text) => {
                    header.set_size(text.len() as u64);
                    tar.append_data(&mut header, &item.name, text.as_bytes()).map_err(failed)?;
                }
                Content::File { digest, size } => {
                    header.set_size(*size);
                    let mut file = Tee { from: self.file(&item.source)?.take(*size), hasher: Sha256::new() };
                    tar.append_data(&mut header, &item.name, &mut file).map_err(failed)?;
                    if file.digest() != *digest {
                        return Err(ContextError::Changed { path });
                    }
                }
            }
        }
        let ended = tar.into_inner().and_then(|mut to| to.flush());
        ended.map_err(|source| ContextError::Read { path: self.path.clone(), source })
    }

    /// A regular file, which must not be waited for.
    fn file(&self, path: &Path) -> Result<File, ContextError> {
        let file = self.open_plain(path, OFlags::RDONLY | OFlags::NONBLOCK);
        let file = File::from(file.map_err(|errno| self.unread(path, errno))?);
        match file.metadata() {
            Ok(about) if about.is_file() => Ok(file),
            Ok(_) => Err(ContextError::Changed { path: self.path.join(path) }),
            Err(source) => Err(ContextError::Read { path: self.path.join(path), source }),
        }
    }

    /// All that is not left out.
    fn entries(&self) -> Result<&[Entry], ContextError> {
        if let Some(entries) = self.entries.get() {
            return Ok(entries);
        }
        let mut entries = Vec::new();
        self.walk(Path::new(""), 0, &mut entries)?;
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(self.entries.get_or_init(|| entries))
    }

    fn walk(&self, path: &Path, depth: usize, entries: &mut Vec<Entry>) -> Result<(), ContextError> {
        let unread = |errno| self.unread(path, errno);
        if depth == DEPTH {
            return Err(unread(Errno::NAMETOOLONG));
        }
        let directory = self.open_plain(path, OFlags::RDONLY | OFlags::DIRECTORY).map_err(unread)?;
        for entry in Dir::read_from(&directory).map_err(unread)? {
            let entry = entry.map_err(unread)?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let inner = path.join(OsStr::from_bytes(name.to_bytes()));
            let out = self.ignore.leaves_out(&inner);
            if out && !self.ignore.takes_back() {
                continue;
            }
            let about = match statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(about) => about,
                // Removed since the directory was listed.
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(self.unread(&inner, errno)),
            };
            let found = Entry::new(inner.clone(), &about);
            let goes_on = found.kind == FileType::Directory;
            if !out {
                entries.push(found);
            }
            if goes_on {
                self.walk(&inner, depth + 1, entries)?;
            }
        }
        Ok(())
    }

    /// Opens what is there under a path without links.
    fn open_plain(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        self.open_at(path, flags, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
    }

    fn open_at(&self, path: &Path, flags: OFlags, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let (flags, resolve) = (flags | OFlags::CLOEXEC, resolve | ResolveFlags::NO_MAGICLINKS);
        for _ in 0..TRIES {
            match openat2(&self.top, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN) => {}
                result => return result,
            }
        }
        Err(Errno::AGAIN)
    }

    fn unread(&self, path: &Path, errno: Errno) -> ContextError {
        ContextError::Read { path: self.path.join(path), source: errno.into() }
    }
}

/// A small file's text.
///
/// # Errors
/// It cannot be read, is too long, or no text.
pub(super) fn text(path: &Path, most: u64) -> io::Result<String> {
    // A pipe must not be waited for.
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    let mut text = String::new();
    file.take(most + 1).read_to_string(&mut text)?;
    if text.len() as u64 > most {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {most} bytes")));
    }
    Ok(text)
}

fn copy(from: &mut impl Read, to: &mut impl Write, most: u64) -> io::Result<u64> {
    let mut from = io::BufReader::with_capacity(PIECE, from.take(most));
    io::copy(&mut from, to)
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hashes what is written.
struct Hashed<W> {
    to: W,
    hasher: Sha256,
}

impl<W> Hashed<W> {
    fn digest(self) -> String {
        hex(self.hasher)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Hashes what is read.
struct Tee<R> {
    from: R,
    hasher: Sha256,
}

impl<R> Tee<R> {
    fn digest(self) -> String {
        hex(self.hasher)
    }
}

impl<R: Read> Read for Tee<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.from.read(buffer)?;
        self.hasher.update(&buffer[..length]);
        Ok(length)
    }
}

#[cfg(test)]
#[path = "context_tests.rs"]
mod tests;
