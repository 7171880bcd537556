//! The trait that makes a VM's disk from a read-only base.

use std::{fmt, path::Path};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vm_types::{Effect, Handle, InstanceId, Observed, VmId};

use crate::DiskError;

/// How disks share their base's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The filesystem shares blocks until one is written (XFS, btrfs): instant, no space.
    Reflink,
    /// Device-mapper keeps what differs from the base in a file of its own: instant, no space, on any filesystem.
    #[serde(rename = "dm-snapshot")]
    DmSnapshot,
    /// A sparse copy: works everywhere, costs the base's real size in time and space.
    Copy,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reflink => "reflink",
            Self::DmSnapshot => "dm-snapshot",
            Self::Copy => "copy",
        })
    }
}

/// How much of a disk differs from its base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// Bytes of differences, with what is noted of them.
    pub used_bytes: u64,
    /// What there is room for in the file of differences.
    pub total_bytes: u64,
    /// The kernel could not write a difference down and has given the disk up: whoever uses it gets errors. Its next start goes on
    /// from what was written by then.
    pub invalid: bool,
}

/// Applies [`Effect::CowDisk`] and [`Effect::DmSnapshot`]. All is idempotent: what is so already is success.
///
/// A disk whose [`Effect::CowDisk`] has `delta` set is a file of differences, of which an [`Effect::DmSnapshot`] makes a device.
/// Such disks are also served where the backend for new ones is another.
#[async_trait]
pub trait Cow: Send + Sync + fmt::Debug {
    /// How new disks are made here. With [`Backend::DmSnapshot`] they are to be asked for with `delta`.
    fn backend(&self) -> Backend;

    /// Whether the disk is there. A file is never there in part; a device that is half made, or held back, is
    /// [`Observed::Foreign`], with what is wrong with it.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], or it cannot be looked at.
    async fn observe(&self, effect: &Effect) -> Result<Observed, DiskError>;

    /// Makes the disk; one that is there is kept, it may hold data. Dropping the future stops the work: afterwards the disk is
    /// there or not, and nothing changes that any more; what was copied is removed soon after.
    /// The copy is not flushed to the host's medium.
    ///
    /// A device that is half made is completed.
    ///
    /// # Errors
    /// Any [`DiskError`]; nothing is left behind.
    async fn apply(&self, effect: &Effect) -> Result<Handle, DiskError>;

    /// Makes a disk larger; one that is as large already is left as it is. What is on it does not grow with it.
    /// A file is one that no VMM has open; a device may be in use.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], [`DiskError::Foreign`], or it cannot be changed.
    async fn grow(&self, effect: &Effect, size_bytes: u64) -> Result<(), DiskError>;

    /// Removes the disk. Of a device, what it is made of is there again for others; its file of differences stays.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], [`DiskError::Foreign`], [`DiskError::Busy`] for a device that stays open, or it cannot be removed.
    async fn undo(&self, effect: &Effect, handle: &Handle) -> Result<(), DiskError>;

    /// How full a device's file of differences is; `None` for other disks, and while it is not put together.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], or it cannot be looked at.
    async fn fill(&self, effect: &Effect) -> Result<Option<Fill>, DiskError> {
        let _ = effect;
        Ok(None)
    }

    /// VMs of which there are devices of this daemon's.
    ///
    /// # Errors
    /// They cannot be listed.
    async fn found(&self, instance: &InstanceId) -> Result<Vec<VmId>, DiskError> {
        let _ = instance;
        Ok(Vec::new())
    }
}

/// The fields of [`Effect::DmSnapshot`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Snapshot<'a> {
    pub(crate) name: &'a str,
    pub(crate) base: &'a Path,
    pub(crate) delta: &'a Path,
    pub(crate) node: &'a Path,
    pub(crate) size_bytes: u64,
}

impl<'a> Snapshot<'a> {
    /// `None` for other effects.
    pub(crate) fn of(effect: &'a Effect) -> Option<Self> {
        match effect {
            Effect::DmSnapshot { name, base, delta, node, size_bytes } => {
                Some(Self { name, base, delta, node, size_bytes: *size_bytes })
            }
            _ => None,
        }
    }
}

/// The fields of [`Effect::CowDisk`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct CowDisk<'a> {
    pub(crate) base: &'a Path,
    pub(crate) path: &'a Path,
    pub(crate) size_bytes: u64,
    pub(crate) delta: bool,
}

impl<'a> CowDisk<'a> {
    pub(crate) fn of(effect: &'a Effect) -> Result<Self, DiskError> {
        match effect {
            Effect::CowDisk { base, path, size_bytes, delta } => {
                Ok(Self { base, path, size_bytes: *size_bytes, delta: *delta })
            }
            _ => Err(DiskError::NotMine { effect: effect.id() }),
        }
    }
}

pub(crate) fn check_size(size_bytes: u64, base_bytes: u64) -> Result<(), DiskError> {
    if size_bytes < base_bytes {
        return Err(DiskError::SmallerThanBase { size_bytes, base_bytes });
    }
    Ok(())
}
