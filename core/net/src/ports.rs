//! Ports of the host that lead to a guest.
//!
//! ```text
//!   from elsewhere    nat_prerouting ─┐
//!                                     ├─ destination becomes the guest's ─ forward (base table: dnat'ed, accept)
//!   from the host     nat_output ─────┘                                  └ nat_postrouting: from 127.0.0.1, masquerade
//! ```
//!
//! The kernel does all of it, so a published port outlives the daemon. What comes from a loopback address gets the bridge's
//! instead, for a guest could not answer it; that such a packet may go to the bridge at all, and its answer come
//! back, is the bridge's setting `route_localnet`, which is on while a port needs it. It would let guests speak to 127.0.0.1
//! of the host, so the base table's guards must be there first. Guests themselves do not reach published ports by the host's
//! addresses: they would be its services.
//!
//! The daemon also *binds* each port, and serves nobody there: no other program gets it and wonders where its
//! connections go, and another program's port is not taken from it.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket},
    os::fd::AsRawFd,
};

use serde_json::{Value, json};
use vm_types::{Effect, Handle, Observed, plan::Transport};

use crate::{
    NetError,
    firewall::{is_whole, loopback_net},
    nft::{Mark, Placed, connection, field, fingerprint, has_chains, matches, meta, objects},
};

pub(crate) const KIND: &str = "vmd-port";

pub(crate) const CHAINS: [&str; 3] = ["port_prerouting", "port_output", "port_postrouting"];

/// How many ports the kernel may offer that lead to guests already.
const ATTEMPTS: usize = 64;

/// [`Effect::Port`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Port<'a> {
    pub(crate) table: &'a str,
    pub(crate) bridge: &'a str,
    pub(crate) owner: &'a str,
    protocol: Transport,
    host: SocketAddrV4,
    guest: SocketAddrV4,
}

/// A port that no other program can have.
#[derive(Debug)]
pub(crate) struct Held {
    socket: Socket,
    pub(crate) address: SocketAddrV4,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    #[expect(dead_code, reason = "held for what the kernel does while it is open")]
    Udp(UdpSocket),
}

impl Drop for Held {
    fn drop(&mut self) {
        // A child that another thread has just forked has a copy until it runs its program, and would go on listening.
        if let Socket::Tcp(listener) = &self.socket {
            let _ = nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
    }
}

/// A published port as the table has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Published<'a> {
    /// The comment up to the owner's end.
    protocol: &'a str,
    address: SocketAddrV4,
    fingerprint: &'a str,
}

impl<'a> Port<'a> {
    /// `None` for one that cannot be: guests have no IPv6 addresses.
    pub(crate) fn of(effect: &'a Effect) -> Result<Option<Self>, NetError> {
        let Effect::Port { table, bridge, owner, protocol, host, guest } = effect else {
            return Err(NetError::NotMine { effect: effect.id() });
        };
        let SocketAddr::V4(host) = *host else { return Ok(None) };
        Ok(Some(Self { table, bridge, owner, protocol: *protocol, host, guest: *guest }))
    }

    /// As [`Self::of`], where it must be.
    pub(crate) fn wanted(effect: &'a Effect) -> Result<Self, NetError> {
        match (Self::of(effect)?, effect) {
            (Some(port), _) => Ok(port),
            (None, Effect::Port { host, .. }) => Err(NetError::PortFamily { address: *host }),
            (None, _) => Err(NetError::NotMine { effect: effect.id() }),
        }
    }

    /// The address that it has in the table's listing, where that is as it should be.
    pub(crate) fn published(self, listing: Option<&Value>) -> Result<SocketAddrV4, Observed> {
        let found = listing.map(|listing| self.mark().find(listing)).unwrap_or_default();
        let Some(first) = found.first() else { return Err(Observed::Absent) };
        let there = Published::read(first.says).filter(|there| {
            let wanted = self.rules(there.address);
            there.address.ip() == self.host.ip()
                && (self.host.port() == 0 || self.host.port() == there.address.port())
                && there.protocol == self.protocol_name()
                && there.fingerprint == fingerprint(&wanted)
                && found.len() == wanted.len()
                && found.iter().all(|rule| rule.says == first.says)
        });
        there
            .map(|there| there.address)
            .ok_or_else(|| Observed::Foreign("its rules differ from what they should be".to_owned()))
    }

