//! Images and kernels as the catalogue knows them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ImageDigest, KernelId};

/// A bootable root filesystem in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImageRecord {
    /// SHA-256 of the root filesystem's source (the tar stream).
    pub digest: ImageDigest,
    /// The names it goes by, e.g. `debian:bookworm`.
    pub references: Vec<String>,
    /// Size of the filesystem in bytes; the least disk a VM of it can have.
    pub size_bytes: u64,
    /// Bytes it takes on the host's disk.
    pub used_bytes: u64,
    /// Creation, seconds since the Unix epoch.
    pub created_at: u64,
    /// Where it came from, for people, e.g. `mmdebstrap bookworm`.
    pub source: String,
}

/// A kernel in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KernelRecord {
    /// Content address.
    pub id: KernelId,
    /// `uname -r` of it, e.g. `6.1.0-37-cloud-amd64`.
    pub release: String,
    /// Where it came from, e.g. `debian`.
    pub source: String,
    /// Creation, seconds since the Unix epoch.
    pub created_at: u64,
    /// Used where a VM names no kernel; at most one is.
    pub default: bool,
}
