//! Plugins' disks: sparse images that keep what is on them.
//!
//! ```text
//!   absent ──> data.raw.partial-PID-N ── mke2fs ──link──> data.raw, then unlink the partial name
//!   smaller ──> e2fsck ── longer file ── resize2fs      (nobody has it open)
//!   as large or larger ──> as it is
//! ```
//!
//! A disk that is there is never made shorter, never formatted, and never replaced: link(2) does not. What is on it is the
//! guest's; where that is no longer the filesystem that was made, only the file grows.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::errno::Errno;
use vm_host::{HostCommand, RunError, Runner, files::remove_if_there};
use vm_types::{Effect, Handle, Observed};

use crate::{
    DiskError,
    host::{MARGIN_BYTES, Partial, check_space, failed, in_background, remove_partials},
    root::{Place, Roots},
};

/// The only filesystem that is made.
const EXT4: &str = "ext4";
const BLOCK: u64 = 4096;
/// Less holds no journal.
const EXT4_LEAST: u64 = 16 << 20;
/// A filesystem that is so much smaller than its disk, and no more, was rounded: resize2fs(8) leaves out a last group that would
/// hold little but its own tables.
const ROUNDING: u64 = 4 << 20;
const MAKE_TIMEOUT: Duration = Duration::from_secs(600);
/// Checking reads all of a disk's tables.
const GROW_TIMEOUT: Duration = Duration::from_secs(3600);
const MODE: u32 = 0o600;

/// Features, spelled out so that a host's `mke2fs.conf` changes nothing. Every kernel since 4.5 knows them all.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
                        large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// Applies [`Effect::Disk`]. All operations are idempotent, and none of them follows a symbolic link below a root.
#[derive(Debug, Clone)]
pub struct Disks {
    roots: Roots,
    runner: Arc<dyn Runner>,
}

/// The fields of [`Effect::Disk`].
#[derive(Debug, Clone, Copy)]
struct Disk<'a> {
    path: &'a Path,
    /// In whole blocks.
    size_bytes: u64,
    has_ext4: bool,
}

/// A disk's file as it was found, or made.
enum Begun {
    /// To be filled and put in place.
    New(Making),
    /// To be grown.
    Smaller { file: File, ext4: bool },
    /// Nothing to do.
    Done,
}

/// A new disk. The order of the fields is that of their end: the partial name is one in the open directory.
struct Making {
    partial: Partial,
    place: Place,
}

impl Disks {
    /// Only what is strictly below one of `roots` will ever be touched. The roots themselves are not made.
    pub fn new(roots: impl IntoIterator<Item = PathBuf>, runner: Arc<dyn Runner>) -> Self {
        Self { roots: Roots::new(roots.into_iter().collect()), runner }
    }

    /// Whether the disk is there, and as large as it should be.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], [`DiskError::OutsideRoots`], or it cannot be looked at.
    pub async fn observe(&self, effect: &Effect) -> Result<Observed, DiskError> {
        let roots = self.roots.clone();
        in_background(effect, move |effect| {
            let disk = Disk::of(effect)?;
            let Some(place) = roots.place(disk.path, false)? else { return Ok(Observed::Absent) };
            let Some(file) = (match disk.open(&place, false) {
                Err(DiskError::Foreign { what, .. }) => return Ok(Observed::Foreign(what)),
                other => other?,
            }) else {
                return Ok(Observed::Absent);
            };
            let length = file.metadata().map_err(disk.failed("look at"))?.len();
            Ok(if length < disk.size_bytes {
                Observed::Foreign(format!("it has {length} bytes instead of {}", disk.size_bytes))
            } else if disk.lags(&file)? {
                Observed::Foreign("what is on it has not grown with it".to_owned())
            } else {
                Observed::Present(Handle::None)
            })
        })
        .await
    }

    /// Makes the disk, whole or not at all, or grows it with the filesystem that was made on it. Missing directories above are
    /// made too and not undone. One call for one disk at a time.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], [`DiskError::OutsideRoots`], [`DiskError::Foreign`], [`DiskError::Filesystem`],
    /// [`DiskError::TooSmall`], [`DiskError::NoSpace`], [`DiskError::InUse`] where one that is to grow is open,
    /// [`DiskError::Tool`], or a failed file operation. A disk that was there has all that was on it.
    pub async fn apply(&self, effect: &Effect) -> Result<Handle, DiskError> {
        Disk::wanted(effect)?;
        let roots = self.roots.clone();
        let begun = in_background(effect, move |effect| Disk::wanted(effect)?.begin(&roots)).await?;
        let disk = Disk::wanted(effect)?;
        match begun {
            Begun::Done => {}
            Begun::New(making) => {
                if disk.has_ext4 {
                    self.run(disk, "make the filesystem of", mke2fs(&making.partial.file)).await?;
                }
                in_background(effect, move |effect| Disk::of(effect)?.put_in_place(making)).await?;
            }
            Begun::Smaller { file, ext4 } => {
                if ext4 {
                    self.check(disk, &file).await?;
                }
                let size_bytes = disk.size_bytes;
                let file = in_background(effect, move |effect| {
                    let disk = Disk::of(effect)?;
                    if file.metadata().map_err(disk.failed("look at"))?.len() < size_bytes {
                        file.set_len(size_bytes).map_err(disk.failed("grow"))?;
                    }
                    file.sync_all().map_err(disk.failed("grow"))?;
                    Ok(file)
                })
                .await?;
                if ext4 {
                    let command = tool("resize2fs", GROW_TIMEOUT).arg(by_descriptor(&file));
                    self.run(disk, "grow the filesystem of", command).await?;
                }
            }
        }
        Ok(Handle::None)
    }

