//! Images and kernels as the catalogue knows them.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ImageDigest, KernelId};

/// A bootable root filesystem in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImageRecord {
    /// What identifies it: of an image from a registry, a layout or docker's archive the digest of its configuration; of a root
    /// filesystem's tarball the SHA-256 of the tar stream; of a registered file the SHA-256 of the file.
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
    /// What its maker has settled.
    #[serde(default)]
    pub config: ImageConfig,
    /// What it was made of; absent where that was one tarball or file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<ImageOrigin>,
    /// The file of the host's that it is, where it is not the store's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registered: Option<RegisteredFile>,
    /// The kernel that VMs of it boot if they name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelId>,
}

/// How commands are run in an image
/// (<https://github.com/opencontainers/image-spec/blob/v1.1.0/config.md>).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ImageConfig {
    /// `NAME=VALUE`, in the image's order.
    pub env: Vec<String>,
    /// Where commands run; the user's home if absent.
    pub working_dir: Option<String>,
    /// Who runs them: `USER`, `UID`, `USER:GROUP` or `UID:GID`; root if absent.
    pub user: Option<String>,
    /// What is run where no command is given.
    pub entrypoint: Vec<String>,
    /// What is put behind the entry point; run by itself where there is none.
    pub cmd: Vec<String>,
    /// Notes of its maker.
    pub labels: BTreeMap<String, String>,
    /// What it listens on, e.g. `80/tcp`.
    pub exposed_ports: Vec<String>,
}

/// Of what an image was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImageOrigin {
    /// Digest of its manifest, as registries know it; absent for docker's archives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
    /// Digest of its configuration, e.g. `sha256:…`.
    pub config: String,
    /// The lowest first.
    pub layers: Vec<ImageLayer>,
    /// How it came to be, the oldest step first.
    #[serde(default)]
    pub history: Vec<ImageStep>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImageLayer {
    /// Digest of the layer as it is kept, e.g. `sha256:…`.
    pub digest: String,
    /// Digest of its tar stream.
    pub diff_id: String,
    /// Bytes, as it is kept.
    pub size_bytes: u64,
    /// E.g. `application/vnd.oci.image.layer.v1.tar+gzip`.
    pub media_type: String,
}

/// A step of an image's making.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ImageStep {
    /// When (RFC 3339).
    pub created: Option<String>,
    /// By what command.
    pub created_by: Option<String>,
    /// What its maker says of it.
    pub comment: Option<String>,
    /// It made no layer.
    pub empty_layer: bool,
}

/// A file that is used where it is, and as it was when it was registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RegisteredFile {
    /// Absolute, without symbolic links.
    pub path: PathBuf,
    /// Bytes.
    pub size_bytes: u64,
    /// Last change of the content, nanoseconds since the Unix epoch.
    pub modified_nanos: i64,
    /// Its number on its filesystem.
    pub inode: u64,
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
    /// Brought by an image alone, for that image's VMs: others boot it only if they name it.
    #[serde(default)]
    pub of_image: bool,
}

/// An image that a catalogue has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CatalogueImage {
    /// Its name there.
    pub name: String,
    /// What it is, for people.
    pub description: String,
    /// What it runs on, e.g. `linux/amd64`.
    pub platform: String,
    /// SHA-256 of its file, 64 hexadecimal digits.
    pub sha256: String,
    /// Where its file is, for people.
    pub source: String,
    /// The catalogue that has it.
    pub catalogue: String,
}

/// What a prune has removed, or would.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PrunedImages {
    /// The images.
    pub images: Vec<ImageRecord>,
    /// What they and their layers took on the disk.
    pub bytes: u64,
}

/// What the state directory's parts take on the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskUsage {
    /// Root filesystems of images.
    pub images: u64,
    /// Of these, those that no VM uses.
    pub images_unused: u64,
    /// Layers and what else images are made of.
    pub layers: u64,
    /// Kernels with their modules.
    pub kernels: u64,
    /// VMs, with their disks.
    pub vms: u64,
}

/// Where a kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "from", rename_all = "snake_case", deny_unknown_fields)]
pub enum ImportKernel {
    /// Debian's cloud kernel package.
    Debian,
    /// Files on the daemon's host.
    Files {
        /// Absolute path of a bzImage or vmlinux.
        kernel: PathBuf,
        /// Absolute path of its module directory (the one with `modules.dep`).
        modules: Option<PathBuf>,
    },
    /// An artifact of a registry or an image layout.
    Artifact {
        /// `[REGISTRY/]NAME[:TAG][@DIGEST]`, `oci:DIR[:TAG]` or `oci-archive:FILE[:TAG]`, with absolute paths.
        reference: String,
    },
    /// What a bundle has besides its root filesystem, or alone.
    Bundle {
        /// Absolute path on the daemon's host, or an https address.
        source: String,
        /// SHA-256 that the file must have, 64 hexadecimal digits; an address needs it.
        #[serde(default)]
        sha256: Option<String>,
    },
}
