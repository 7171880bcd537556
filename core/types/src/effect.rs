//! Host effects: every change of the host, as data.
//!
//! ```text
//!   intent ──> apply ──> applied ──> (life of the VM) ──> undoing ──> undone
//!      └──────────────── after a crash: observe, then adopt or undo ──┘
//! ```
//!
//! An effect has a deterministic [`EffectId`] that can be found on the host even when only its
//! intent was journaled: names of network devices and tables contain the daemon's instance id,
//! files lie below the daemon's directories. What an effect *does* is implemented by the crates
//! `vm-net`, `vm-disk` and `vm-engine`; the one function that applies them is the engine's.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    path::PathBuf,
};

use ipnet::Ipv4Net;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strum::{EnumDiscriminants, IntoStaticStr, VariantArray};

use crate::plan::{Rule, Transport};

/// Names one effect on one host, e.g. `tap:vt3f2a0001`. Two effects with one id are the same thing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct EffectId(pub String);

impl fmt::Display for EffectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an effect is part of. Reconciliation goes through them in this order: a VMM must be gone before its disks and taps
/// are, and files say where the others are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, VariantArray)]
pub enum Layer {
    /// Processes.
    Vmm,
    /// Disks and what carries them.
    Block,
    /// Devices, addresses, rules and settings of the network.
    Network,
    /// Directories and files.
    Files,
}

