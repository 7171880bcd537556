//! The trait that makes a VM's disk from a read-only base.

use std::{fmt, path::Path};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vm_types::{Effect, Handle, Observed};

use crate::DiskError;

/// How disks share their base's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The filesystem shares blocks until one is written (XFS, btrfs): instant, no space.
    Reflink,
    /// A sparse copy: works everywhere, costs the base's real size in time and space.
    Copy,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reflink => "reflink",
            Self::Copy => "copy",
        })
    }
}

/// Applies [`Effect::CowDisk`]. All three are idempotent: what is so already is success.
#[async_trait]
pub trait Cow: Send + Sync + fmt::Debug {
    /// How disks are made here, for `doctor`.
    fn backend(&self) -> Backend;

    /// Whether the disk is there. A disk is never there in part.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], or the file cannot be looked at.
    async fn observe(&self, effect: &Effect) -> Result<Observed, DiskError>;

    /// Makes the disk; one that is there is kept, it may hold data. Dropping the future stops the work: afterwards the disk is
    /// there or not, and nothing changes that any more; what was copied is removed soon after.
    /// The copy is not flushed to the host's medium.
    ///
    /// # Errors
    /// Any [`DiskError`]; nothing is left behind.
    async fn apply(&self, effect: &Effect) -> Result<Handle, DiskError>;

    /// Makes a disk that no VMM has open larger; one that is as large already is left as it is. What is on it does not grow with it.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], [`DiskError::Foreign`], or the file cannot be changed.
    async fn grow(&self, effect: &Effect, size_bytes: u64) -> Result<(), DiskError>;

    /// Removes the disk.
    ///
    /// # Errors
    /// [`DiskError::NotMine`], [`DiskError::Foreign`], or the file cannot be removed.
    async fn undo(&self, effect: &Effect, handle: &Handle) -> Result<(), DiskError>;
}

/// The fields of [`Effect::CowDisk`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct CowDisk<'a> {
    pub(crate) base: &'a Path,
    pub(crate) path: &'a Path,
    pub(crate) size_bytes: u64,
}

impl<'a> CowDisk<'a> {
    pub(crate) fn of(effect: &'a Effect) -> Result<Self, DiskError> {
        match effect {
            Effect::CowDisk { base, path, size_bytes, .. } => {
                Ok(Self { base, path, size_bytes: *size_bytes })
            }
            _ => Err(DiskError::NotMine { effect: effect.id() }),
        }
    }

    pub(crate) fn check_size(&self, base_bytes: u64) -> Result<(), DiskError> {
        if self.size_bytes < base_bytes {
            return Err(DiskError::SmallerThanBase { size_bytes: self.size_bytes, base_bytes });
        }
        Ok(())
    }
}