    /// Chooses, holds and publishes: the commands that make it so in the listed table, in which it is not as it should be.
    /// `former` is what was held for it so far.
    pub(crate) fn publish(
        self,
        listing: Option<&Value>,
        former: Option<Held>,
    ) -> Result<(Held, Vec<Value>), NetError> {
        let listing = listing
            .filter(|listing| is_whole(listing) && has_chains(listing, CHAINS.into_iter()))
            .ok_or_else(|| NetError::NoTable { table: self.table.to_owned() })?;
        let held = self.choose(listing, former)?;
        let mut commands = self.undo(listing);
        let wanted = self.rules(held.address);
        let says = format!("{} {} {}", self.protocol_name(), held.address, fingerprint(&wanted));
        let comment = self.mark().comment(&says);
        commands.extend(wanted.iter().map(|rule| rule.add(self.table, &comment)));
        Ok((held, commands))
    }

    /// Commands that delete what the listed table has of it.
    pub(crate) fn undo(self, listing: &Value) -> Vec<Value> {
        self.mark().find(listing).iter().map(|rule| rule.delete(self.table)).collect()
    }

    /// Whether it is reached from loopback addresses.
    pub(crate) fn is_local(self) -> bool {
        is_local(*self.host.ip())
    }

    /// Whether any of the listed table's ports but this one is reached from loopback addresses.
    pub(crate) fn others_are_local(self, listing: &Value) -> bool {
        self.others(listing).any(|(_, other)| is_local(*other.address.ip()))
    }

