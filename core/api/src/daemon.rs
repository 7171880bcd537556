//! What answers about the daemon hold.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vm_types::OperationId;
pub use vm_types::event::{Event, EventKind};

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