    /// Removes the disk, with all that is on it.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], [`DiskError::OutsideRoots`], [`DiskError::Foreign`], or a failed file operation.
    pub async fn undo(&self, effect: &Effect, _handle: &Handle) -> Result<(), DiskError> {
        let roots = self.roots.clone();
        in_background(effect, move |effect| {
            let disk = Disk::of(effect)?;
            let Some(place) = roots.place(disk.path, false)? else { return Ok(()) };
            if disk.look(&place)? {
                remove_if_there(&place.path()).map_err(disk.failed("remove"))?;
            }
            remove_partials(&place.path())
        })
        .await
    }

    /// Mends what a guest that was killed left, by the journal, and makes sure that growing finds the filesystem whole.
    async fn check(&self, disk: Disk<'_>, file: &File) -> Result<(), DiskError> {
        let command = tool("e2fsck", GROW_TIMEOUT).args(["-f", "-p"]).arg(by_descriptor(file));
        match self.runner.run(command).await {
            // "File system errors corrected" (e2fsck(8)).
            Err(RunError::Failed { status, .. }) if status == "exit status: 1" => Ok(()),
            other => disk.outcome("check the filesystem of", other),
        }
    }

    async fn run(&self, disk: Disk<'_>, action: &'static str, command: HostCommand) -> Result<(), DiskError> {
        disk.outcome(action, self.runner.run(command).await)
    }
}

impl<'a> Disk<'a> {
    fn of(effect: &'a Effect) -> Result<Self, DiskError> {
        match effect {
            Effect::Disk { path, size_bytes, filesystem } => Ok(Self {
                path,
                size_bytes: size_bytes.checked_next_multiple_of(BLOCK).unwrap_or(*size_bytes),
                has_ext4: filesystem.as_deref() == Some(EXT4),
            }),
            _ => Err(DiskError::NotMine { effect: effect.id() }),
        }
    }

    /// As [`Self::of`], where it can be made.
    fn wanted(effect: &'a Effect) -> Result<Self, DiskError> {
        let disk = Self::of(effect)?;
        if let Effect::Disk { filesystem: Some(name), .. } = effect
            && !disk.has_ext4
        {
            return Err(DiskError::Filesystem { path: disk.path.to_owned(), filesystem: name.clone() });
        }
        let least_bytes = if disk.has_ext4 { EXT4_LEAST } else { BLOCK };
        if disk.size_bytes < least_bytes {
            let size_bytes = disk.size_bytes;
            return Err(DiskError::TooSmall { path: disk.path.to_owned(), size_bytes, least_bytes });
        }
        Ok(disk)
    }

    fn begin(self, roots: &Roots) -> Result<Begun, DiskError> {
        let place = roots
            .place(self.path, true)?
            .ok_or_else(|| self.failed("open the directory of")(io::ErrorKind::NotFound.into()))?;
        let Some(file) = self.open(&place, true)? else {
            remove_partials(&place.path())?;
            check_space(self.path, MARGIN_BYTES)?;
            let partial = Partial::create(&place.path())?;
            // Whatever the umask.
            partial.file.set_permissions(fs::Permissions::from_mode(MODE)).map_err(self.failed("create"))?;
            partial.file.set_len(self.size_bytes).map_err(self.failed("create"))?;
            return Ok(Begun::New(Making { partial, place }));
        };
        let about = file.metadata().map_err(self.failed("look at"))?;
        if about.mode() & 0o7777 != MODE {
            file.set_permissions(fs::Permissions::from_mode(MODE)).map_err(self.failed("set the mode of"))?;
        }
        if about.len() >= self.size_bytes && !self.lags(&file)? {
            return Ok(Begun::Done);
        }
        if is_open_elsewhere(&file) {
            return Err(DiskError::InUse { path: self.path.to_owned() });
        }
        let ext4 = self.has_ext4 && ext4_bytes(&file).map_err(self.failed("read"))?.is_some();
        Ok(Begun::Smaller { file, ext4 })
    }

