//! Disks on the host's filesystem.
//!
//! ```text
//!   disk.raw.partial-PID-N ── reflink or copy ── grow ──link──> disk.raw, then unlink the partial name
//!   disk.delta.partial-PID-N ── grow ──link──> disk.delta, of which `dm` makes a device
//! ```
//!
//! link(2) and not rename(2): it never replaces a disk that is there.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use async_trait::async_trait;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use vm_host::files::remove_if_there;
use vm_types::{Effect, Handle, InstanceId, Observed, VmId};

use crate::{
    Backend, Cow, DiskError, Fill,
    copy::{Copied, copy_data},
    cow::{CowDisk, Snapshot, check_size},
    dm::{
        device_prefix,
        format::{self, CHUNK_BYTES, delta_bytes},
        node, probe,
        snapshot::Dm,
        vm_of_device,
    },
    free_bytes,
};

/// Left free beside what a disk takes, for journals, logs and the database.
pub(crate) const MARGIN_BYTES: u64 = 64 << 20;

/// What the operator wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// The best one that works.
    #[default]
    Auto,
    /// [`Backend::Reflink`] or an error.
    Reflink,
    /// [`Backend::DmSnapshot`] or an error.
    #[serde(rename = "dm-snapshot")]
    DmSnapshot,
    /// [`Backend::Copy`].
    Copy,
}

/// Makes disks for real.
#[derive(Debug, Clone)]
pub struct HostCow {
    backend: Backend,
    /// Copy where a reflink turns out not to work for one base.
    fall_back: bool,
    /// Also for those disks that were made with it when the choice was another.
    dm: Dm,
    passed_over: Vec<(Backend, String)>,
}

impl HostCow {
    /// Finds out how disks in `disks` can share blocks with bases in `bases`: two unnamed small files are tried for reflinks, then
    /// device-mapper and loop devices are asked. Both directories must exist.
    ///
    /// # Errors
    /// [`DiskError::Unsupported`] where the choice does not work; where it is a reflink, also that the files cannot be made.
    pub fn probe(choice: BackendChoice, bases: &Path, disks: &Path) -> Result<Self, DiskError> {
        node::tidy(disks);
        let mut this =
            Self { backend: Backend::Copy, fall_back: false, dm: Dm::new(disks), passed_over: Vec::new() };
        let unsupported =
            |backend, source| Err(DiskError::Unsupported { backend, directory: disks.to_owned(), source });
        if matches!(choice, BackendChoice::Auto | BackendChoice::Reflink) {
            match try_reflink(bases, disks) {
                Ok(()) => {
                    let fall_back = choice == BackendChoice::Auto;
                    return Ok(Self { backend: Backend::Reflink, fall_back, ..this });
                }
                Err(DiskError::Unsupported { source, .. }) if choice == BackendChoice::Auto => {
                    this.passed_over.push((Backend::Reflink, source.to_string()));
                }
                // That it could not be tried, on a full filesystem for instance, keeps nobody from the disks there are.
                Err(error) if choice == BackendChoice::Auto => {
                    let why = format!("it could not be tried: {}", vm_types::report::chain(&error));
                    this.passed_over.push((Backend::Reflink, why));
                }
                Err(error) => return Err(error),
            }
        }
        if matches!(choice, BackendChoice::Auto | BackendChoice::DmSnapshot) {
            match probe::probe(&this.dm, disks) {
                Ok(()) => return Ok(Self { backend: Backend::DmSnapshot, ..this }),
                Err(source) if choice == BackendChoice::DmSnapshot => {
                    return unsupported(Backend::DmSnapshot, source);
                }
                Err(error) => this.passed_over.push((Backend::DmSnapshot, error.to_string())),
            }
        }
        Ok(this)
    }

    /// Backends that come before the one in use and do not work here, and why.
    pub fn passed_over(&self) -> &[(Backend, String)] {
        &self.passed_over
    }

