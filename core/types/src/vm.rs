//! What a VM should be (specification) and what it is now (state).

use std::{collections::BTreeMap, net::Ipv4Addr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ImageDigest, KernelId, OperationId, ProcessRef, VmId, VmName};

/// How a VM reaches the network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// One interface on the daemon's bridge, masqueraded by the host.
    #[default]
    Nat,
    /// No interface; control and SSH still work, over the guest channel.
    None,
}

/// Which VMM runs a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VmmKind {
    /// QEMU, under KVM or TCG.
    Qemu,
    /// Firecracker, under KVM.
    Firecracker,
    /// A process that plays VMM and guest, for fault injection and scale tests.
    Fake,
}

impl std::fmt::Display for VmmKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
            Self::Fake => "fake",
        })
    }
}

/// Whether a VM that nobody stopped is started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// When its VMM or kernel died, or the host was booted anew; not after a power-off from within.
    OnFailure,
    /// After any end that no request of ours brought about.
    Always,
}

/// The process that a VM belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Owner {
    /// The process.
    pub process: ProcessRef,
    /// The host boot it lives in; in any other, it has ended.
    pub boot_id: String,
}

/// How fast a guest may use its disk; without a limit, as fast as the host's is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskLimits {
    /// Bytes read and written in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Reads and writes in a second, whatever their size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations_per_second: Option<u64>,
}

impl DiskLimits {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// What a VM should be. Intent; kept in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmSpec {
    /// Unique among the daemon's VMs.
    pub name: VmName,
    /// The reference it was asked by, e.g. `debian:bookworm`.
    pub image_reference: String,
    /// The image it was made from.
    pub image: ImageDigest,
    /// The kernel it boots.
    pub kernel: KernelId,
    /// Virtual CPUs, at least 1.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Size of the root disk in bytes.
    pub disk_bytes: u64,
    /// How fast the root disk may be used.
    #[serde(default)]
    pub disk_limits: DiskLimits,
    /// How it reaches the network.
    pub network: NetworkMode,
    /// Free-form labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The client process that made it for itself (`vm run --rm`): the VM is deleted when that process ends, also
    /// if the daemon was restarted meanwhile.
    #[serde(default)]
    pub owner: Option<Owner>,
    /// Whether it is started again when it ends by itself.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Stop it after this many seconds without an SSH connection.
    #[serde(default)]
    pub idle_stop_seconds: Option<u64>,
    /// Delete it at this time, seconds since the Unix epoch.
    #[serde(default)]
    pub expires_at: Option<u64>,
    /// What runs it; the daemon's choice if absent.
    #[serde(default)]
    pub vmm: Option<VmmKind>,
}

/// How a VMM process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// Ended by itself with this code.
    Code(i32),
    /// Ended by this signal number.
    Signal(i32),
    /// Gone without a record, e.g. its shim was killed or the host rebooted.
    Unknown,
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Unknown => f.write_str("an unrecorded end"),
        }
    }
}

/// Where a VM failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailedAt {
    /// While its disk and files were made.
    Create,
    /// While it was started.
    Start,
    /// While it ran: the VMM ended and nobody had asked for it.
    Run,
    /// While it was stopped.
    Stop,
    /// While it was deleted.
    Delete,
}

/// What a VM is now. Derived from the host, never stored as such.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum VmState {
    /// Named, nothing made yet.
    Defined,
    /// Its disk and files are being made.
    Creating {
        /// The operation at work.
        operation: OperationId,
    },
    /// Complete and off.
    Stopped {
        /// How the VMM ended the last time, if it ever ran.
        last_exit: Option<ExitStatus>,
    },
    /// On its way up.
    Starting {
        /// The operation at work.
        operation: OperationId,
    },
    /// Up; the agent answered.
    Running {
        /// VMM's process id.
        pid: u32,
        /// Start of the VMM, seconds since the Unix epoch.
        since: u64,
    },
    /// Virtual CPUs are halted.
    Paused {
        /// VMM's process id.
        pid: u32,
        /// Start of the VMM, seconds since the Unix epoch.
        since: u64,
    },
    /// On its way down.
    Stopping {
        /// The operation at work.
        operation: OperationId,
    },
    /// Something went wrong; start, stop and delete all work from here.
    Failed {
        /// In which phase.
        at: FailedAt,
        /// Why, for people; includes the console's tail where there is one.
        cause: String,
    },
    /// On its way out.
    Deleting {
        /// The operation at work.
        operation: OperationId,
    },
}

impl VmState {
    /// One word for listings and messages.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Defined => "defined",
            Self::Creating { .. } => "creating",
            Self::Stopped { .. } => "stopped",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Paused { .. } => "paused",
            Self::Stopping { .. } => "stopping",
            Self::Failed { .. } => "failed",
            Self::Deleting { .. } => "deleting",
        }
    }
}

/// A stored VM: identity, specification and what was allocated for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Never reused.
    pub id: VmId,
    /// Intent.
    pub spec: VmSpec,
    /// Its address on the bridge, where it has a network.
    pub address: Option<Ipv4Addr>,
    /// Creation, seconds since the Unix epoch.
    pub created_at: u64,
    /// Set once the disk and files were made; a record without it is a half-done creation.
    pub complete: bool,
    /// Set when somebody asked for it to run; a VMM that is gone while this is set has died.
    pub wanted_running: bool,
    /// The last failure, shown until the next success.
    pub failure: Option<(FailedAt, String)>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Drive;

    #[test]
    fn what_was_written_before_disks_had_limits_has_none() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let spec: VmSpec = serde_json::from_value(serde_json::json!({
            "name": "web", "image_reference": "debian", "image": digest, "kernel": "0123456789ab", "cpus": 1,
            "memory_mib": 64, "disk_bytes": 1 << 30, "network": "nat",
        }))
        .unwrap();
        assert!(spec.disk_limits.is_none());
        let text = r#"{"serial": "root", "path": "/d", "read_only": false}"#;
        let drive: Drive = serde_json::from_str(text).unwrap();
        assert!(drive.limits.is_none());
        // And an older daemon, which would not know them, reads what has none.
        assert!(!serde_json::to_string(&drive).unwrap().contains("limits"));
    }
}
