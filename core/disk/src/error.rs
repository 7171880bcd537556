//! Everything that can go wrong with files and disks.

use std::{io, path::PathBuf};

use vm_host::RunError;
use vm_types::EffectId;

use crate::Backend;

/// A failed operation on a disk or file.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The effect belongs to another crate.
    #[error("{effect} is no effect on disks or files")]
    NotMine {
        /// The effect.
        effect: EffectId,
    },
    /// A path that is not below any of the daemon's directories.
    #[error("{path} is outside the daemon's directories", path = .path.display())]
    OutsideRoots {
        /// The path.
        path: PathBuf,
    },
    /// Something is there that the daemon did not make; it is left as it is.
    #[error("{path} is in the way: {what}", path = .path.display())]
    Foreign {
        /// The path.
        path: PathBuf,
        /// What is there.
        what: String,
    },
    /// The disk would be smaller than its base.
    #[error("a disk of {size_bytes} bytes is smaller than its image of {base_bytes} bytes")]
    SmallerThanBase {
        /// What was asked for.
        size_bytes: u64,
        /// What it must have at least.
        base_bytes: u64,
    },
    /// A disk that could not hold what is to be on it.
    #[error("{size_bytes} bytes are too few for {path}", path = .path.display())]
    TooSmall {
        /// The disk.
        path: PathBuf,
        /// What was asked for.
        size_bytes: u64,
        /// What it must have at least.
        least_bytes: u64,
    },
    /// A filesystem that the daemon cannot make.
    #[error("cannot make the filesystem {filesystem:?} of {path}", path = .path.display())]
    Filesystem {
        /// The disk.
        path: PathBuf,
        /// What was asked for.
        filesystem: String,
    },
    /// A disk that is to grow, and that somebody has open.
    #[error("{path} is in use and cannot grow", path = .path.display())]
    InUse {
        /// The disk.
        path: PathBuf,
    },
    /// A tool of e2fsprogs failed.
    #[error("could not {action} {path}", path = .path.display())]
    Tool {
        /// What was being done, e.g. `make the filesystem of`.
        action: &'static str,
        /// The disk.
        path: PathBuf,
        /// Why.
        source: RunError,
    },
    /// The filesystem has not enough room.
    #[error("not enough space for {path}: {needed_bytes} bytes needed, {available_bytes} available", path = .path.display())]
    NoSpace {
        /// What was to be made.
        path: PathBuf,
        /// How much is needed, with a margin.
        needed_bytes: u64,
        /// How much there is.
        available_bytes: u64,
    },
    /// An operation on a block device failed.
    #[error("could not {action} the disk {name}")]
    Device {
        /// What was being done, e.g. `create`.
        action: &'static str,
        /// The device-mapper name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A block device that is to go, and that somebody has open.
    #[error("the disk {name} is in use and cannot be removed")]
    Busy {
        /// The device-mapper name.
        name: String,
        /// Our node of it.
        node: PathBuf,
    },
    /// The kernel has given a disk up.
    #[error("the differences in {path} could not be put together with their base", path = .path.display())]
    Invalid {
        /// The file of differences.
        path: PathBuf,
    },
    /// A forced backend does not work here.
    #[error("the disk backend {backend} does not work in {directory}", directory = .directory.display())]
    Unsupported {
        /// The backend.
        backend: Backend,
        /// Where it was to work.
        directory: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// An operation on a file failed.
    #[error("could not {action} {path}", path = .path.display())]
    Io {
        /// What was being done, e.g. `open`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The work was given up because nobody waits for it any more.
    #[error("making {path} was cancelled", path = .path.display())]
    Cancelled {
        /// What was being made.
        path: PathBuf,
    },
    /// The thread doing the work died.
    #[error("the thread working on {effect} died")]
    Died {
        /// The effect.
        effect: EffectId,
        /// How.
        source: tokio::task::JoinError,
    },
    /// Asked for by a test.
    #[error("{effect} was made to fail")]
    Injected {
        /// The effect.
        effect: EffectId,
    },
}

impl DiskError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotMine { .. } | Self::OutsideRoots { .. } | Self::Injected { .. } => return None,
            Self::Foreign { path, .. } => {
                format!("look at {} and move it away, then try again", path.display())
            }
            Self::SmallerThanBase { base_bytes, .. } => {
                format!("use `--disk {}M` or more", base_bytes.div_ceil(1 << 20))
            }
            Self::TooSmall { least_bytes, .. } => {
                format!("ask for at least {} MiB", least_bytes.div_ceil(1 << 20))
            }
            Self::Filesystem { .. } => "ask for `ext4`, or for none and make it in the guest".to_owned(),
            Self::InUse { path } => {
                format!("stop the VM that uses it; `fuser {}` shows who has it open", path.display())
            }
            Self::Tool { source: RunError::NotInstalled { .. }, .. } => {
                "install the package e2fsprogs".to_owned()
            }
            Self::Tool { path, .. } => format!(
                "look at the disk with `e2fsck -f {}`, after copying it if what is on it matters",
                path.display()
            ),
            Self::NoSpace { needed_bytes, available_bytes, .. } => format!(
                "free {} MiB, e.g. with `vm rm` or `vm image rm`, or move the daemon's state directory",
                needed_bytes.saturating_sub(*available_bytes).div_ceil(1 << 20)
            ),
            Self::Unsupported { backend: Backend::DmSnapshot, .. } => {
                "set `disk.backend` to \"auto\", or use a kernel with device-mapper and loop devices"
                    .to_owned()
            }
            Self::Unsupported { .. } => {
                "set `disk.backend` to \"auto\", or put the state directory on XFS or btrfs".to_owned()
            }
            Self::Device { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => "the daemon needs root for device-mapper".to_owned(),
                _ => "the kernel's log (`dmesg`) says more; `dmsetup info` shows what is there".to_owned(),
            },
            Self::Busy { name, node } => format!(
                "unmount or close it, then try again; `fuser -v {}` and `lsblk /dev/mapper/{name}` show who has it open",
                node.display()
            ),
            Self::Invalid { .. } => {
                "the kernel's log (`dmesg`) says why; what is on it is lost if the file is".to_owned()
            }
            Self::Io { source, path, .. } => match source.kind() {
                io::ErrorKind::NotFound => format!("check that {} exists", path.display()),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    format!("check that the daemon may write to {}", path.display())
                }
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    format!("free some space on the filesystem of {}", path.display())
                }
                _ => return None,
            },
            Self::Cancelled { .. } => return None,
            Self::Died { .. } => "this is a bug; the daemon's log says more".to_owned(),
        })
    }
}
