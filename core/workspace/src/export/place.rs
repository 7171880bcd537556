//! Writing below a directory of the host that its owner works in at the same time.
//!
//! Nothing is opened through a symbolic link. Content gets its name in one step. What it replaces is exchanged with it and looked at
//! afterwards: if that is no longer what was compared, it is put back, so that an edit made in between is not lost.

use std::{
    cell::Cell,
    collections::HashSet,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{
        AtFlags, Dir, Mode, OFlags, RenameFlags, ResolveFlags, Stat, fchmod, fstat, linkat, mkdirat, open,
        openat, openat2, readlinkat, renameat, renameat_with, statat, symlinkat, unlinkat,
    },
    io::Errno,
};
use sha2::{Digest, Sha256};

use crate::{Cancel, export::ExportError, text::shown};

use super::fetch::copy_data;

/// How often openat2(2) is asked for one directory while somebody renames others.
const TRIES: usize = 16;
/// How much is read at once, in bytes.
const PIECE: usize = 256 << 10;

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing.
    Absent,
    /// Nothing, and nothing can be: on the way there is something that is no directory.
    Blocked,
    Directory,
    File {
        sha256: [u8; 32],
        /// Permission bits.
        mode: u32,
        /// It has no other name, here or elsewhere on the filesystem.
        alone: bool,
        key: Key,
    },
    Link {
        target: Vec<u8>,
        key: Key,
    },
    /// A device, pipe or socket.
    Other,
}

impl Found {
    /// Of a file or link.
    pub(super) fn key(&self) -> Option<Key> {
        match self {
            Self::File { key, .. } | Self::Link { key, .. } => Some(*key),
            Self::Absent | Self::Blocked | Self::Directory | Self::Other => None,
        }
    }
}

/// Tells one state of a file from another; a rename does not change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    device: u64,
    inode: u64,
    kind: u32,
    size: i64,
    mtime: (i64, i64),
}

impl Key {
    #[expect(clippy::unnecessary_cast, reason = "the fields' types differ between platforms")]
    fn of(about: &Stat) -> Self {
        Self {
            device: about.st_dev,
            inode: about.st_ino,
            kind: about.st_mode & 0o170_000,
            size: about.st_size as i64,
            mtime: (about.st_mtime as i64, about.st_mtime_nsec as i64),
        }
    }
}