    fn make(&self, disk: CowDisk<'_>, claim: &Claim) -> Result<Handle, DiskError> {
        match look(disk)? {
            Observed::Present(handle) => return Ok(handle),
            Observed::Foreign(what) => return Err(DiskError::Foreign { path: disk.path.to_owned(), what }),
            Observed::Absent => {}
        }
        remove_partials(disk.path)?;
        let base = File::open(disk.base).map_err(|source| failed("open", disk.base, source))?;
        let about = base.metadata().map_err(|source| failed("look at", disk.base, source))?;
        check_size(disk.size_bytes, about.len())?;

        let partial = Partial::create(disk.path)?;
        let started = Instant::now();
        if disk.delta {
            check_space(disk.path, MARGIN_BYTES)?;
            let length = disk.file_bytes(CHUNK_BYTES);
            partial.file.set_len(length).map_err(|source| failed("grow", disk.path, source))?;
            return put_in_place(&partial, disk.path, claim);
        }
        let shared = self.backend == Backend::Reflink && self.share(&base, &partial, disk)?;
        let mut copied = 0;
        if !shared {
            let needed_bytes = about.blocks() * 512 + MARGIN_BYTES;
            check_space(disk.path, needed_bytes)?;
            match copy_data(&base, &partial.file, about.len(), &|| claim.cancelled()) {
                Ok(Copied::Whole(bytes)) => copied = bytes,
                Ok(Copied::GivenUp) => return Err(DiskError::Cancelled { path: disk.path.to_owned() }),
                Err(source) if source.kind() == io::ErrorKind::StorageFull => {
                    let available_bytes = free_bytes(disk.path)?;
                    return Err(DiskError::NoSpace {
                        path: disk.path.to_owned(),
                        needed_bytes,
                        available_bytes,
                    });
                }
                Err(source) => return Err(failed("copy the image to", disk.path, source)),
            }
        }
        partial.file.set_len(disk.size_bytes).map_err(|source| failed("grow", disk.path, source))?;
        let seconds = started.elapsed().as_secs_f64();
        tracing::debug!(disk = %disk.path.display(), shared, copied, seconds, "disk made");
        put_in_place(&partial, disk.path, claim)
    }

    /// Whether the base's blocks could be shared; an error where they must be.
    fn share(&self, base: &File, partial: &Partial, disk: CowDisk<'_>) -> Result<bool, DiskError> {
        check_space(disk.path, MARGIN_BYTES)?;
        match reflink(base, &partial.file) {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::EXDEV | Errno::EINVAL | Errno::ENOTTY) if self.fall_back => {
                Ok(false)
            }
            Err(source) => Err(DiskError::Unsupported {
                backend: Backend::Reflink,
                directory: disk.path.parent().unwrap_or(disk.path).to_owned(),
                source: source.into(),
            }),
        }
    }
}

/// Gives what was made its name.
fn put_in_place(partial: &Partial, path: &Path, claim: &Claim) -> Result<Handle, DiskError> {
    claim.finish(path, || {
        fs::hard_link(&partial.path, path).map_err(|source| failed("put in place", path, source))
    })?;
    Ok(Handle::None)
}

#[async_trait]
impl Cow for HostCow {
    fn backend(&self) -> Backend {
        self.backend
    }

    async fn observe(&self, effect: &Effect) -> Result<Observed, DiskError> {
        if Snapshot::of(effect).is_some() {
            return self.on_device(effect, |dm, disk| dm.observe(disk)).await;
        }
        CowDisk::of(effect)?;
        in_background(effect, |effect| look(CowDisk::of(effect)?)).await
    }

    async fn apply(&self, effect: &Effect) -> Result<Handle, DiskError> {
        if Snapshot::of(effect).is_some() {
            return self.on_device(effect, |dm, disk| dm.apply(disk)).await.map(|()| Handle::None);
        }
        CowDisk::of(effect)?;
        let claim = Arc::new(Claim::default());
        let _cancel = CancelOnDrop(Arc::clone(&claim));
        let this = self.clone();
        in_background(effect, move |effect| this.make(CowDisk::of(effect)?, &claim)).await
    }