/// A change of the host. Exhaustive: whoever matches it without `_` learns of a new one. [`EffectKind`] is the same without
/// the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, EnumDiscriminants)]
#[strum_discriminants(
    name(EffectKind),
    doc = "The kinds of [`Effect`], for whoever has to go through all of them.",
    derive(VariantArray, IntoStaticStr),
    strum(serialize_all = "snake_case")
)]
#[serde(tag = "effect", rename_all = "snake_case")]
pub enum Effect {
    /// A directory of our own; undo removes it with all that is in it.
    Directory {
        /// Absolute path below the daemon's run or state directory.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// A small file of our own. Its content does not go to the journal (it may be secret).
    File {
        /// Absolute path below the daemon's run or state directory.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
        /// What to write; absent when read back from a journal.
        #[serde(skip)]
        content: Vec<u8>,
    },
    /// A file made of another with bytes behind it (initramfs with the VM's segment).
    AppendedFile {
        /// Absolute path below the daemon's run or state directory.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
        /// The shared first part.
        base: PathBuf,
        /// The own second part; absent when read back from a journal.
        #[serde(skip)]
        tail: Vec<u8>,
    },
    /// A copy-on-write disk of a read-only base.
    CowDisk {
        /// Read-only base image.
        base: PathBuf,
        /// The VM's disk.
        path: PathBuf,
        /// Its size in bytes, at least the base's.
        size_bytes: u64,
        /// Whether the file holds only what differs from the base, for [`Effect::DmSnapshot`] to put together while the VM
        /// is up.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        delta: bool,
    },
    /// A block device made of a read-only base and a file of differences (device-mapper's snapshot target), for as long as a
    /// VM is up.
    DmSnapshot {
        /// Device-mapper name; devices it is made of have this name with something behind it.
        name: String,
        /// Read-only base image.
        base: PathBuf,
        /// The file of differences.
        delta: PathBuf,
        /// Our own device node of it, absolute, below the daemon's state directory.
        node: PathBuf,
        /// Its size in bytes, at least the base's; what is behind the base's end reads as zeros.
        size_bytes: u64,
    },
    /// A kernel setting, put back to what it was by undo if nobody changed it meanwhile.
    Sysctl {
        /// Path below `/proc/sys`, e.g. `net/ipv4/ip_forward`.
        key: String,
        /// What it is set to.
        value: String,
    },
    /// The daemon's bridge.
    Bridge {
        /// Device name, at most 15 bytes.
        name: String,
        /// The host's address on it with the subnet's prefix length.
        address: Ipv4Net,
    },
    /// The daemon's own nftables table: what guards its bridge, and the chains that [`Effect::Rules`] and [`Effect::Port`]
    /// add to. By itself nothing passes between the bridge and other networks.
    Firewall {
        /// Table name (family `inet`).
        table: String,
        /// The bridge it speaks of.
        bridge: String,
        /// The addresses that guests may send from.
        subnet: Ipv4Net,
    },
    /// Rules of one plugin for one VM in the daemon's table, behind those that are there already.
    Rules {
        /// Table name (family `inet`); [`Effect::Firewall`] makes it.
        table: String,
        /// The bridge that the rules' devices mean.
        bridge: String,
        /// Whose they are, `VM-ID/PLUGIN`.
        owner: String,
        /// The VM's address, which is what a rule's device `vm` means; rules that name it match nothing where there is none.
        address: Option<Ipv4Addr>,
        /// In this order.
        rules: Vec<Rule>,
    },
    /// A port of the host that leads to one of a guest. [`Handle::Value`] is the host's `address:port`.
    Port {
        /// Table name (family `inet`); [`Effect::Firewall`] makes it.
        table: String,
        /// The bridge the guest is behind.
        bridge: String,
        /// Whose it is, `VM-ID/PLUGIN/NAME`.
        owner: String,
        /// TCP or UDP.
        protocol: Transport,
        /// Where the host listens; port 0 lets the host choose.
        host: SocketAddr,
        /// Where it leads.
        guest: SocketAddrV4,
    },
    /// The daemon's name server as that of a link, for the host's own resolver (systemd-resolved); goes with the link. Without
    /// that resolver there is nothing to do.
    LinkDns {
        /// Device name.
        link: String,
        /// The name server.
        server: SocketAddr,
        /// The domains it is asked about, without dots around them.
        domains: Vec<String>,
    },
    /// A record that the daemon's name server answers with.
    NameRecord {
        /// Whose it is, `VM-ID/PLUGIN`.
        owner: String,
        /// Lower case, without the last dot.
        name: String,
        /// The type's number (RFC 1035).
        record_type: u16,
        /// How long it may be remembered.
        ttl_seconds: u32,
        /// In text form (RFC 1035).
        data: String,
    },
    /// A sparse disk image of a plugin's, made when it is not there, grown when it is smaller; undo removes it.
    Disk {
        /// Absolute path below the daemon's state directory.
        path: PathBuf,
        /// At least so large, in bytes.
        size_bytes: u64,
        /// Made on a new one, and grown with it, e.g. `ext4`.
        filesystem: Option<String>,
    },
    /// A tool of the host, run once; undo runs it with other arguments. [`Handle::Value`] is the first line it printed.
    Tool {
        /// Whose run it is, `VM-ID/PLUGIN/NAME`.
        owner: String,
        /// Absolute path.
        program: PathBuf,
        /// Its arguments.
        arguments: Vec<String>,
        /// The arguments that undo it.
        undo: Vec<String>,
    },
    /// A tap device on the bridge.
    Tap {
        /// Device name, at most 15 bytes.
        name: String,
        /// The bridge it is a port of.
        bridge: String,
    },
    /// A control group for a VMM: one directory in the unified hierarchy, or one in each of several of version 1.
    Cgroup {
        /// The directories' name.
        name: String,
        /// The directories and what is set in them.
        groups: Vec<Cgroup>,
    },
    /// A VM's shim with the VMM it is parent of; undo kills both.
    Shim {
        /// The VM's run directory, which is in the shim's command line and so identifies it.
        run_dir: PathBuf,
        /// File with the [`crate::shim::ShimSpec`].
        spec: PathBuf,
    },
}

/// A directory of [`Effect::Cgroup`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Absolute.
    pub path: PathBuf,
    /// Files in it and what is written to each, in this order.
    pub settings: Vec<(String, String)>,
}

