//! The virtual machine's shape as a VMM driver takes it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{VmId, vm::DiskLimits};

/// Everything a VMM driver needs to know to plan a launch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Whose machine it is.
    pub vm: VmId,
    /// Virtual CPUs, at least 1.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// A bzImage or vmlinux.
    pub kernel: PathBuf,
    /// Shared part and per-VM segment in one file.
    pub initramfs: PathBuf,
    /// Kernel arguments beyond those the driver itself needs.
    pub kernel_args: Vec<String>,
    /// Block devices; the first one is the root disk.
    pub drives: Vec<Drive>,
    /// Network interfaces.
    pub nics: Vec<Nic>,
    /// A vsock device with this context id (vsock(7)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_cid: Option<u32>,
}

/// A raw disk image attached as a virtio block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// virtio serial, at most 20 bytes; how the guest finds it.
    pub serial: String,
    /// Raw image file or block device.
    pub path: PathBuf,
    /// Attached without write access.
    pub read_only: bool,
    /// How fast the guest may use it.
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub limits: DiskLimits,
}

/// A virtio network interface behind a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The host's tap device, at most 15 bytes.
    pub tap: String,
    /// Hardware address, `02:…`.
    pub mac: String,
}
