//! A file that appears under its name only when it is whole.
//!
//! It is written under another name of the same directory and then renamed. The entry is replaced, never written
//! through: a link that leads somewhere else, or nowhere, gives way and its target is left alone.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, ErrorKind, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{PermissionsExt, fchown},
    },
    path::Path,
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat, renameat},
    sys::{
        stat::{Mode, futimens},
        time::TimeSpec,
    },
    unistd::{UnlinkatFlags, unlinkat},
};

/// So that two drafts of one file are two.
static NUMBER: AtomicU64 = AtomicU64::new(0);
/// How many names may be taken already, by what others have left or are writing.
const TRIES: usize = 1000;

/// A file in the making; its drop without [`Draft::commit`] leaves nothing.
#[derive(Debug)]
pub struct Draft {
    /// All goes by descriptors: whoever may write to the directory can swap names, but not what is open.
    directory: Rc<OwnedFd>,
    name: OsString,
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
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Self::within(Rc::new(open(parent, flags, Mode::empty())?), name)
    }

    /// As [`Draft::begin`], in an open directory.
    ///
    /// # Errors
    /// As [`Draft::begin`].
    pub fn within(directory: Rc<OwnedFd>, name: &OsStr) -> io::Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        for _ in 0..TRIES {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let draft = OsString::from(format!(".vmd-new-{}-{number}", std::process::id()));
            match openat(&*directory, draft.as_os_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR) {
                // One that a crash left behind, or a trap laid in its place, is not written through.
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno.into()),
                Ok(file) => return Ok(Self { directory, name: name.to_owned(), draft, file: file.into() }),
            }
        }
        Err(Errno::EEXIST.into())
    }

    /// When it is said to have been modified: now, if this is not the last that is done to its content.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_modified(&self, time: &TimeSpec) -> io::Result<()> {
        Ok(futimens(&self.file, &TimeSpec::UTIME_OMIT, time)?)
    }

    /// Gives it owner, mode and name.
    ///
    /// # Errors
    /// The kernel's; then nothing of it stays.
    pub fn commit(mut self, mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
        if let Some((uid, gid)) = owner {
            fchown(&self.file, Some(uid), Some(gid))?;
        }
        // After the owner, whose change takes set-user-ID away.
        self.file.set_permissions(fs::Permissions::from_mode(mode))?;
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
}

impl Write for Draft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.draft.is_empty() {
            let _ = unlinkat(&*self.directory, self.draft.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}
