//! What requests and answers about images and kernels hold.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use vm_types::{
    ImageDigest, KernelId,
    image::{CatalogueImage, DiskUsage, ImageRecord, ImportKernel, KernelRecord, PrunedImages},
};

/// An image to import.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportImage {
    /// Absolute path on the daemon's host, or an https address: a bundle, a root filesystem's tarball, an image layout (a directory,
    /// or one in a tar archive), or what `docker save` writes.
    pub source: String,
    /// The name it gets; that which it brings along if absent.
    #[serde(default)]
    pub reference: Option<String>,
    /// SHA-256 that the file must have, 64 hexadecimal digits; an address needs it.
    #[serde(default)]
    pub sha256: Option<String>,
}

/// An image that was made of a guest's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MadeImage {
    /// The image.
    #[serde(flatten)]
    pub image: ImageRecord,
    /// What is not in it, or not as it was at any one time, for people.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// What an image is to be made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommitImage {
    /// Name or id of a VM, running or off.
    pub vm: String,
    /// The name that the image gets.
    pub reference: String,
    /// A remark for its history.
    #[serde(default)]
    pub message: Option<String>,
    /// Instructions of a Dockerfile that change how it runs, e.g. `ENV A=b`.
    #[serde(default)]
    pub changes: Vec<String>,
}

/// What an image is to be built of, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildImage {
    /// Absolute path of the directory on the daemon's host that files are copied from.
    pub directory: PathBuf,
    /// Absolute path of the Dockerfile.
    pub file: PathBuf,
    /// The names that the image gets.
    #[serde(default)]
    pub references: Vec<String>,
    /// Values for its `ARG`s.
    #[serde(default)]
    pub arguments: BTreeMap<String, String>,
    /// The stage to build; the last one if absent.
    #[serde(default)]
    pub target: Option<String>,
    /// Do each step anew.
    #[serde(default)]
    pub no_cache: bool,
    /// CPUs of the VM that commands run in; the daemon's default if absent.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// Its memory in MiB; the daemon's default if absent.
    #[serde(default)]
    pub memory_mib: Option<u64>,
}

/// Where an image is to be written, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportImage {
    /// Reference or digest.
    pub image: String,
    /// Absolute path on the daemon's host, where nothing may be.
    pub path: PathBuf,
    /// As what.
    pub format: ImageFormat,
}

/// What an image is written as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// An image layout in a tar archive.
    #[default]
    OciArchive,
    /// An image layout in a directory.
    Oci,
    /// What `docker save` writes and `docker load` takes.
    DockerArchive,
    /// One file with the root filesystem and the image's kernel, if it names one.
    Bundle,
}

/// Who we are at a registry.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// `HOST[:PORT]`.
    pub registry: String,
    /// The name there.
    pub user: String,
    /// The password or token.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { registry, user, .. } = self;
        f.debug_struct("Login").field("registry", registry).field("user", user).finish_non_exhaustive()
    }
}

/// Which images to remove, of those that no VM uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PruneImages {
    /// All, and not only those without a name.
    pub all: bool,
    /// Say which, remove none.
    pub dry_run: bool,
}

/// An image that is a file of the host's, used where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterImage {
    /// Absolute path of a file on the daemon's host that holds an ext4 filesystem.
    pub path: PathBuf,
    /// The name it gets.
    pub reference: String,
    /// What its VMs boot if they name no kernel: one of the catalogue by id or release, or the absolute path of a file.
    #[serde(default)]
    pub kernel: Option<String>,
    /// Absolute path of the directory with that file's modules, the one with `modules.dep`.
    #[serde(default)]
    pub modules: Option<PathBuf>,
}
