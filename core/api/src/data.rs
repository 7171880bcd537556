//! What requests and answers hold.

use std::{collections::BTreeMap, net::Ipv4Addr, path::PathBuf, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
pub use vm_types::{
    ImageDigest, KernelId, OperationId, VmId, VmName,
    event::{Event, EventKind},
    image::{ImageRecord, KernelRecord},
    operation::{OperationKind, OperationProgress},
    vm::{ExitStatus, FailedAt, NetworkMode, RestartPolicy, VmState, VmmKind},
};

use crate::Problem;

/// A VM to make. What is left out is taken from the daemon's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateVm {
    /// Its name; one is made up if absent.
    pub name: Option<VmName>,
    /// Image reference or digest; acquired first if it is one that can be and is not there.
    pub image: Option<String>,
    /// Kernel id or release.
    pub kernel: Option<String>,
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory in MiB.
    pub memory_mib: Option<u64>,
    /// Root disk in bytes.
    pub disk_bytes: Option<u64>,
    /// The most bytes that it reads from and writes to its root disk in a second, 4096 or more; 0 means any number.
    pub disk_bytes_per_second: Option<u64>,
    /// The most reads and writes of its root disk in a second; 0 means any number.
    pub disk_operations_per_second: Option<u64>,
    /// How it reaches the network.
    pub network: Option<NetworkMode>,
    /// Free-form labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it is started again when it ends by itself.
    pub restart: Option<RestartPolicy>,
    /// Delete it when it is this many seconds old.
    pub ttl_seconds: Option<u64>,
    /// Stop it after this many seconds without an SSH connection.
    pub idle_stop_seconds: Option<u64>,
    /// What runs it; the daemon's choice if absent.
    pub vmm: Option<VmmKind>,
    /// Delete it when the calling process ends.
    pub ephemeral: bool,
    /// Start it in the same operation.
    pub start: bool,
}

/// How to stop a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StopVm {
    /// Seconds the guest gets to shut down before it is killed; the configuration's if absent.
    pub grace_seconds: Option<u64>,
}

/// What to change of a VM; what is left out stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SetVm {
    /// Virtual CPUs; a running VM has them after its next start.
    pub cpus: Option<u32>,
    /// Memory in MiB; a running VM has it after its next start.
    pub memory_mib: Option<u64>,
    /// Root disk in bytes; it only grows, also while the VM runs.
    pub disk_bytes: Option<u64>,
    /// The most bytes read from and written to the root disk in a second, 4096 or more; 0 means any number. A running VM has
    /// it after its next start.
    pub disk_bytes_per_second: Option<u64>,
    /// The most reads and writes of the root disk in a second; 0 means any number. A running VM has it after its next start.
    pub disk_operations_per_second: Option<u64>,
    /// Labels to add or replace; null removes one.
    pub labels: BTreeMap<String, Option<String>>,
    /// Restart policy.
    pub restart: Option<RestartPolicy>,
    /// Delete it this many seconds from now; 0 means never.
    pub ttl_seconds: Option<u64>,
    /// Stop it after this many idle seconds; 0 means never.
    pub idle_stop_seconds: Option<u64>,
    /// It stays though the process that it was made for ends.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
}

/// What [`SetVm`] brought about: the result of its operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmChanged {
    /// The VM now.
    pub vm: VmInfo,
    /// Names of the changed settings that a restart will bring: `cpus`, `memory`, `disk-bandwidth`, `disk-iops`.
    pub needs_restart: Vec<String>,
}

/// Which VMs to delete: those that are off and fit all that is said here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PruneVms {
    /// Only those that have been off, or there, for this many seconds.
    pub older_than_seconds: Option<u64>,
    /// Only those with all these labels.
    pub labels: BTreeMap<String, String>,
    /// Only those that failed.
    pub failed: bool,
    /// Say which, delete none.
    pub dry_run: bool,
}

/// What a prune did: the result of its operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pruned {
    /// Names of VMs that were deleted, or would be.
    pub deleted: Vec<VmName>,
    /// Names of those that could not be, with the reason.
    pub failed: BTreeMap<VmName, Problem>,
    /// Bytes their disks took.
    pub freed_bytes: u64,
}

