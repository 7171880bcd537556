//! Everything that can go wrong with the host's network.

use std::io;

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
                    "check that `nft list ruleset` works, that the kernel has nf_tables and nft_masq, and {privileges}"
                )
            }
            Self::NftAnswer { .. } => "install nftables 1.0 or newer".to_owned(),
            Self::Died { .. } => "this is a bug; the daemon's log says more".to_owned(),
            Self::Resolvers { .. } => "set `network.resolvers` in the daemon's configuration".to_owned(),
        })
    }
}
