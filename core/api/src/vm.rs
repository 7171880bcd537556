//! What requests and answers about VMs hold.

use std::{collections::BTreeMap, net::Ipv4Addr, path::PathBuf, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use vm_types::{ImageDigest, KernelId};
pub use vm_types::{
    VmId, VmName,
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
    /// Why its guest does not go on although nobody paused it, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
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
