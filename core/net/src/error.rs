//! Everything that can go wrong with the host's network.

use std::{io, net::SocketAddr};

use ipnet::Ipv4Net;
use vm_host::RunError;
use vm_types::EffectId;

/// A failed operation on the host's network.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The effect belongs to another crate.
    #[error("{effect} is no effect on the network")]
    NotMine {
        /// The effect.
        effect: EffectId,
    },
    /// Something has our name that the daemon did not make; it is left as it is.
    #[error("{name} is in the way: {what}")]
    Foreign {
        /// Device, table or key.
        name: String,
        /// What it is.
        what: String,
    },
    /// The subnet overlaps with what the host uses already.
    #[error("the subnet {subnet} overlaps with {route} on {device}")]
    SubnetClash {
        /// Our subnet.
        subnet: Ipv4Net,
        /// The route or address it overlaps with.
        route: Ipv4Net,
        /// The device it belongs to.
        device: String,
    },
    /// None of the subnets we know is free.
    #[error("all {count} subnets that could be used overlap with routes of this host")]
    NoFreeSubnet {
        /// How many were tried.
        count: usize,
    },
    /// A device name that the kernel would not take.
    #[error("{name:?} is no name for a network device: 1 to 15 bytes, no '/', no space")]
    BadName {
        /// The name.
        name: String,
    },
    /// The netlink socket could not be opened.
    #[error("could not open a netlink socket")]
    Socket {
        /// Why.
        source: io::Error,
    },
    /// The kernel refused a change or query of devices, addresses or routes.
    #[error("could not {action} {name}")]
    Netlink {
        /// What was being done, e.g. `create the bridge`.
        action: &'static str,
        /// To what.
        name: String,
        /// Why; a refusal by the kernel carries its errno.
        source: io::Error,
    },
    /// The tap driver refused.
    #[error("could not create the tap device {name}")]
    Tap {
        /// The device.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// nft failed.
    #[error("could not {action}")]
    Nft {
        /// What was being done, e.g. `load the firewall table vmd_3f2a`.
        action: String,
        /// Why.
        source: RunError,
    },
    /// nft said something that is not its documented JSON.
    #[error("nft gave an answer that cannot be read")]
    NftAnswer {
        /// Why.
        source: serde_json::Error,
    },
    /// An effect needs the daemon's table, which is not there.
    #[error("the firewall table {table} is not there, or not as the daemon made it")]
    NoTable {
        /// The table.
        table: String,
    },
    /// A rule that no chain can have.
    #[error("rule {number} of {owner} {why}")]
    BadRule {
        /// Whose it is.
        owner: String,
        /// Its place among the owner's, from 1.
        number: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A port of the host that somebody else has.
    #[error("the {protocol} port {address} is taken by {by}")]
    PortTaken {
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// The host's address and port.
        address: SocketAddr,
        /// Who has it.
        by: String,
    },
    /// A port of the host that cannot be had.
    #[error("could not take the {protocol} port {address}")]
    Port {
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// The host's address and port.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Guests have IPv4 addresses only, and the kernel does not translate between the two.
    #[error("a port of the IPv6 address {address} cannot lead to a guest")]
    PortFamily {
        /// The host's address and port.
        address: SocketAddr,
    },
    /// A text that is no domain.
    #[error("{domain:?} is no domain: letters, digits, '-' and '_', with single dots between")]
    BadDomain {
        /// The text.
        domain: String,
    },
    /// systemd-resolved refused.
    #[error("could not tell systemd-resolved: {action}")]
    Resolvectl {
        /// What it was told, e.g. `dns vmbr-3f2a 10.213.0.1`.
        action: String,
        /// Why.
        source: RunError,
    },
    /// A key that is no path below `/proc/sys`.
    #[error("{key:?} is no kernel setting")]
    BadKey {
        /// The key.
        key: String,
    },
    /// A kernel setting could not be read or written.
    #[error("could not {action} the kernel setting {key}")]
    Sysctl {
        /// `read` or `write`.
        action: &'static str,
        /// The key.
        key: String,
        /// Why.
        source: io::Error,
    },
    /// A thread doing the work died.
    #[error("the thread working on {name} died")]
    Died {
        /// What it worked on.
        name: String,
        /// How.
        source: tokio::task::JoinError,
    },
    /// A file that names the host's resolvers cannot be read.
    #[error("could not read {path}")]
    Resolvers {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Asked for by a test.
    #[error("{effect} was made to fail")]
    Injected {
        /// The effect.
        effect: EffectId,
    },
}

impl NetError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let privileges = "run the daemon as root (it needs CAP_NET_ADMIN)";
        Some(match self {
            Self::NotMine { .. } | Self::Injected { .. } | Self::BadKey { .. } => return None,
            Self::Foreign { name, .. } => {
                format!(
                    "look at {name} with `ip -d link` or `nft list ruleset` and remove it if nobody needs it"
                )
            }
            Self::SubnetClash { .. } | Self::NoFreeSubnet { .. } => {
                "set `network.subnet` in the daemon's configuration to a private range nothing here uses, \
                 e.g. \"192.168.77.0/24\""
                    .to_owned()
            }
            Self::BadName { .. } => "this is a bug; the daemon's log says more".to_owned(),
            Self::Tap { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "load the kernel module: `modprobe tun`".to_owned()
            }
            Self::Tap { source, .. } if source.raw_os_error() == Some(nix::libc::EBUSY) => {
                "another process uses the device; stop the VMM that `fuser /dev/net/tun` shows".to_owned()
            }
            Self::Netlink { source, .. } if source.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {
                "load the kernel module: `modprobe bridge`".to_owned()
            }
            Self::Tap { .. } | Self::Netlink { .. } | Self::Socket { .. } | Self::Sysctl { .. } => {
                privileges.to_owned()
            }
            Self::Nft { source: RunError::NotInstalled { .. }, .. } => {
                "install the package nftables".to_owned()
            }
            Self::Nft { .. } => {
                format!(
                    "check that `nft list ruleset` works, that the kernel has nf_tables, nft_nat, nft_masq and nft_fib, and {privileges}"
                )
            }
            Self::NoTable { .. } => {
                "start a VM with a network, which makes the table anew; if it is there, look at it with \
                 `nft list ruleset`"
                    .to_owned()
            }
            Self::BadRule { owner, .. } => {
                format!("this is a fault of the plugin that made the rule ({owner}); tell its author")
            }
            Self::PortTaken { protocol, address, .. } => format!(
                "choose another port, or none to have a free one chosen; `ss -lpn --{protocol} 'sport = {}'` shows \
                 the program that listens there, `vm ls` the VMs",
                address.port()
            ),
            Self::Port { source, .. } if source.kind() == io::ErrorKind::AddrNotAvailable => {
                "choose an address that this host has (`ip address`), 127.0.0.1 or 0.0.0.0".to_owned()
            }
            Self::Port { .. } => privileges.to_owned(),
            Self::PortFamily { .. } => "choose an IPv4 address of this host, e.g. 127.0.0.1".to_owned(),
            Self::BadDomain { .. } => "write it like `vm` or `example.test`".to_owned(),
            Self::Resolvectl { .. } => {
                "check that `resolvectl status` works, or stop systemd-resolved if nobody needs it".to_owned()
            }
            Self::NftAnswer { .. } => "install nftables 1.0 or newer".to_owned(),
            Self::Died { .. } => "this is a bug; the daemon's log says more".to_owned(),
            Self::Resolvers { .. } => "set `network.resolvers` in the daemon's configuration".to_owned(),
        })
    }
}