    async fn grow(&self, effect: &Effect, size_bytes: u64) -> Result<(), DiskError> {
        if Snapshot::of(effect).is_some() {
            return self.on_device(effect, move |dm, disk| dm.grow(disk, size_bytes)).await;
        }
        CowDisk::of(effect)?;
        in_background(effect, move |effect| {
            let disk = CowDisk::of(effect)?;
            let path = disk.path;
            let file =
                OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NOFOLLOW).open(path);
            let file = file.map_err(|source| failed("open", path, source))?;
            let about = file.metadata().map_err(|source| failed("look at", path, source))?;
            if !about.is_file() {
                return Err(DiskError::Foreign {
                    path: path.to_owned(),
                    what: "it is no regular file".into(),
                });
            }
            let bytes = CowDisk { size_bytes, ..disk }.file_bytes_of(&file)?;
            if about.len() < bytes {
                file.set_len(bytes).map_err(|source| failed("grow", path, source))?;
            }
            Ok(())
        })
        .await
    }

    async fn undo(&self, effect: &Effect, _handle: &Handle) -> Result<(), DiskError> {
        if Snapshot::of(effect).is_some() {
            return self.on_device(effect, |dm, disk| dm.undo(disk)).await;
        }
        CowDisk::of(effect)?;
        in_background(effect, |effect| {
            let disk = CowDisk::of(effect)?;
            match fs::symlink_metadata(disk.path) {
                Ok(about) if !about.is_file() => {
                    let what = "it is no regular file".to_owned();
                    return Err(DiskError::Foreign { path: disk.path.to_owned(), what });
                }
                Ok(_) => remove_if_there(disk.path).map_err(|source| failed("remove", disk.path, source))?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(failed("look at", disk.path, source)),
            }
            remove_partials(disk.path)
        })
        .await
    }

    async fn fill(&self, effect: &Effect) -> Result<Option<Fill>, DiskError> {
        match Snapshot::of(effect) {
            Some(_) => self.on_device(effect, |dm, disk| dm.fill(disk)).await,
            None => CowDisk::of(effect).map(|_| None),
        }
    }

    async fn found(&self, instance: &InstanceId) -> Result<Vec<VmId>, DiskError> {
        if self.backend != Backend::DmSnapshot && probe::is_missing(&self.dm) {
            return Ok(Vec::new());
        }
        let (dm, prefix) = (self.dm.clone(), device_prefix(instance));
        let listed = tokio::task::spawn_blocking(move || dm.names(&prefix)).await;
        let listed = listed.unwrap_or_else(|error| Err(io::Error::other(error)));
        let names = listed.map_err(|source| DiskError::Device {
            action: "list what belongs to",
            name: device_prefix(instance),
            source,
        })?;
        let mut vms: Vec<_> = names.iter().filter_map(|name| vm_of_device(instance, name)).collect();
        vms.sort();
        vms.dedup();
        Ok(vms)
    }
}

impl HostCow {
    /// Runs blocking work on the device of an [`Effect::DmSnapshot`].
    async fn on_device<R: Send + 'static>(
        &self,
        effect: &Effect,
        work: impl FnOnce(&Dm, &Snapshot<'_>) -> Result<R, DiskError> + Send + 'static,
    ) -> Result<R, DiskError> {
        let dm = self.dm.clone();
        in_background(effect, move |effect| match Snapshot::of(effect) {
            Some(disk) => work(&dm, &disk),
            None => Err(DiskError::NotMine { effect: effect.id() }),
        })
        .await
    }
}

/// Runs blocking work on an effect.
pub(crate) async fn in_background<R: Send + 'static>(
    effect: &Effect,
    work: impl FnOnce(&Effect) -> Result<R, DiskError> + Send + 'static,
) -> Result<R, DiskError> {
    let (id, effect) = (effect.id(), effect.clone());
    tokio::task::spawn_blocking(move || work(&effect))
        .await
        .map_err(|source| DiskError::Died { effect: id, source })?
}

pub(crate) fn failed(action: &'static str, path: &Path, source: io::Error) -> DiskError {
    DiskError::Io { action, path: path.to_owned(), source }
}

/// Decides between a cancelled and a finished apply, so that after the future is dropped the disk can no longer appear.
#[derive(Debug, Default)]
struct Claim {
    cancelled: Mutex<bool>,
}

impl Claim {
    fn cancelled(&self) -> bool {
        *self.cancelled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, path: &Path, act: impl FnOnce() -> Result<(), DiskError>) -> Result<(), DiskError> {
        let cancelled = self.cancelled.lock().unwrap_or_else(PoisonError::into_inner);
        if *cancelled { Err(DiskError::Cancelled { path: path.to_owned() }) } else { act() }
    }
}

struct CancelOnDrop(Arc<Claim>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        *self.0.cancelled.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }
}

