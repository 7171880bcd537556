//! `GuestConfig`: all the agent must know about its VM, applied at boot, live, or again after a restore.
//! Applying it twice is the same as applying it once.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The version this build writes. An agent refuses a newer one.
pub const VERSION: u32 = 1;

/// What a guest should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// Host name, one DNS label.
    pub hostname: String,
    /// 32 hexadecimal digits for `/etc/machine-id` (machine-id(5)); written only where the image has none of its own.
    pub machine_id: String,
    /// Time to set, nanoseconds since the Unix epoch; the agent steps the clock only if it is off by more than a second.
    pub clock_unix_nanos: Option<u64>,
    /// Network interfaces, found by hardware address.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// Routes beyond those of the interfaces' own subnets.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Name servers for `/etc/resolv.conf`; empty leaves the file alone.
    #[serde(default)]
    pub resolvers: Vec<IpAddr>,
    /// Search domains for `/etc/resolv.conf`.
    #[serde(default)]
    pub search: Vec<String>,
    /// Entries for `/etc/hosts`, kept in a marked block of our own.
    #[serde(default)]
    pub hosts: Vec<HostsEntry>,
    /// SSH access.
    pub ssh: SshConfig,
    /// Environment of every command.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Files to write.
    #[serde(default)]
    pub files: Vec<GuestFile>,
    /// Filesystems to mount beyond the root.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Commands to run once each boot, in order, when the root is mounted and the network is up, before the image's init.
    #[serde(default)]
    pub boot_commands: Vec<Vec<String>>,
    /// Kernel modules to load beyond those of the initramfs, by name, from the initramfs or the image.
    #[serde(default)]
    pub modules: Vec<String>,
    /// systemd units, where the image's init is systemd: started at boot, or at once when applied live. Those of a former
    /// configuration that are not here are stopped and removed.
    #[serde(default)]
    pub units: Vec<Unit>,
    /// The root; read at boot only.
    pub root: Root,
    /// The agent stays init, whatever the image has; read at boot only.
    #[serde(default)]
    pub agent_init: bool,
}

/// A systemd unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// The file's name, e.g. `web.service`.
    pub name: String,
    /// The file's content.
    pub content: String,
}

/// The root filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// virtio serial of the drive.
    pub serial: String,
    /// Filesystem type, e.g. `ext4`.
    pub fstype: String,
    /// Grow the filesystem to the drive's size.
    pub grow: bool,
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Hardware address, lower case, `02:00:…`.
    pub mac: String,
    /// Addresses with prefix lengths.
    pub addresses: Vec<IpNet>,
    /// Bytes; the kernel's own if absent.
    pub mtu: Option<u32>,
}

/// One route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to, e.g. `0.0.0.0/0`.
    pub destination: IpNet,
    /// Through which neighbour.
    pub gateway: IpAddr,
}

/// One line of `/etc/hosts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostsEntry {
    /// The address.
    pub address: IpAddr,
    /// Its names.
    pub names: Vec<String>,
}

/// The agent's SSH server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshConfig {
    /// OpenSSH private key of the server.
    pub host_key: String,
    /// `authorized_keys` lines; each may log in as any user of the guest.
    pub authorized_keys: Vec<String>,
}

/// A file to write in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFile {
    /// Absolute path; directories above it are made.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Content as text (UTF-8), or Base64 (RFC 4648, section 4) of any bytes.
    pub content: String,
    /// Whether the content is Base64.
    #[serde(default)]
    pub base64: bool,
}

/// A filesystem to mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// `serial:NAME` of a drive, a device path, or a pseudo filesystem's name.
    pub source: String,
    /// Absolute path; made if absent.
    pub target: String,
    /// Filesystem type.
    pub fstype: String,
    /// Options as in fstab(5), e.g. `ro`, `noatime`.
    #[serde(default)]
    pub options: Vec<String>,
}