/// A VM as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmInfo {
    /// Never reused.
    pub id: VmId,
    /// Unique.
    pub name: VmName,
    /// Derived from the host.
    #[serde(flatten)]
    pub state: VmState,
    /// The reference it was asked by.
    pub image: String,
    /// The image it was made from.
    pub image_digest: ImageDigest,
    /// The kernel it boots.
    pub kernel: KernelId,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Root disk in bytes.
    pub disk_bytes: u64,
    /// Bytes its root disk takes on the host. In a listing, this is up to a second old while the VM is up or worked on; of one
    /// that is off, it is looked at again after each change of the VM, and then ever more rarely.
    pub disk_used_bytes: u64,
    /// The most bytes that it reads from and writes to its root disk in a second.
    #[serde(default)]
    pub disk_bytes_per_second: Option<u64>,
    /// The most reads and writes of its root disk in a second.
    #[serde(default)]
    pub disk_operations_per_second: Option<u64>,
    /// How it reaches the network.
    pub network: NetworkMode,
    /// Its address, where it has a network.
    pub address: Option<Ipv4Addr>,
    /// Free-form labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it is started again when it ends by itself.
    pub restart: RestartPolicy,
    /// Deleted at this time, seconds since the Unix epoch.
    pub expires_at: Option<u64>,
    /// Stopped after this many idle seconds.
    pub idle_stop_seconds: Option<u64>,
    /// Settings that a running VM will have only after its next start: `cpus`, `memory`, `disk-bandwidth`, `disk-iops`.
    pub needs_restart: Vec<String>,
    /// Deleted when the process that made it ends.
    pub ephemeral: bool,
    /// Creation, seconds since the Unix epoch.
    pub created_at: u64,
    /// Name of the VMM.
    pub vmm: String,
    /// What its VMM counts, in the VMM's own terms; only of one VM that is asked for and is up, and where the VMM tells. Firecracker tells
    /// once a minute, with most of its counters as they have grown since the time before
    /// (<https://github.com/firecracker-microvm/firecracker/blob/main/docs/metrics.md>).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_metrics: Option<serde_json::Value>,
}

/// A VM with its JSON, for a daemon that lists the same VM again and again.
#[derive(Debug)]
pub struct RenderedVm {
    vm: VmInfo,
    json: Box<RawValue>,
}

impl RenderedVm {
    /// Writes the JSON.
    ///
    /// # Errors
    /// None that plain data with string keys could have.
    pub fn new(vm: VmInfo) -> serde_json::Result<Self> {
        Ok(Self { json: serde_json::value::to_raw_value(&vm)?, vm })
    }

    /// The VM.
    pub fn vm(&self) -> &VmInfo {
        &self.vm
    }
}

/// VMs, by name. On the wire it is an array of [`VmInfo`], whether the sender had their JSON ready or not.
#[derive(Debug, Clone, JsonSchema)]
#[schemars(transparent)]
pub struct VmList(#[schemars(with = "Vec<VmInfo>")] List);

#[derive(Debug, Clone)]
enum List {
    Plain(Vec<VmInfo>),
    Rendered(Vec<Arc<RenderedVm>>),
}

impl VmList {
    /// The VMs.
    pub fn into_vec(self) -> Vec<VmInfo> {
        match self.0 {
            List::Plain(vms) => vms,
            List::Rendered(vms) => vms.iter().map(|vm| vm.vm.clone()).collect(),
        }
    }
}

impl From<Vec<VmInfo>> for VmList {
    fn from(vms: Vec<VmInfo>) -> Self {
        Self(List::Plain(vms))
    }
}

impl FromIterator<Arc<RenderedVm>> for VmList {
    fn from_iter<I: IntoIterator<Item = Arc<RenderedVm>>>(vms: I) -> Self {
        Self(List::Rendered(vms.into_iter().collect()))
    }
}

impl Serialize for VmList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            List::Plain(vms) => vms.serialize(serializer),
            List::Rendered(vms) => serializer.collect_seq(vms.iter().map(|vm| &vm.json)),
        }
    }
}

impl<'de> Deserialize<'de> for VmList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::deserialize(deserializer).map(|vms| Self(List::Plain(vms)))
    }
}

/// How to log in to a running guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GuestAccess {
    /// The VM.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// A Unix stream to the guest's SSH server.
    pub ssh_socket: PathBuf,
    /// The server's public key, one OpenSSH line.
    pub host_key: String,
    /// File with the private key to log in with (OpenSSH).
    pub client_key: PathBuf,
}

/// A part of a VM's console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsoleChunk {
    /// The text; bytes that are no UTF-8 are replaced. The guest's own: it may hold control characters.
    pub text: String,
    /// Nothing comes after it: the VM is off.
    pub end: bool,
}

/// A long operation that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Begun {
    /// To watch or cancel it.
    pub operation: OperationId,
}