impl Effect {
    /// Whether it is still there after the host has lost power and come back.
    pub fn outlives_reboot(&self) -> bool {
        match self {
            Self::Directory { .. }
            | Self::File { .. }
            | Self::AppendedFile { .. }
            | Self::CowDisk { .. }
            | Self::Disk { .. } => true,
            Self::Sysctl { .. }
            | Self::Bridge { .. }
            | Self::Firewall { .. }
            | Self::Rules { .. }
            | Self::Port { .. }
            | Self::LinkDns { .. }
            | Self::NameRecord { .. }
            | Self::Tool { .. }
            | Self::Tap { .. }
            | Self::DmSnapshot { .. }
            | Self::Cgroup { .. }
            | Self::Shim { .. } => false,
        }
    }

    /// What it is part of.
    pub fn layer(&self) -> Layer {
        match self {
            Self::Cgroup { .. } | Self::Shim { .. } => Layer::Vmm,
            Self::CowDisk { .. } | Self::Disk { .. } | Self::DmSnapshot { .. } => Layer::Block,
            Self::Sysctl { .. }
            | Self::Bridge { .. }
            | Self::Firewall { .. }
            | Self::Rules { .. }
            | Self::Port { .. }
            | Self::LinkDns { .. }
            | Self::NameRecord { .. }
            | Self::Tool { .. }
            | Self::Tap { .. } => Layer::Network,
            Self::Directory { .. } | Self::File { .. } | Self::AppendedFile { .. } => Layer::Files,
        }
    }

    /// The deterministic id.
    pub fn id(&self) -> EffectId {
        EffectId(match self {
            Self::Directory { path, .. } => format!("directory:{}", path.display()),
            Self::File { path, .. } => format!("file:{}", path.display()),
            Self::AppendedFile { path, .. } => format!("appended-file:{}", path.display()),
            Self::CowDisk { path, .. } => format!("cow-disk:{}", path.display()),
            Self::DmSnapshot { name, .. } => format!("dm-snapshot:{name}"),
            Self::Sysctl { key, .. } => format!("sysctl:{key}"),
            Self::Bridge { name, .. } => format!("bridge:{name}"),
            Self::Firewall { table, .. } => format!("firewall:{table}"),
            Self::Rules { table, owner, .. } => format!("rules:{table}/{owner}"),
            Self::Port { table, owner, .. } => format!("port:{table}/{owner}"),
            Self::LinkDns { link, .. } => format!("link-dns:{link}"),
            Self::NameRecord { owner, name, record_type, data, .. } => {
                format!("name-record:{owner}/{name}/{record_type}/{data}")
            }
            Self::Disk { path, .. } => format!("disk:{}", path.display()),
            Self::Tool { owner, .. } => format!("tool:{owner}"),
            Self::Tap { name, .. } => format!("tap:{name}"),
            Self::Cgroup { name, .. } => format!("cgroup:{name}"),
            Self::Shim { run_dir, .. } => format!("shim:{}", run_dir.display()),
        })
    }
}

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProcessRef {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot: field 22 of `/proc/PID/stat` (proc(5)).
    pub start_ticks: u64,
}

/// What applying an effect yielded that undo or a later reader needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "handle", rename_all = "snake_case")]
pub enum Handle {
    /// The effect's own fields say everything.
    None,
    /// What was there before.
    Previous {
        /// The former value.
        value: String,
    },
    /// What exists only since it was applied: a port that the host chose, a line that a tool printed.
    Value {
        /// In text form.
        value: String,
    },
    /// A started shim and its VMM.
    Processes {
        /// The shim.
        shim: ProcessRef,
        /// The VMM.
        vmm: ProcessRef,
        /// Whether the guest's agent has answered in this run.
        #[serde(default)]
        answered: bool,
    },
}

/// What the host shows of an effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed {
    /// It is not there.
    Absent,
    /// It is there, and ours.
    Present(Handle),
    /// Something is there that the daemon did not make or that does not match; says what.
    Foreign(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_never_holds_file_contents() {
        let effect =
            Effect::File { path: "/run/vmd/key".into(), mode: 0o600, content: b"secret-key".to_vec() };
        let text = serde_json::to_string(&effect).unwrap();
        assert!(!text.contains("secret") && !text.contains("115"), "{text}");
        let back: Effect = serde_json::from_str(&text).unwrap();
        assert_eq!(back.id(), effect.id());
    }
}
