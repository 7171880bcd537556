//! What can go wrong with the server itself; what goes wrong with a question is an answer.

use std::{io, net::SocketAddr};

/// A failed operation of the server.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// An address that means every interface.
    #[error("will not answer DNS on {address}, which is every interface of the host")]
    Wildcard {
        /// The address.
        address: SocketAddr,
    },
    /// The server listens there already.
    #[error("DNS is already answered on {address}")]
    Already {
        /// The address.
        address: SocketAddr,
    },
    /// A socket could not be bound.
    #[error("could not listen for DNS on {address} ({transport})")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// `UDP` or `TCP`.
        transport: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl DnsError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Wildcard { .. } => {
                "give the address of one interface, e.g. the bridge's, so that strangers cannot ask"
                    .to_owned()
            }
            Self::Already { .. } => return None,
            Self::Bind { address, source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => format!(
                    "another DNS server has this port: `ss -lunpt 'sport = :{}'` shows which; if it is dnsmasq or named, \
                     make it listen on its own addresses only (dnsmasq: bind-interfaces)",
                    address.port()
                ),
                io::ErrorKind::AddrNotAvailable => {
                    format!("no interface of this host has {}: is the bridge up?", address.ip())
                }
                io::ErrorKind::PermissionDenied => {
                    "run the daemon as root (ports below 1024 need CAP_NET_BIND_SERVICE)".to_owned()
                }
                _ => return None,
            },
        })
    }
}