/// A disk in the making; its name goes away with it.
pub(crate) struct Partial {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
}

impl Partial {
    pub(crate) fn create(path: &Path) -> Result<Self, DiskError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{}-{number}", partial_prefix(path), std::process::id());
        let path = path.with_file_name(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        Ok(Self { file: file.map_err(|source| failed("create", &path, source))?, path })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if let Err(error) = remove_if_there(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "could not remove a half-made disk");
        }
    }
}

fn partial_prefix(path: &Path) -> String {
    format!("{}.partial-", path.file_name().unwrap_or_default().to_string_lossy())
}

/// Removes what a daemon that was killed left beside the disk.
pub(crate) fn remove_partials(path: &Path) -> Result<(), DiskError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(failed("list", directory, source)),
    };
    let prefix = partial_prefix(path);
    for entry in entries {
        let entry = entry.map_err(|source| failed("list", directory, source))?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            remove_if_there(&entry.path()).map_err(|source| failed("remove", &entry.path(), source))?;
        }
    }
    Ok(())
}

fn look(disk: CowDisk<'_>) -> Result<Observed, DiskError> {
    Ok(match fs::symlink_metadata(disk.path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Observed::Absent,
        Err(source) => return Err(failed("look at", disk.path, source)),
        Ok(about) if !about.is_file() => Observed::Foreign("it is no regular file".to_owned()),
        // Larger is fine: it was grown since.
        Ok(about) => {
            let wanted = match disk.delta {
                true => match File::open(disk.path) {
                    Ok(file) => disk.file_bytes_of(&file)?,
                    Err(source) => return Err(failed("open", disk.path, source)),
                },
                false => disk.size_bytes,
            };
            if about.len() >= wanted {
                Observed::Present(Handle::None)
            } else {
                Observed::Foreign(format!("it has {} bytes instead of {wanted}", about.len()))
            }
        }
    })
}

pub(crate) fn check_space(path: &Path, needed_bytes: u64) -> Result<(), DiskError> {
    let available_bytes = free_bytes(path)?;
    if available_bytes < needed_bytes {
        return Err(DiskError::NoSpace { path: path.to_owned(), needed_bytes, available_bytes });
    }
    Ok(())
}

impl CowDisk<'_> {
    /// How long its file is to be.
    fn file_bytes(&self, chunk_bytes: u64) -> u64 {
        if self.delta { delta_bytes(self.size_bytes, chunk_bytes) } else { self.size_bytes }
    }

    /// [`Self::file_bytes`] of a file that is there.
    fn file_bytes_of(&self, file: &File) -> Result<u64, DiskError> {
        if !self.delta {
            return Ok(self.size_bytes);
        }
        let header = format::read(file).map_err(|source| failed("use", self.path, source))?;
        Ok(self.file_bytes(header.map_or(CHUNK_BYTES, |header| header.chunk_bytes)))
    }
}

/// Whether a file in `disks` can share blocks with one in `bases`.
fn try_reflink(bases: &Path, disks: &Path) -> Result<(), DiskError> {
    let base = unnamed(bases)?;
    let attempt = base.set_len(4096).and_then(|()| {
        use io::Write;
        (&base).write_all(&[1; 4096])
    });
    attempt.map_err(|source| failed("write to", bases, source))?;
    reflink(&base, &unnamed(disks)?).map_err(|errno| {
        let source = errno.into();
        DiskError::Unsupported { backend: Backend::Reflink, directory: disks.to_owned(), source }
    })
}

/// A file that is gone when it is closed.
fn unnamed(directory: &Path) -> Result<File, DiskError> {
    let partial = Partial::create(&directory.join("probe"))?;
    partial.file.try_clone().map_err(|source| failed("create a file in", directory, source))
}

/// Makes `to` share all of `from`'s blocks (ioctl_ficlone(2)).
#[expect(unsafe_code, reason = "nix wraps no FICLONE")]
fn reflink(from: &File, to: &File) -> nix::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: both descriptors are open for the call; FICLONE takes the source's as an integer and touches no memory of ours.
    let result = unsafe { nix::libc::ioctl(to.as_raw_fd(), nix::libc::FICLONE, from.as_raw_fd()) };
    Errno::result(result).map(|_| ())
}
