//! The options that shape a VM, shared by `run` and `create`.

use clap::{Args, ValueEnum};
use vm_api::{CreateVm, NetworkMode, RestartPolicy, VmName, VmmKind};

use crate::{duration, size};

#[derive(Debug, Args)]
pub(crate) struct MachineArgs {
    /// Image reference or digest, e.g. debian:bookworm; acquired first if it is not here [default: the
    /// configuration's]
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<String>,
    /// Name of the VM, also its host name [default: one is made up]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<VmName>,
    /// Kernel id or release [default: the configuration's]
    #[arg(long, value_name = "KERNEL")]
    pub(crate) kernel: Option<String>,
    /// Virtual CPUs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cpus: Option<u32>,
    /// Memory, e.g. 512M or 2G; a bare number is MiB
    #[arg(long, value_name = "SIZE", value_parser = size::memory_mib)]
    pub(crate) memory: Option<u64>,
    /// Root disk, e.g. 10G
    #[arg(long, value_name = "SIZE", value_parser = size::disk_bytes)]
    pub(crate) disk: Option<u64>,
    /// The most bytes it reads and writes on its root disk in a second, e.g. 100M, or unlimited
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    pub(crate) disk_bandwidth: Option<u64>,
    /// The most reads and writes on its root disk in a second, e.g. 500, or unlimited
    #[arg(long, value_name = "N", value_parser = iops)]
    pub(crate) disk_iops: Option<u64>,
    /// How the VM reaches the network
    #[arg(long, value_name = "MODE")]
    pub(crate) net: Option<Net>,
    /// Free-form label; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) labels: Vec<(String, String)>,
    /// Whether it is started again when it ends by itself [default: no]
    #[arg(long, value_name = "POLICY")]
    pub(crate) restart: Option<Restart>,
    /// Delete it when it is this old, e.g. 2h or 7d
    #[arg(long, value_name = "DURATION", value_parser = duration::seconds)]
    pub(crate) ttl: Option<u64>,
    /// Stop it after so long without an SSH connection, e.g. 30m
    #[arg(long, value_name = "DURATION", value_parser = duration::seconds)]
    pub(crate) idle_stop: Option<u64>,
    /// What runs it [default: the daemon's choice, see `vm doctor`]
    #[arg(long, value_name = "VMM")]
    pub(crate) vmm: Option<Vmm>,
}

/// `--vmm`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Vmm {
    /// Needs hardware virtualisation
    Firecracker,
    /// Under KVM, or in software where there is no hardware virtualisation
    Qemu,
}

/// `--net`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Net {
    /// One interface on the host's bridge; what is reached beyond it is up to plugins
    Nat,
    /// No interface; `vm ssh` works all the same
    None,
}

/// `--restart`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Restart {
    /// Never
    No,
    /// When its VMM or kernel died, or the host was booted anew; not after a power-off from within
    OnFailure,
    /// After any end that was not asked for by a command
    Always,
}

impl From<Restart> for RestartPolicy {
    fn from(restart: Restart) -> Self {
        match restart {
            Restart::No => Self::No,
            Restart::OnFailure => Self::OnFailure,
            Restart::Always => Self::Always,
        }
    }
}

impl MachineArgs {
    /// The request that makes this VM.
    pub(crate) fn into_request(self, ephemeral: bool, start: bool) -> CreateVm {
        CreateVm {
            name: self.name,
            image: self.image,
            kernel: self.kernel,
            cpus: self.cpus,
            memory_mib: self.memory,
            disk_bytes: self.disk,
            disk_bytes_per_second: self.disk_bandwidth,
            disk_operations_per_second: self.disk_iops,
            network: self.net.map(|net| match net {
                Net::Nat => NetworkMode::Nat,
                Net::None => NetworkMode::None,
            }),
            labels: self.labels.into_iter().collect(),
            restart: self.restart.map(RestartPolicy::from),
            ttl_seconds: self.ttl,
            idle_stop_seconds: self.idle_stop,
            vmm: self.vmm.map(|vmm| match vmm {
                Vmm::Firecracker => VmmKind::Firecracker,
                Vmm::Qemu => VmmKind::Qemu,
            }),
            ephemeral,
            start,
        }
    }
}

/// How `--disk-bandwidth` and `--disk-iops` name no limit; 0 in requests.
pub(crate) const UNLIMITED: &str = "unlimited";

/// Bytes a second.
pub(crate) fn bandwidth(text: &str) -> Result<u64, String> {
    if text == UNLIMITED {
        return Ok(0);
    }
    size::disk_bytes(text).map_err(|error| match error {
        _ if text == "0" => nothing("0"),
        size::SizeError::TooSmall(text) => nothing(&text),
        error => error.to_string(),
    })
}

/// Operations a second.
pub(crate) fn iops(text: &str) -> Result<u64, String> {
    match text.parse() {
        _ if text == UNLIMITED => Ok(0),
        Ok(0) => Err(nothing(text)),
        Ok(operations) => Ok(operations),
        Err(_) => Err(format!("{text:?} is not a number; write for example 500, or {UNLIMITED}")),
    }
}

fn nothing(text: &str) -> String {
    format!("with {text} a disk could not be used at all; no limit is {UNLIMITED}")
}

pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a label is KEY=VALUE".to_owned()),
    }
}
