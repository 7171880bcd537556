//! A file that appears under its name only when it is whole.
//!
//! It has no name at all until then, where the filesystem knows such files; whoever is killed leaves nothing. Elsewhere it is
//! written under another name of the same directory and then renamed, and so it is for a moment where something has to give
//! way. Those names are no part of any tree (see [`is_draft`]), and what is left of them is removed by who writes there next
//! (see [`sweep`]). The entry is replaced, never written through: a link that leads somewhere else, or nowhere, gives way and
//! its target is left alone.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, ErrorKind, Seek, SeekFrom, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, fchown},
        },
    },
    path::Path,
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat, renameat},
    sys::{
        stat::{Mode, fstat, futimens},
        time::TimeSpec,
    },
    unistd::{UnlinkatFlags, linkat, unlinkat},
};
use rustix::fs::{Dir, FileType, FlockOperation, XattrFlags, flock, fsetxattr};

/// What the names of drafts begin with.
const PREFIX: &[u8] = b".vmd-new-";
/// So that two drafts of one file are two.
static NUMBER: AtomicU64 = AtomicU64::new(0);
/// How many names may be taken already, by what others have left or are writing.
const TRIES: usize = 1000;

/// Whether a name is one that a file has only while it is made.
pub fn is_draft(name: &[u8]) -> bool {
    let numbers = name.strip_prefix(PREFIX).unwrap_or_default().split(|byte| *byte == b'-');
    let is_number = |part: &[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_digit);
    numbers.clone().count() == 2 && numbers.clone().all(is_number)
}

/// Removes drafts from a directory whose makers have died: they hold a lock while they live. What cannot be removed stays.
pub(crate) fn sweep(directory: &OwnedFd) {
    let Ok(entries) = Dir::read_from(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !is_draft(name.to_bytes())
            || !matches!(entry.file_type(), FileType::RegularFile | FileType::Unknown)
        {
            continue;
        }
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        if let Ok(file) = openat(directory, name, flags, Mode::empty())
            && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            // With the lock, which its maker would wait for before it goes on.
            let _ = unlinkat(directory, name, UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// A file in the making; its drop without [`Draft::commit`] leaves nothing.
#[derive(Debug)]
pub struct Draft {
    /// All goes by descriptors: whoever may write to the directory can swap names, but not what is open.
    directory: Rc<OwnedFd>,
    name: OsString,
    /// The name that it has meanwhile; empty if it has none.
    draft: OsString,
    file: File,
}

impl Draft {
    /// Begins the file `path`, whose directory exists. Until it is whole, only its maker can read it.
    ///
    /// # Errors
    /// There is no such directory, or nothing can be made in it.
    pub fn begin(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
        let parent = match path.parent().ok_or(ErrorKind::InvalidInput)? {
            parent if parent.as_os_str().is_empty() => Path::new("."),
            parent => parent,
        };
        // Not O_PATH: it is listed.
        let directory = open(parent, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        sweep(&directory);
        Self::within(Rc::new(directory), name)
    }

    /// As [`Draft::begin`], in an open directory.
    ///
    /// # Errors
    /// As [`Draft::begin`].
    pub fn within(directory: Rc<OwnedFd>, name: &OsStr) -> io::Result<Self> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        match openat(&*directory, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(file) => {
                Ok(Self { directory, name: name.to_owned(), draft: OsString::new(), file: file.into() })
            }
            // Filesystems that do not know such files say so in many ways.
            Err(_) => Self::named(directory, name),
        }
    }

    /// With a name of its own from the beginning.
    fn named(directory: Rc<OwnedFd>, name: &OsStr) -> io::Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        for _ in 0..TRIES {
            let draft = next_name();
            match openat(&*directory, draft.as_os_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR) {
                // One that a crash left behind, or a trap laid in its place, is not written through.
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno.into()),
                Ok(file) => {
                    let made = Self {
                        directory: Rc::clone(&directory),
                        name: name.to_owned(),
                        draft,
                        file: file.into(),
                    };
                    made.lock();
                    // Somebody may have swept it away before it was locked.
                    if fstat(&made.file)?.st_nlink > 0 {
                        return Ok(made);
                    }
                }
            }
        }
        Err(Errno::EEXIST.into())
    }

    /// Tells others that this draft is not one that was left. Where there are no such locks, nobody sweeps either.
    fn lock(&self) {
        let _ = flock(&self.file, FlockOperation::LockExclusive);
    }

    /// When it is said to have been modified: now, if this is not the last that is done to its content.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_modified(&self, time: &TimeSpec) -> io::Result<()> {
        Ok(futimens(&self.file, &TimeSpec::UTIME_OMIT, time)?)
    }

    /// Sets its length; what is added reads as zeros and takes no room.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn set_len(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size)
    }

    /// Gives it owner, mode and name.
    ///
    /// # Errors
    /// The kernel's; then nothing of it stays.
    pub fn commit(self, mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
        self.commit_with(mode, owner, &[])
    }

    /// As [`Draft::commit`], with extended attributes, by name.
    pub(crate) fn commit_with(
        mut self,
        mode: u32,
        owner: Option<(u32, u32)>,
        xattrs: &[(Vec<u8>, Vec<u8>)],
    ) -> io::Result<()> {
        if let Some((uid, gid)) = owner {
            fchown(&self.file, Some(uid), Some(gid))?;
        }
        // After the owner, whose change takes set-user-ID away.
        self.file.set_permissions(fs::Permissions::from_mode(mode))?;
        // And these after both: a change of owner takes capabilities away, one of the mode changes access lists.
        for (name, value) in xattrs {
            fsetxattr(&self.file, name.as_slice(), value, XattrFlags::empty())?;
        }
        if self.draft.is_empty() {
            match self.link(&self.name) {
                Err(Errno::EEXIST) => self.take_name()?,
                result => return Ok(result?),
            }
        }
        match renameat(&*self.directory, self.draft.as_os_str(), &*self.directory, self.name.as_os_str()) {
            // Something is mounted there: only its content can change.
            Err(Errno::EBUSY | Errno::EXDEV) => {
                let flags = OFlag::O_WRONLY | OFlag::O_TRUNC | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let mut mounted =
                    File::from(openat(&*self.directory, self.name.as_os_str(), flags, Mode::empty())?);
                self.file.rewind()?;
                io::copy(&mut self.file, &mut mounted).map(drop)
            }
            Err(error) => Err(error.into()),
            Ok(()) => {
                self.draft.clear();
                Ok(())
            }
        }
    }

    /// Gives a name to what has none, for a rename: there is no link that takes the place of something.
    fn take_name(&mut self) -> io::Result<()> {
        self.lock();
        for _ in 0..TRIES {
            let draft = next_name();
            match self.link(&draft) {
                Err(Errno::EEXIST) => {}
                result => {
                    result?;
                    self.draft = draft;
                    return Ok(());
                }
            }
        }
        Err(Errno::EEXIST.into())
    }

    fn link(&self, name: &OsStr) -> nix::Result<()> {
        match linkat(&self.file, "", &*self.directory, name, AtFlags::AT_EMPTY_PATH) {
            // Only privileged processes may do it by the descriptor (open(2), O_TMPFILE).
            Err(Errno::ENOENT) => {
                let way = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                linkat(AT_FDCWD, way.as_str(), &*self.directory, name, AtFlags::AT_SYMLINK_FOLLOW)
            }
            result => result,
        }
    }
}