/// Where an operation stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum OperationStatus {
    /// At work.
    Running {
        /// How far.
        progress: OperationProgress,
    },
    /// Done.
    Succeeded {
        /// What it made: [`VmInfo`], [`VmChanged`], [`Pruned`], [`ImageRecord`], [`MadeImage`], [`KernelRecord`] or null, by kind.
        result: serde_json::Value,
    },
    /// Undone and given up.
    Failed {
        /// Why.
        error: Problem,
    },
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OperationInfo {
    /// Its id, unique in one daemon's life.
    pub id: OperationId,
    /// What it does.
    pub kind: OperationKind,
    /// To what: a VM name or a reference.
    pub subject: String,
    /// When it began, seconds since the Unix epoch.
    pub begun_at: u64,
    /// When it ended, seconds since the Unix epoch; absent while it is at work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<u64>,
    /// Where it stands.
    #[serde(flatten)]
    pub status: OperationStatus,
}

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

/// A piece of what an operation says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OutputChunk {
    /// The text; what is no UTF-8 in it is replaced.
    pub text: String,
    /// Bytes before it that are no longer kept.
    pub lost: u64,
    /// There will be no more.
    pub end: bool,
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

/// What a prune has removed, or would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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

/// The daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DaemonStatus {
    /// The build's version.
    pub version: String,
    /// [`crate::API_VERSION`] of it.
    pub api_version: String,
    /// Process id.
    pub pid: u32,
    /// Start, seconds since the Unix epoch.
    pub started_at: u64,
    /// Part of every name it gives to things on the host.
    pub instance: String,
    /// Run directory.
    pub run_dir: PathBuf,
    /// State directory.
    pub state_dir: PathBuf,
    /// Configuration file.
    pub config_file: PathBuf,
    /// VMs it knows.
    pub vms: usize,
    /// VMs that are up.
    pub running: usize,
    /// What VMs take of the host, and may take.
    pub resources: Resources,
}

/// What VMs take of the host, and may take by the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Resources {
    /// Memory of VMs that are up or starting, MiB.
    pub memory_mib: u64,
    /// The most that may be, MiB.
    pub memory_limit_mib: u64,
    /// Sizes of all VMs' disks, bytes: what they would take when full.
    pub disk_bytes: u64,
    /// The most that may be, bytes; absent without a quota.
    pub disk_limit_bytes: Option<u64>,
    /// Tap devices that wait for a VM.
    pub taps_ready: usize,
}

/// Whether a lock is held or waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LockState {
    /// Held.
    Held,
    /// In the queue.
    Waiting,
}

/// A lock that somebody holds or waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LockInfo {
    /// Its name, e.g. `vm web`.
    pub lock: String,
    /// Its level in the lock order.
    pub level: String,
    /// Held or waited for.
    pub state: LockState,
    /// By whom: an operation or a request.
    pub holder: String,
    /// The operation's id, if it is one.
    pub operation: Option<OperationId>,
    /// For how long, in milliseconds.
    pub age_ms: u64,
}

/// How a doctor's check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Works, but slower or with less than it could.
    Warning,
    /// Something will not work.
    Error,
}

/// One check of the doctor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Finding {
    /// Dotted, stable, e.g. `vmm.qemu`.
    pub check: String,
    /// How it went.
    pub severity: Severity,
    /// What was found.
    pub message: String,
    /// What to do about it, where there is something to do.
    pub fix: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(name: &str) -> VmInfo {
        let digest = format!("sha256:{}", "0".repeat(64));
        serde_json::from_value(serde_json::json!({
            "id": "0123456789ab", "name": name, "state": "stopped", "last_exit": {"code": 1}, "image": "debian",
            "image_digest": digest, "kernel": "0123456789ab", "cpus": 1, "memory_mib": 64, "disk_bytes": 1 << 30,
            "disk_used_bytes": 512, "disk_bytes_per_second": 1 << 20, "network": "nat", "address": "10.0.0.2", "labels": {"a": "\"b\"\n"},
            "restart": "on-failure", "expires_at": null, "idle_stop_seconds": 5, "needs_restart": ["cpus"],
            "ephemeral": false, "created_at": 1, "vmm": "fake",
        }))
        .unwrap()
    }

    #[test]
    fn a_list_of_rendered_vms_reads_as_any() {
        let vms = vec![vm("a"), vm("b")];
        let rendered: VmList = vms.iter().map(|vm| Arc::new(RenderedVm::new(vm.clone()).unwrap())).collect();
        let text = serde_json::to_string(&rendered).unwrap();
        assert_eq!(text, serde_json::to_string(&vms).unwrap());
        assert_eq!(text, serde_json::to_string(&VmList::from(vms.clone())).unwrap());
        assert_eq!(serde_json::from_str::<VmList>(&text).unwrap().into_vec(), vms);
        assert_eq!(rendered.into_vec(), vms);
    }
}