/// What is put at a path.
#[derive(Debug, Clone, Copy)]
pub(super) enum New<'a> {
    File { content: &'a Path, mode: u32 },
    Link { target: &'a [u8] },
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    /// What is there is not what was found before. It was left as it is.
    Changed,
}

/// A directory of the host.
#[derive(Debug)]
pub(super) struct Place {
    top: OwnedFd,
}

impl Place {
    /// Opens a directory; the way to it may have links.
    ///
    /// # Errors
    /// It is not there, is no directory, or may not be opened.
    pub(super) fn open(top: &Path) -> Result<Self, ExportError> {
        open(top, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map(|top| Self { top })
            .map_err(|error| ExportError::Host {
                action: "open",
                path: top.display().to_string(),
                source: error.into(),
            })
    }

    /// Looks at a path, and reads the file that is there.
    pub(super) fn look(&self, path: &[u8], cancel: &Cancel) -> Result<Found, ExportError> {
        self.read(path, &mut io::sink(), cancel)
    }

    /// The same, and copies the file.
    pub(super) fn copy(&self, path: &[u8], to: &Path, cancel: &Cancel) -> Result<Found, ExportError> {
        let made = File::create(to);
        let mut to =
            made.map_err(|source| ExportError::Scratch { action: "write", path: to.to_owned(), source })?;
        self.read(path, &mut to, cancel)
    }

    fn read(&self, path: &[u8], to: &mut dyn Write, cancel: &Cancel) -> Result<Found, ExportError> {
        let failed = |errno: Errno| self.failed("read", path, errno);
        let (above, name) = split(path);
        let directory = match self.enter(above) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => return Ok(Found::Absent),
            Err(Errno::LOOP | Errno::NOTDIR) => return Ok(Found::Blocked),
            Err(errno) => return Err(failed(errno)),
        };
        let about = match statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(about) => about,
            Err(Errno::NOENT) => return Ok(Found::Absent),
            Err(errno) => return Err(failed(errno)),
        };
        match rustix::fs::FileType::from_raw_mode(about.st_mode) {
            rustix::fs::FileType::Directory => Ok(Found::Directory),
            rustix::fs::FileType::Symlink => {
                let target = readlinkat(&directory, name, Vec::new()).map_err(failed)?;
                Ok(Found::Link { target: target.into_bytes(), key: Key::of(&about) })
            }
            rustix::fs::FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let mut file = File::from(openat(&directory, name, flags, Mode::empty()).map_err(failed)?);
                let about = fstat(&file).map_err(failed)?;
                let sha256 = digest(&mut file, to, cancel, |error| self.told("read", path, error))?;
                let (mode, alone) = (about.st_mode & 0o777, about.st_nlink == 1);
                Ok(Found::File { sha256, mode, alone, key: Key::of(&about) })
            }
            _ => Ok(Found::Other),
        }
    }

    /// Puts a file or a link where `before` was found: nothing, a file or a link. Directories above it are made.
    pub(super) fn put(&self, path: &[u8], before: &Found, new: New<'_>) -> Result<Outcome, ExportError> {
        let failed = |errno: Errno| self.failed("write", path, errno);
        let (above, name) = split(path);
        let directory = match self.make(above) {
            Ok(directory) => directory,
            Err(Errno::LOOP | Errno::NOTDIR | Errno::EXIST) => return Ok(Outcome::Changed),
            Err(errno) => return Err(failed(errno)),
        };
        let temporary = Temporary::new(&directory);
        let draft = temporary.write(new).map_err(|error| self.told("write", path, error))?;
        let outcome = match before {
            Found::Absent => temporary.appear(name),
            Found::File { key, .. } | Found::Link { key, .. } => temporary.exchange(name, *key, draft),
            Found::Blocked | Found::Directory | Found::Other => Ok(Outcome::Changed),
        };
        outcome.map_err(failed)
    }

    /// Removes the file or link that was found there.
    pub(super) fn remove(&self, path: &[u8], before: Key) -> Result<Outcome, ExportError> {
        let failed = |errno: Errno| self.failed("remove", path, errno);
        let (above, name) = split(path);
        let directory = match self.enter(above) {
            Ok(directory) => directory,
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => return Ok(Outcome::Changed),
            Err(errno) => return Err(failed(errno)),
        };
        Temporary::new(&directory).take(name, before).map_err(failed)
    }

    /// Sets the permission bits of the file that was found there, and had no other name.
    pub(super) fn set_mode(&self, path: &[u8], before: Key, mode: u32) -> Result<Outcome, ExportError> {
        let failed = |errno: Errno| self.failed("change", path, errno);
        let (above, name) = split(path);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file =
            match self.enter(above).and_then(|directory| openat(&directory, name, flags, Mode::empty())) {
                Ok(file) => file,
                Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => return Ok(Outcome::Changed),
                Err(errno) => return Err(failed(errno)),
            };
        let about = fstat(&file).map_err(failed)?;
        if Key::of(&about) != before || about.st_nlink != 1 {
            return Ok(Outcome::Changed);
        }
        fchmod(&file, Mode::from_raw_mode(mode)).map_err(failed)?;
        Ok(Outcome::Done)
    }

    /// Makes a directory and all above it. Whether it is there now.
    pub(super) fn make_directory(&self, path: &[u8]) -> Result<bool, ExportError> {
        match self.make(path) {
            Ok(_) => Ok(true),
            Err(Errno::LOOP | Errno::NOTDIR | Errno::EXIST) => Ok(false),
            Err(errno) => Err(self.failed("make", path, errno)),
        }
    }

    /// Removes a directory if nothing is in it. Whether there is no directory now.
    pub(super) fn remove_directory(&self, path: &[u8]) -> Result<bool, ExportError> {
        let (above, name) = split(path);
        match self.enter(above).and_then(|directory| unlinkat(&directory, name, AtFlags::REMOVEDIR)) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(true),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            Err(errno) => Err(self.failed("remove", path, errno)),
        }
    }

    /// Removes a directory if nothing but directories is in it, and these with it. Whether there is no directory now.
    pub(super) fn remove_directories(&self, path: &[u8]) -> Result<bool, ExportError> {
        if !self.has_no_files_but_for(path, &HashSet::new())? {
            return Ok(false);
        }
        for name in self.names(path)? {
            // What has come meanwhile is no empty directory, and stays.
            self.remove_directories(&[path, b"/", &name].concat())?;
        }
        self.remove_directory(path)
    }

    /// Whether a directory would be empty without these paths.
    pub(super) fn is_empty_but_for(&self, path: &[u8], gone: &HashSet<Vec<u8>>) -> Result<bool, ExportError> {
        let names = self.names(path)?;
        Ok(names.iter().all(|name| gone.contains(&[path, b"/", name].concat())))
    }

    /// Whether nothing but directories would be in a directory, and in these, without these paths.
    pub(super) fn has_no_files_but_for(
        &self,
        path: &[u8],
        gone: &HashSet<Vec<u8>>,
    ) -> Result<bool, ExportError> {
        for name in self.names(path)? {
            let inner = [path, b"/", name.as_slice()].concat();
            let counts = !gone.contains(&inner);
            if counts && (!self.is_directory(&inner)? || !self.has_no_files_but_for(&inner, gone)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_directory(&self, path: &[u8]) -> Result<bool, ExportError> {
        match self.enter(path) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(false),
            Err(errno) => Err(self.failed("read", path, errno)),
        }
    }

    /// What is in a directory; nothing if it is none.
    fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>, ExportError> {
        let failed = |errno: Errno| self.failed("read", path, errno);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = match self.enter(path) {
            Ok(directory) => openat(&directory, ".", flags, Mode::empty()).map_err(failed)?,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Vec::new()),
            Err(errno) => return Err(failed(errno)),
        };
        let mut names = Vec::new();
        for entry in Dir::new(opened).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_bytes().to_vec();
            if !matches!(name.as_slice(), b"." | b"..") {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Opens a directory below the top.
    fn enter(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { &b"."[..] } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut tries = 1;
        loop {
            match openat2(&self.top, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) if tries < TRIES => tries += 1,
                result => return result,
            }
        }
    }

    /// Opens a directory below the top, which is made with all above it.
    fn make(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        match self.enter(path) {
            Err(Errno::NOENT) => {
                let (above, name) = split(path);
                let directory = self.make(above)?;
                match mkdirat(&directory, name, Mode::from_raw_mode(0o777)) {
                    Ok(()) | Err(Errno::EXIST) => self.enter(path),
                    Err(errno) => Err(errno),
                }
            }
            result => result,
        }
    }

    fn failed(&self, action: &'static str, path: &[u8], errno: Errno) -> ExportError {
        self.told(action, path, errno.into())
    }

    fn told(&self, action: &'static str, path: &[u8], source: io::Error) -> ExportError {
        ExportError::Host { action, path: shown(path), source }
    }
}

/// The directory of a path, and its name there.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
        None => (b"", path),
    }
}

