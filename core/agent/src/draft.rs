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
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat, renameat},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, unlinkat},
};

/// So that two drafts of one file are two.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// A file in the making; its drop without [`Draft::commit`] leaves nothing.
pub(crate) struct Draft {
    /// All goes by descriptors: whoever may write to the directory can swap names, but not what is open.
    directory: File,
    name: OsString,
    draft: OsString,
    file: File,
}

impl Draft {
    /// Begins the file `path`, whose directory exists. Until it is whole, only root can read it.
    pub(crate) fn begin(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
        let parent = path.parent().ok_or(ErrorKind::InvalidInput)?;
        Self::within(
            open(parent, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?,
            name,
        )
    }

    /// As [`Draft::begin`], in an open directory.
    pub(crate) fn within(directory: OwnedFd, name: &OsStr) -> io::Result<Self> {
        let directory = File::from(directory);
        let draft = OsString::from(format!(".vmd-new-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        // One that a crash left behind, or a trap laid in its place, is not written through either.
        remove(&directory, &draft);
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = File::from(openat(&directory, draft.as_os_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
        Ok(Self { directory, name: name.to_owned(), draft, file })
    }

    /// When it is said to have been modified: now, if this is not the last that is done to its content.
    pub(crate) fn set_modified(&self, time: SystemTime) -> io::Result<()> {
        self.file.set_modified(time)
    }

    /// Gives it owner, mode and name.
    pub(crate) fn commit(mut self, mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
        if let Some((uid, gid)) = owner {
            fchown(&self.file, Some(uid), Some(gid))?;
        }
        // After the owner, whose change takes set-user-ID away.
        self.file.set_permissions(fs::Permissions::from_mode(mode))?;
        match renameat(&self.directory, self.draft.as_os_str(), &self.directory, self.name.as_os_str()) {
            // Something is mounted there: only its content can change.
            Err(Errno::EBUSY | Errno::EXDEV) => {
                let flags = OFlag::O_WRONLY | OFlag::O_TRUNC | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let mut mounted =
                    File::from(openat(&self.directory, self.name.as_os_str(), flags, Mode::empty())?);
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
            remove(&self.directory, &self.draft);
        }
    }
}

fn remove(directory: &File, name: &OsStr) {
    let _ = unlinkat(directory, name, UnlinkatFlags::NoRemoveDir);
}