fn next_name() -> OsString {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let mut name = PREFIX.to_vec();
    name.extend_from_slice(format!("{}-{number}", std::process::id()).as_bytes());
    OsStr::from_bytes(&name).to_owned()
}

impl Write for Draft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Draft {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.draft.is_empty() {
            let _ = unlinkat(&*self.directory, self.draft.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(path: &Path) -> Rc<OwnedFd> {
        Rc::new(open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).unwrap())
    }

    fn names(path: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn only_names_of_drafts_are_such() {
        for name in [".vmd-new-1-0", ".vmd-new-4711-12"] {
            assert!(is_draft(name.as_bytes()), "{name}");
        }
        assert!(is_draft(next_name().as_bytes()));
        for name in [
            "",
            "a",
            ".vmd-new-",
            ".vmd-new-1",
            ".vmd-new-1-",
            ".vmd-new--1",
            ".vmd-new-1-2-3",
            ".vmd-new-1-x",
        ] {
            assert!(!is_draft(name.as_bytes()), "{name}");
        }
    }

    /// Both ways of making a file, as not every filesystem has both.
    #[test]
    fn files_appear_whole_and_what_is_dropped_leaves_nothing() {
        for make in [Draft::within, Draft::named] {
            let top = tempfile::tempdir().unwrap();
            let directory = opened(top.path());
            fs::write(top.path().join("other"), "kept").unwrap();
            fs::hard_link(top.path().join("other"), top.path().join("old")).unwrap();
            for name in ["new", "old"] {
                let mut draft = make(Rc::clone(&directory), OsStr::new(name)).unwrap();
                draft.write_all(b"content").unwrap();
                let seen = names(top.path());
                assert!(seen.iter().all(|name| name == "new"
                    || name == "old"
                    || name == "other"
                    || is_draft(name.as_bytes())));
                draft.commit(0o640, None).unwrap();
                let path = top.path().join(name);
                assert_eq!(fs::read(&path).unwrap(), b"content");
                assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
            }
            drop(make(Rc::clone(&directory), OsStr::new("never")).unwrap());
            fs::create_dir(top.path().join("taken")).unwrap();
            let refused = make(Rc::clone(&directory), OsStr::new("taken")).unwrap().commit(0o600, None);
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::IsADirectory);
            assert_eq!(names(top.path()), ["new", "old", "other", "taken"]);
            assert_eq!(fs::read(top.path().join("other")).unwrap(), b"kept");
        }
    }

    #[test]
    fn only_what_was_left_is_swept() {
        let top = tempfile::tempdir().unwrap();
        let directory = opened(top.path());
        let mut kept = Draft::named(Rc::clone(&directory), OsStr::new("kept")).unwrap();
        for name in [".vmd-new-1-1", ".vmd-new-mine"] {
            fs::write(top.path().join(name), "left").unwrap();
        }
        fs::create_dir(top.path().join(".vmd-new-1-2")).unwrap();
        std::os::unix::fs::symlink("kept", top.path().join(".vmd-new-1-3")).unwrap();
        // As whoever writes there next does.
        drop(Draft::begin(&top.path().join("next")).unwrap());
        kept.write_all(b"content").unwrap();
        kept.commit(0o600, None).unwrap();
        assert_eq!(names(top.path()), [".vmd-new-1-2", ".vmd-new-1-3", ".vmd-new-mine", "kept"]);
        assert_eq!(fs::read(top.path().join("kept")).unwrap(), b"content");
    }
}
