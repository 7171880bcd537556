//! Effects as a plugin planned them: plain data. Nothing here has happened.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The name of something that exists only after an effect was applied, unique to plugin and VM.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RefName(pub String);

/// Bytes of an effect: given by the plugin, or a blob's by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// These.
    Bytes(Vec<u8>),
    /// Those of the blob with this name.
    Blob(String),
}

/// How long an effect stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lifetime {
    /// Until the VM stops.
    Run,
    /// Until the VM is deleted.
    Vm,
    /// Until a person removes it.
    Kept,
}

/// What one hook planned, in the order it did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The machine's parts.
    pub machine: Vec<MachinePart>,
    /// The guest's parts.
    pub guest: Vec<GuestPart>,
    /// The host's changes.
    pub host: Vec<HostEffect>,
}

impl Plan {
    /// How many effects.
    pub fn len(&self) -> usize {
        self.machine.len() + self.guest.len() + self.host.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A part of the virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "part", rename_all = "snake_case")]
pub enum MachinePart {
    /// A drive.
    Drive {
        /// How the guest finds it; at most 20 bytes.
        serial: String,
        /// What is behind it.
        source: RefName,
        /// Attached without write access.
        read_only: bool,
    },
    /// One more network interface on the host's bridge.
    Nic {
        /// Its hardware address goes by this name.
        name: RefName,
    },
    /// A kernel argument.
    KernelArgument {
        /// As it stands on the command line.
        argument: String,
    },
    /// At least this much memory.
    MemoryFloor {
        /// In bytes.
        bytes: u64,
    },
    /// At least so many virtual CPUs.
    CpuFloor {
        /// How many.
        cpus: u32,
    },
    /// A vsock device; its context id goes by the name `vsock`.
    Vsock,
}

/// A part of what the guest finds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "part", rename_all = "snake_case")]
pub enum GuestPart {
    /// A file.
    File {
        /// Absolute and normal.
        path: String,
        /// What is in it.
        content: Content,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// A variable of every command's environment.
    Environment {
        /// Its name.
        name: String,
        /// Its value.
        value: String,
    },
    /// A line of the hosts file.
    HostsEntry {
        /// The address.
        address: IpAddr,
        /// Its names.
        names: Vec<String>,
    },
    /// A filesystem on a drive.
    MountDrive {
        /// The drive's serial.
        serial: String,
        /// Absolute and normal.
        target: String,
        /// e.g. `ext4`.
        filesystem: String,
        /// As in fstab(5).
        options: Vec<String>,
    },
    /// A filesystem without a drive.
    Mount {
        /// e.g. `tmpfs`.
        filesystem: String,
        /// Absolute and normal.
        target: String,
        /// As in fstab(5).
        options: Vec<String>,
    },
    /// A kernel module.
    KernelModule {
        /// Its name.
        name: String,
    },
    /// A systemd unit.
    Unit {
        /// Its file's name.
        name: String,
        /// Its file's content.
        content: String,
    },
    /// A command at each boot.
    BootCommand {
        /// Program and arguments.
        command: Vec<String>,
    },
}

/// A change of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "effect", rename_all = "snake_case")]
pub enum HostEffect {
    /// A rule in our table.
    FirewallRule(Rule),
    /// Packets are forwarded between bridge and other networks.
    Forwarding,
    /// A port of the host that leads to one of the guest.
    PublishPort {
        /// `address:port` goes by this name.
        name: RefName,
        /// `tcp` or `udp`.
        protocol: Transport,
        /// The host's address; loopback if absent.
        host_address: Option<IpAddr>,
        /// The host's port; chosen when applied if absent.
        host_port: Option<u16>,
        /// The guest's port.
        guest_port: u16,
    },
    /// A disk of the plugin's own.
    Disk {
        /// The disk goes by this name.
        name: RefName,
        /// Its size.
        size_bytes: u64,
        /// Made on a new one.
        filesystem: Option<String>,
        /// How long it stays.
        lifetime: Lifetime,
    },
    /// A record in the host's zone.
    DnsRecord {
        /// Lower case, without the last dot.
        name: String,
        /// RFC 1035, section 3.2.2.
        record_type: u16,
        /// How long it may be remembered.
        ttl_seconds: u32,
        /// In text form.
        data: String,
    },
    /// A setting of the bridge.
    BridgeSysctl {
        /// Family and name, e.g. `ipv4/rp_filter`.
        key: String,
        /// The value.
        value: String,
    },
    /// A tool of the host, by the manifest's name for it.
    Tool {
        /// The first line of its output goes by this name.
        name: RefName,
        /// The manifest's name.
        tool: String,
        /// Its arguments.
        arguments: Vec<String>,
    },
    /// A file in the plugin's own directory for the VM.
    File {
        /// Its absolute path goes by this name, which is its relative one.
        path: String,
        /// What is in it.
        content: Vec<u8>,
        /// Permission bits.
        mode: u32,
        /// How long it stays.
        lifetime: Lifetime,
    },
}

/// Protocols with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Where in the packet's way a rule is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Chain {
    /// To the host itself.
    Input,
    /// Through the host.
    Forward,
    /// From the host itself.
    Output,
    /// Before the way is chosen.
    Prerouting,
    /// When it leaves.
    Postrouting,
}

/// Network devices as a rule may name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The VM's own.
    Vm,
    /// The host's bridge.
    Bridge,
    /// Any but these.
    Elsewhere,
}

/// Protocols that a rule may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP.
    Icmp,
    /// ICMP for IPv6.
    Icmpv6,
}

/// States of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionState {
    /// Its first packet.
    New,
    /// Seen in both directions.
    Established,
    /// Belongs to another.
    Related,
    /// Belongs to none.
    Invalid,
}

/// An address or network in its one canonical form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The address, without bits beyond the prefix.
    pub address: IpAddr,
    /// Length of the prefix.
    pub prefix: u8,
}

/// A firewall rule: conditions that must all hold, and one answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Where it is asked.
    pub chain: Chain,
    /// In this order.
    pub conditions: Vec<Condition>,
    /// What then.
    pub answer: Answer,
}

/// One condition of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// Comes in by.
    FromDevice(Device),
    /// Goes out by.
    ToDevice(Device),
    /// Source.
    Source(Network),
    /// Destination.
    Destination(Network),
    /// Protocol.
    Protocol(Protocol),
    /// Destination port in a range, both ends included.
    DestinationPorts(u16, u16),
    /// Connection state, any of these.
    States(Vec<ConnectionState>),
}

/// A rule's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Pass.
    Accept,
    /// Drop silently.
    Deny,
    /// Refuse with a word.
    Reject,
    /// With the host's own source address.
    Masquerade,
    /// To another address.
    Redirect(IpAddr, Option<u16>),
}