    fn put_in_place(self, making: Making) -> Result<(), DiskError> {
        // A kept disk outlives a loss of power.
        making.partial.file.sync_all().map_err(self.failed("write"))?;
        fs::hard_link(&making.partial.path, making.place.path()).map_err(self.failed("put in place"))?;
        drop(making.partial);
        making.place.sync().map_err(self.failed("put in place"))
    }

    /// Whether something of our kind is there.
    fn look(self, place: &Place) -> Result<bool, DiskError> {
        match fs::symlink_metadata(place.path()) {
            Ok(about) if about.is_file() => Ok(true),
            Ok(_) => {
                Err(DiskError::Foreign { path: self.path.to_owned(), what: "it is no regular file".into() })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(self.failed("look at")(error)),
        }
    }

    fn open(self, place: &Place, write: bool) -> Result<Option<File>, DiskError> {
        if !self.look(place)? {
            return Ok(None);
        }
        let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
        let opened = OpenOptions::new().read(true).write(write).custom_flags(flags).open(place.path());
        opened.map(Some).map_err(self.failed("open"))
    }

    /// Whether growing was broken off between the file and what is on it.
    fn lags(self, file: &File) -> Result<bool, DiskError> {
        if !self.has_ext4 {
            return Ok(false);
        }
        let length = file.metadata().map_err(self.failed("look at"))?.len();
        let on_it = ext4_bytes(file).map_err(self.failed("read"))?;
        Ok(on_it.is_some_and(|bytes| bytes.saturating_add(ROUNDING) < length))
    }

    fn failed(self, action: &'static str) -> impl Fn(io::Error) -> DiskError {
        move |source| failed(action, self.path, source)
    }

    fn outcome<T>(self, action: &'static str, result: Result<T, RunError>) -> Result<(), DiskError> {
        match result {
            Ok(_) => Ok(()),
            Err(source) => Err(DiskError::Tool { action, path: self.path.to_owned(), source }),
        }
    }
}

/// The size in bytes of the ext4 on a disk; `None` where there is none (Linux, Documentation/filesystems/ext4/super.rst).
fn ext4_bytes(file: &File) -> io::Result<Option<u64>> {
    let mut superblock = [0; 1024];
    match file.read_exact_at(&mut superblock, 1024) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let word = |at: usize| {
        u64::from(u32::from_le_bytes([
            superblock[at],
            superblock[at + 1],
            superblock[at + 2],
            superblock[at + 3],
        ]))
    };
    let magic = u16::from_le_bytes([superblock[0x38], superblock[0x39]]);
    let block = 1024_u64.checked_shl(word(0x18) as u32).filter(|bytes| *bytes <= 64 << 10);
    let (Some(block), 0xef53) = (block, magic) else { return Ok(None) };
    // The upper half counts with the feature 64bit only.
    let high = if word(0x60) & 0x80 == 0 { 0 } else { word(0x150) << 32 };
    Ok((high | word(0x04)).checked_mul(block))
}

fn mke2fs(file: &File) -> HostCommand {
    // All of the file is holes, so nothing is written that is zero, and no kernel need do it later: the disk stays sparse.
    tool("mkfs.ext4", MAKE_TIMEOUT)
        .args(["-q", "-F", "-b", &BLOCK.to_string(), "-m", "0", "-O", FEATURES, "-E"])
        .arg("root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,assume_storage_prezeroed=1,nodiscard")
        .arg(by_descriptor(file))
}

fn tool(program: &str, timeout: Duration) -> HostCommand {
    let mut command = HostCommand::new(program).timeout(timeout);
    command.env.push(("LC_ALL".into(), "C".into()));
    command
}

/// A path by which another process opens this very file, whatever its name leads to by then.
fn by_descriptor(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

/// Whether anybody else has the file open, a VMM above all: the kernel gives a lease for writing to the only opener there is
/// (fcntl(2)). Where it gives none to anybody, this cannot tell, and the caller's knowledge must do.
#[expect(unsafe_code, reason = "nix wraps no F_SETLEASE")]
fn is_open_elsewhere(file: &File) -> bool {
    use nix::libc;
    /// `include/uapi/asm-generic/fcntl.h`
    const F_SETSIG: libc::c_int = 10;
    let set = |what: libc::c_int, value: libc::c_int| {
        // SAFETY: the descriptor is open for the call, and both F_SETSIG and F_SETLEASE take an integer.
        Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), what, value) })
    };
    // Whoever opens the file in this moment has the kernel send a signal to us, by default one that would end us.
    if set(F_SETSIG, libc::SIGURG).is_err() {
        return false;
    }
    match set(libc::F_SETLEASE, libc::F_WRLCK) {
        Ok(_) => {
            // Or the tools that are to open it would have to wait.
            let _ = set(libc::F_SETLEASE, libc::F_UNLCK);
            false
        }
        Err(error) => error == Errno::EAGAIN,
    }
}