fn digest(
    file: &mut File,
    to: &mut dyn Write,
    cancel: &Cancel,
    failed: impl Fn(io::Error) -> ExportError,
) -> Result<[u8; 32], ExportError> {
    let mut hash = Sha256::new();
    let mut piece = vec![0; PIECE];
    loop {
        cancel.check()?;
        match file.read(&mut piece) {
            Ok(0) => return Ok(hash.finalize().into()),
            Ok(length) => {
                let data = piece.get(..length).unwrap_or_default();
                hash.update(data);
                to.write_all(data).map_err(&failed)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// A name of our own in a directory. What has it at the end is removed.
struct Temporary<'a> {
    directory: &'a OwnedFd,
    name: String,
    kept: Cell<bool>,
}

impl<'a> Temporary<'a> {
    fn new(directory: &'a OwnedFd) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        // What a process of this number left before it was killed has another time.
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let name = format!(".vm-export-{}-{time:x}-{count}.tmp", std::process::id());
        Self { directory, name, kept: Cell::new(true) }
    }

    /// Writes what will be put, and tells what it is.
    fn write(&self, new: New<'_>) -> io::Result<Key> {
        match new {
            New::Link { target } => {
                symlinkat(target, self.directory, self.name.as_str())?;
                self.kept.set(false);
            }
            New::File { content, mode } => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat(self.directory, self.name.as_str(), flags, Mode::from_raw_mode(0o600))?;
                self.kept.set(false);
                let mut file = File::from(file);
                copy_data(&mut File::open(content)?, &mut file)?;
                fchmod(&file, Mode::from_raw_mode(mode))?;
            }
        }
        Ok(self.key()?)
    }

    fn key(&self) -> Result<Key, Errno> {
        statat(self.directory, self.name.as_str(), AtFlags::SYMLINK_NOFOLLOW).map(|about| Key::of(&about))
    }

    /// Gives what was written a name that nothing has.
    fn appear(&self, name: &[u8]) -> Result<Outcome, Errno> {
        let given = match self.rename(self.name.as_bytes(), name, RenameFlags::NOREPLACE) {
            // The filesystem cannot; a second link does not replace either.
            Err(Errno::INVAL | Errno::NOSYS) => {
                linkat(self.directory, self.name.as_str(), self.directory, name, AtFlags::empty())
            }
            Ok(()) => {
                self.kept.set(true);
                Ok(())
            }
            result => result,
        };
        match given {
            Ok(()) => Ok(Outcome::Done),
            Err(Errno::EXIST) => Ok(Outcome::Changed),
            Err(errno) => Err(errno),
        }
    }

    /// Gives what was written the name of something else, if that still is what it was.
    fn exchange(&self, name: &[u8], before: Key, draft: Key) -> Result<Outcome, Errno> {
        let own = self.name.as_bytes();
        match self.rename(own, name, RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(Outcome::Changed),
            // The filesystem cannot: what is left is to look again immediately before.
            Err(Errno::INVAL | Errno::NOSYS) => {
                if !self.is(name, before) {
                    return Ok(Outcome::Changed);
                }
                renameat(self.directory, self.name.as_str(), self.directory, name)?;
                self.kept.set(true);
                return Ok(Outcome::Done);
            }
            Err(errno) => return Err(errno),
        }
        // From here on the name of our own is somebody else's file, until it turns out to be the one that was compared.
        self.kept.set(true);
        if self.key()? == before {
            self.kept.set(false);
            return Ok(Outcome::Done);
        }
        self.rename(own, name, RenameFlags::EXCHANGE)?;
        self.kept.set(self.key()? != draft);
        Ok(Outcome::Changed)
    }

    /// Takes a name away from what still is what it was.
    fn take(&self, name: &[u8], before: Key) -> Result<Outcome, Errno> {
        let own = self.name.as_bytes();
        match self.rename(name, own, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(Outcome::Changed),
            Err(Errno::INVAL | Errno::NOSYS) => {
                if !self.is(name, before) {
                    return Ok(Outcome::Changed);
                }
                unlinkat(self.directory, name, AtFlags::empty())?;
                return Ok(Outcome::Done);
            }
            Err(errno) => return Err(errno),
        }
        if self.key()? == before {
            self.kept.set(false);
            return Ok(Outcome::Done);
        }
        self.rename(own, name, RenameFlags::NOREPLACE)?;
        Ok(Outcome::Changed)
    }

    fn is(&self, name: &[u8], before: Key) -> bool {
        statat(self.directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|about| Key::of(&about) == before)
    }

    fn rename(&self, from: &[u8], to: &[u8], flags: RenameFlags) -> Result<(), Errno> {
        renameat_with(self.directory.as_fd(), from, self.directory.as_fd(), to, flags)
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.kept.get() {
            // It was made or verified a moment ago; where that fails, a file with a telling name stays.
            let _ = unlinkat(self.directory, self.name.as_str(), AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    struct Host(tempfile::TempDir, Place);

    impl Host {
        fn with(name: &str, content: &str) -> Self {
            let top = tempfile::tempdir().unwrap();
            fs::write(top.path().join(name), content).unwrap();
            fs::write(top.path().join("new"), "new").unwrap();
            let place = Place::open(top.path()).unwrap();
            Self(top, place)
        }

        fn look(&self, name: &str) -> Found {
            self.1.look(name.as_bytes(), &Cancel::default()).unwrap()
        }

        fn put(&self, name: &str, before: &Found) -> Outcome {
            let content = self.0.path().join("new");
            self.1.put(name.as_bytes(), before, New::File { content: &content, mode: 0o640 }).unwrap()
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.path().join(name)).unwrap()
        }

        /// Names of the top, without what is put.
        fn names(&self) -> Vec<String> {
            let names = fs::read_dir(self.0.path()).unwrap();
            let mut names: Vec<_> =
                names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.retain(|name| name != "new");
            names.sort();
            names
        }
    }

    #[test]
    fn what_was_compared_is_replaced_and_removed() {
        let host = Host::with("a", "old");
        assert_eq!(host.put("a", &host.look("a")), Outcome::Done);
        assert_eq!(host.read("a"), "new");
        assert!(matches!(host.look("a"), Found::File { mode: 0o640, .. }));
        assert_eq!(host.put("x/y/z", &Found::Absent), Outcome::Done);
        let key = host.look("a").key().unwrap();
        assert_eq!(host.1.set_mode(b"a", key, 0o755).unwrap(), Outcome::Done);
        // The bits of a file with another name are that one's, too.
        fs::hard_link(host.0.path().join("a"), host.0.path().join("new2")).unwrap();
        assert!(matches!(host.look("a"), Found::File { alone: false, .. }));
        assert_eq!(host.1.set_mode(b"a", key, 0o777).unwrap(), Outcome::Changed);
        fs::remove_file(host.0.path().join("new2")).unwrap();
        assert_eq!(host.1.remove(b"a", key).unwrap(), Outcome::Done);
        assert_eq!(host.names(), ["x"]);
    }

    #[test]
    fn an_edit_in_between_is_kept_and_no_other_file_stays() {
        let host = Host::with("a", "old");
        let before = host.look("a");
        fs::write(host.0.path().join("a"), "edited by hand").unwrap();
        assert_eq!(host.put("a", &before), Outcome::Changed);
        assert_eq!(host.1.remove(b"a", before.key().unwrap()).unwrap(), Outcome::Changed);
        assert_eq!(host.1.set_mode(b"a", before.key().unwrap(), 0o777).unwrap(), Outcome::Changed);
        assert_eq!(host.put("a", &Found::Absent), Outcome::Changed, "it appeared");
        assert_eq!(host.read("a"), "edited by hand");
        // An editor that writes a new file and renames it.
        let before = host.look("a");
        fs::write(host.0.path().join("b"), "edited by hand").unwrap();
        fs::rename(host.0.path().join("b"), host.0.path().join("a")).unwrap();
        assert_eq!(host.put("a", &before), Outcome::Changed);
        assert_eq!(host.names(), ["a"]);
        let before = host.look("a");
        fs::remove_file(host.0.path().join("a")).unwrap();
        assert_eq!(host.put("a", &before), Outcome::Changed, "it went");
        fs::create_dir(host.0.path().join("a")).unwrap();
        fs::write(host.0.path().join("a/inner"), "").unwrap();
        assert_eq!(host.put("a", &before), Outcome::Changed, "it is a directory");
        assert_eq!(host.1.remove(b"a", before.key().unwrap()).unwrap(), Outcome::Changed);
        assert!(host.0.path().join("a/inner").exists());
        assert_eq!(host.names(), ["a"]);
    }

    #[test]
    fn nothing_is_done_through_links() {
        let host = Host::with("a", "old");
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("file"), "precious").unwrap();
        symlink(outside.path(), host.0.path().join("dir")).unwrap();
        symlink(outside.path().join("file"), host.0.path().join("link")).unwrap();
        assert_eq!(host.look("dir/file"), Found::Blocked);
        assert_eq!(host.put("dir/new", &Found::Absent), Outcome::Changed);
        let key = host.look("a").key().unwrap();
        assert_eq!(host.1.remove(b"dir/file", key).unwrap(), Outcome::Changed);
        assert!(!host.1.make_directory(b"dir/sub").unwrap());
        assert!(matches!(host.look("link"), Found::Link { .. }));
        assert_eq!(host.put("link", &host.look("link")), Outcome::Done, "the link itself is replaced");
        assert_eq!(host.read("link"), "new");
        assert_eq!(fs::read_to_string(outside.path().join("file")).unwrap(), "precious");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}
