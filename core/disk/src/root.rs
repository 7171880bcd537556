//! Paths that are certain to be below one of the daemon's directories.
//!
//! The parent directory is opened beneath its root with openat2(2), which refuses `..` and symbolic links on the
//! way; the last component is then named through that open directory, so nothing can be put
//! in between.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{Mode, mkdirat},
};

use crate::{DiskError, host::failed};

/// The daemon's directories.
#[derive(Debug, Clone)]
pub(crate) struct Roots(Vec<PathBuf>);

/// An entry of an open directory.
#[derive(Debug)]
pub(crate) struct Place {
    directory: OwnedFd,
    name: OsString,
}

impl Place {
    /// A path that leads to the entry whatever happens to the names above it.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory().join(&self.name)
    }

    /// Makes the entry's name outlive a loss of power.
    pub(crate) fn sync(&self) -> io::Result<()> {
        File::open(self.directory())?.sync_all()
    }

    fn directory(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.directory.as_raw_fd().to_string())
    }
}

impl Roots {
    pub(crate) fn new(roots: Vec<PathBuf>) -> Self {
        Self(roots)
    }

    /// Opens the directory that `path` is, or is to be, an entry of; `None` where it is not there. With
    /// `create`, missing directories between root and entry are made, mode 0755 less the umask.
    pub(crate) fn place(&self, path: &Path, create: bool) -> Result<Option<Place>, DiskError> {
        let outside = || DiskError::OutsideRoots { path: path.to_owned() };
        let (root, rest) = self
            .0
            .iter()
            .filter_map(|root| Some((root, path.strip_prefix(root).ok()?)))
            .min_by_key(|(_, rest)| rest.as_os_str().len())
            .ok_or_else(outside)?;
        let mut names = Vec::new();
        for component in rest.components() {
            match component {
                Component::Normal(name) => names.push(name),
                _ => return Err(outside()),
            }
        }
        let name = names.pop().ok_or_else(outside)?.to_owned();
        let flags = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
        let mut directory = match nix::fcntl::open(root, flags, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::ENOENT) if !create => return Ok(None),
            Err(error) => return Err(failed("open", root, error.into())),
        };
        let how = OpenHow::new()
            .flags(flags)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        for step in names {
            let mut next = openat2(&directory, step, how);
            if next.as_ref().is_err_and(|error| *error == Errno::ENOENT) {
                if !create {
                    return Ok(None);
                }
                match mkdirat(&directory, step, Mode::from_bits_truncate(0o755)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(error) => return Err(failed("create the directory of", path, error.into())),
                }
                next = openat2(&directory, step, how);
            }
            directory = match next {
                Ok(next) => next,
                Err(Errno::ELOOP | Errno::EXDEV) => return Err(outside()),
                Err(error) => return Err(failed("open the directory of", path, error.into())),
            };
        }
        Ok(Some(Place { directory, name }))
    }
}
