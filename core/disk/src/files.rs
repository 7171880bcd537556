//! Directories and small files of the daemon's own, inside its directories only.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use vm_host::files::{remove_if_there, write_atomic};
use vm_types::{Effect, Handle, Observed};

use crate::{
    DiskError,
    copy::copy_data,
    host::{failed, in_background},
    root::{Place, Roots},
};

/// Applies [`Effect::Directory`], [`Effect::File`] and [`Effect::AppendedFile`]. All three operations are idempotent, and
/// none of them follows a symbolic link below a root.
#[derive(Debug, Clone)]
pub struct Files {
    roots: Roots,
}

impl Files {
    /// Only what is strictly below one of `roots` will ever be touched. The roots themselves are not made.
    pub fn new(roots: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { roots: Roots::new(roots.into_iter().collect()) }
    }

    /// Whether a directory or file is there. A file's content is not compared: journals do not hold it.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], [`DiskError::OutsideRoots`], or it cannot be looked at.
    pub async fn observe(&self, effect: &Effect) -> Result<Observed, DiskError> {
        self.work(effect, |roots, target| roots.observe(target)).await
    }

    /// Makes it. Missing directories above are made too and not undone. A directory that is there
    /// gets the right mode; a file that is there is replaced as a whole.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], [`DiskError::OutsideRoots`], [`DiskError::Foreign`], or a failed file operation; no part of
    /// a file is left behind.
    pub async fn apply(&self, effect: &Effect) -> Result<Handle, DiskError> {
        self.work(effect, |roots, target| roots.apply(target)).await.map(|()| Handle::None)
    }

    /// Removes it; a directory with everything in it.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], [`DiskError::OutsideRoots`], [`DiskError::Foreign`], or a failed file operation.
    pub async fn undo(&self, effect: &Effect, _handle: &Handle) -> Result<(), DiskError> {
        self.work(effect, |roots, target| roots.undo(target)).await
    }

    async fn work<R: Send + 'static>(
        &self,
        effect: &Effect,
        act: impl FnOnce(&Roots, Target<'_>) -> Result<R, DiskError> + Send + 'static,
    ) -> Result<R, DiskError> {
        let roots = self.roots.clone();
        in_background(effect, move |effect| act(&roots, Target::of(effect)?)).await
    }
}

/// What an effect asks for, without the parts that are alike.
#[derive(Debug, Clone, Copy)]
struct Target<'a> {
    path: &'a Path,
    mode: u32,
    kind: Kind<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Kind<'a> {
    Directory,
    Content(&'a [u8]),
    Appended { base: &'a Path, tail: &'a [u8] },
}

impl<'a> Target<'a> {
    fn of(effect: &'a Effect) -> Result<Self, DiskError> {
        let (path, mode, kind) = match effect {
            Effect::Directory { path, mode } => (path, mode, Kind::Directory),
            Effect::File { path, mode, content } => (path, mode, Kind::Content(content)),
            Effect::AppendedFile { path, mode, base, tail } => (path, mode, Kind::Appended { base, tail }),
            _ => return Err(DiskError::NotMine { effect: effect.id() }),
        };
        Ok(Self { path, mode: *mode, kind })
    }

    fn foreign(&self, what: &str) -> DiskError {
        DiskError::Foreign { path: self.path.to_owned(), what: what.to_owned() }
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> DiskError {
        move |source| failed(action, self.path, source)
    }
}

impl Roots {
    fn observe(&self, target: Target<'_>) -> Result<Observed, DiskError> {
        match self.place(target.path, false)? {
            Some(place) => look(&place, target),
            None => Ok(Observed::Absent),
        }
    }

    fn apply(&self, target: Target<'_>) -> Result<(), DiskError> {
        let place = self
            .place(target.path, true)?
            .ok_or_else(|| target.failed("open the directory of")(io::ErrorKind::NotFound.into()))?;
        let present = look(&place, target)?;
        if let Observed::Foreign(what) = &present {
            return Err(target.foreign(what));
        }
        let path = place.path();
        match target.kind {
            Kind::Directory => {
                if present == Observed::Absent {
                    fs::create_dir(&path).map_err(target.failed("create"))?;
                }
                // Through the open directory, for chmod(2) would follow a link put there meanwhile.
                OpenOptions::new()
                    .read(true)
                    .custom_flags(nix::libc::O_DIRECTORY | nix::libc::O_NOFOLLOW)
                    .open(&path)
                    .and_then(|directory| directory.set_permissions(fs::Permissions::from_mode(target.mode)))
                    .map_err(target.failed("set the mode of"))
            }
            Kind::Content(content) => {
                write_atomic(&path, target.mode, content).map_err(target.failed("write"))
            }
            Kind::Appended { base, tail } => {
                let base_file = File::open(base).map_err(|source| failed("open", base, source))?;
                append(&base_file, tail, &path, target.mode).map_err(target.failed("write"))
            }
        }
    }

    fn undo(&self, target: Target<'_>) -> Result<(), DiskError> {
        let Some(place) = self.place(target.path, false)? else { return Ok(()) };
        match (look(&place, target)?, target.kind) {
            (Observed::Absent, _) => Ok(()),
            (Observed::Foreign(what), _) => Err(target.foreign(&what)),
            (Observed::Present(_), Kind::Directory) => match fs::remove_dir_all(place.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(target.failed("remove")(error)),
                _ => Ok(()),
            },
            (Observed::Present(_), _) => remove_if_there(&place.path()).map_err(target.failed("remove")),
        }
    }
}

fn look(place: &Place, target: Target<'_>) -> Result<Observed, DiskError> {
    let about = match fs::symlink_metadata(place.path()) {
        Ok(about) => about,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Observed::Absent),
        Err(error) => return Err(target.failed("look at")(error)),
    };
    let (fits, wanted) = match target.kind {
        Kind::Directory => (about.is_dir(), "directory"),
        Kind::Content(_) | Kind::Appended { .. } => (about.is_file(), "regular file"),
    };
    Ok(if fits { Observed::Present(Handle::None) } else { Observed::Foreign(format!("it is no {wanted}")) })
}

/// Makes `path` of `base` and `tail`, whole or not at all. Not flushed to the medium: such files are made anew at each start.
fn append(base: &File, tail: &[u8], path: &Path, mode: u32) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".tmp{}", std::process::id()));
    let temporary = path.with_file_name(name);
    // Left by a daemon that was killed and had our pid.
    remove_if_there(&temporary)?;
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        let length = base.metadata()?.len();
        copy_data(base, &file, length, &|| false)?;
        file.set_len(length)?;
        file.seek(SeekFrom::Start(length))?;
        file.write_all(tail)?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _ = remove_if_there(&temporary);
    })
}