    /// Takes a port, so that no other program gets it.
    pub(crate) fn hold(self, address: SocketAddrV4) -> Result<Held, NetError> {
        let bound = match self.protocol {
            Transport::Tcp => {
                TcpListener::bind(address).and_then(|it| Ok((it.local_addr()?, Socket::Tcp(it))))
            }
            Transport::Udp => UdpSocket::bind(address).and_then(|it| Ok((it.local_addr()?, Socket::Udp(it)))),
        };
        match bound {
            Ok((SocketAddr::V4(address), socket)) => Ok(Held { socket, address }),
            Ok((SocketAddr::V6(_), _)) => Err(self.failed(address, io::ErrorKind::AddrNotAvailable.into())),
            Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                Err(self.taken(address, "another program".to_owned()))
            }
            Err(source) => Err(self.failed(address, source)),
        }
    }

    fn choose(self, listing: &Value, mut former: Option<Held>) -> Result<Held, NetError> {
        // Offered and not wanted; kept so long, that it is not offered again.
        let mut aside = Vec::new();
        while aside.len() < ATTEMPTS {
            let wanted = match self.before(listing) {
                Some(before) if aside.is_empty() && self.host.port() == 0 => before,
                _ => self.host,
            };
            if wanted.port() != 0
                && let Some(other) = self.owner_of(wanted, listing)
            {
                return Err(self.taken(wanted, other));
            }
            let held = match former.take() {
                Some(former) if former.address == wanted => Ok(former),
                _ => self.hold(wanted),
            };
            match held {
                Ok(held) if self.owner_of(held.address, listing).is_none() => return Ok(held),
                Ok(held) => aside.push(held),
                Err(_) if wanted != self.host => aside.push(self.hold(self.host)?),
                Err(error) => return Err(error),
            }
        }
        Err(self.taken(self.host, "other VMs".to_owned()))
    }

    /// The port it had so far, in another shape.
    pub(crate) fn before(self, listing: &Value) -> Option<SocketAddrV4> {
        let found = self.mark().find(listing);
        let there = Published::read(found.first()?.says)?;
        let fits = there.address.ip() == self.host.ip() && there.protocol == self.protocol_name();
        fits.then_some(there.address)
    }

    /// Whose published port stands in the way of this address.
    fn owner_of(self, address: SocketAddrV4, listing: &Value) -> Option<String> {
        let overlap = |other: Ipv4Addr| {
            other == *address.ip() || other.is_unspecified() || address.ip().is_unspecified()
        };
        self.others(listing)
            .find(|(_, other)| {
                other.protocol == self.protocol_name()
                    && other.address.port() == address.port()
                    && overlap(*other.address.ip())
            })
            .map(|(owner, _)| owner.to_owned())
    }

    /// The listed table's ports but this one, with their owners' names as they stand in comments.
    fn others(self, listing: &Value) -> impl Iterator<Item = (&str, Published<'_>)> {
        let own = self.mark().comment("");
        objects(listing, "rule").filter_map(move |rule| {
            let comment = rule["comment"].as_str().filter(|text| !text.starts_with(&own))?;
            let (owner, says) = comment.strip_prefix(KIND)?.strip_prefix(' ')?.split_once(' ')?;
            Some((owner, Published::read(says)?))
        })
    }

    fn rules(self, host: SocketAddrV4) -> Vec<Placed> {
        let elsewhere = matches("!=", meta("iifname"), json!(self.bridge));
        let to_host = if host.ip().is_unspecified() {
            matches("==", json!({ "fib": { "result": "type", "flags": ["daddr"] } }), json!("local"))
        } else {
            matches("==", field("ip", "daddr"), json!(host.ip()))
        };
        let ipv4 = matches("==", meta("nfproto"), json!("ipv4"));
        let port = |port: u16| matches("==", field(self.protocol_name(), "dport"), json!(port));
        let lead = json!({ "dnat": { "family": "ip", "addr": self.guest.ip(), "port": self.guest.port() } });

        let from_host = [ipv4.clone(), to_host.clone(), port(host.port()), lead.clone()];
        let mut rules = vec![Placed::new("port_output", from_host)];
        if !host.ip().is_loopback() {
            let from_elsewhere = [ipv4, elsewhere, to_host, port(host.port()), lead];
            rules.push(Placed::new("port_prerouting", from_elsewhere));
        }
        if is_local(*host.ip()) {
            rules.push(Placed::new(
                "port_postrouting",
                [
                    matches("==", meta("oifname"), json!(self.bridge)),
                    matches("==", field("ip", "saddr"), loopback_net()),
                    matches("==", field("ip", "daddr"), json!(self.guest.ip())),
                    port(self.guest.port()),
                    connection("status", &["dnat"]),
                    json!({ "masquerade": null }),
                ],
            ));
        }
        rules
    }

    fn mark(self) -> Mark {
        Mark::new(KIND, self.owner)
    }

    fn protocol_name(self) -> &'static str {
        match self.protocol {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        }
    }

    fn taken(self, address: SocketAddrV4, by: String) -> NetError {
        NetError::PortTaken { protocol: self.protocol_name(), address: address.into(), by }
    }

    fn failed(self, address: SocketAddrV4, source: io::Error) -> NetError {
        NetError::Port { protocol: self.protocol_name(), address: address.into(), source }
    }
}

impl<'a> Published<'a> {
    /// What a comment says behind the owner.
    fn read(says: &'a str) -> Option<Self> {
        let mut words = says.split(' ');
        let (protocol, address, fingerprint) = (words.next()?, words.next()?, words.next()?);
        Some(Self { protocol, address: address.parse().ok()?, fingerprint })
    }
}

/// What [`Handle`] tells of a published port.
pub(crate) fn handle(address: SocketAddrV4) -> Handle {
    Handle::Value { value: address.to_string() }
}

fn is_local(address: Ipv4Addr) -> bool {
    address.is_loopback() || address.is_unspecified()
}
