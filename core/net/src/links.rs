//! Network devices, addresses and routes through netlink (rtnetlink(7)).
//!
//! A connection is opened for each operation: it costs one socket, holds no state that could be stale, and is in
//! the network namespace of the thread that asks.

use std::{io, net::IpAddr};

use futures::{Stream, TryStreamExt};
use ipnet::Ipv4Net;
use rtnetlink::{
    AddressMessageBuilder, Error, Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressMessage},
        link::{BridgeStpState, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage},
    },
};
use tokio::task::JoinHandle;

use crate::{HostRoute, NetError};

/// An open netlink connection.
pub(crate) struct Links {
    handle: Handle,
    task: JoinHandle<()>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A network device.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) kind: Option<InfoKind>,
    pub(crate) up: bool,
    pub(crate) controller: Option<u32>,
    pub(crate) mtu: Option<u32>,
}

impl Link {
    fn from_message(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            kind: None,
            up: message.header.flags.contains(LinkFlags::Up),
            controller: None,
            mtu: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::Mtu(mtu) => link.mtu = Some(mtu),
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        link
    }

    /// The kind for people.
    pub(crate) fn describe(&self) -> String {
        match &self.kind {
            Some(kind) => format!("a device of kind {kind}"),
            None => "a device that is not virtual".to_owned(),
        }
    }
}

impl Links {
    pub(crate) fn open() -> Result<Self, NetError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|source| NetError::Socket { source })?;
        Ok(Self { handle, task: tokio::spawn(connection) })
    }

    /// The device of a name.
    pub(crate) async fn find(&self, name: &str) -> Result<Option<Link>, NetError> {
        let found = self.handle.link().get().match_name(name).execute();
        match first(found).await {
            Ok(message) => Ok(message.map(Link::from_message)),
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(None),
            Err(source) => Err(refused("look up", name, source)),
        }
    }

    /// All devices.
    pub(crate) async fn all(&self) -> Result<Vec<Link>, NetError> {
        let all = self.handle.link().get().execute().map_ok(Link::from_message).try_collect().await;
        all.map_err(|error| refused("list", "devices", to_io(error)))
    }

    /// Makes a bridge that forwards at once: no spanning tree, no delay before a port forwards.
    pub(crate) async fn add_bridge(&self, name: &str, mac: [u8; 6]) -> Result<(), NetError> {
        let message = LinkBridge::new(name)
            .address(mac.to_vec())
            .stp_state(BridgeStpState::Disabled)
            .forward_delay(0)
            .build();
        match self.handle.link().add(message).execute().await.map_err(to_io) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EEXIST) => Ok(()),
            other => other.map_err(|source| refused("create the bridge", name, source)),
        }
    }

    /// Sets a device up.
    pub(crate) async fn set_up(&self, link: &Link) -> Result<(), NetError> {
        self.change(link, LinkUnspec::new_with_index(link.index).up(), "set up").await
    }

    /// Makes a device a port of a bridge and sets it up.
    pub(crate) async fn set_port(&self, link: &Link, bridge: &Link) -> Result<(), NetError> {
        let change = LinkUnspec::new_with_index(link.index).controller(bridge.index).up();
        self.change(link, change, "connect to its bridge").await
    }

    async fn change(
        &self,
        link: &Link,
        change: LinkMessageBuilder<LinkUnspec>,
        action: &'static str,
    ) -> Result<(), NetError> {
        let done = self.handle.link().change(change.build()).execute().await;
        done.map_err(|error| refused(action, &link.name, to_io(error)))
    }

    /// Removes a device; one that is gone is no error.
    pub(crate) async fn delete(&self, link: &Link) -> Result<(), NetError> {
        match self.handle.link().del(link.index).execute().await.map_err(to_io) {
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(()),
            other => other.map_err(|source| refused("delete", &link.name, source)),
        }
    }

    /// The IPv4 addresses of a device with their prefix lengths.
    pub(crate) async fn addresses(&self, link: &Link) -> Result<Vec<Ipv4Net>, NetError> {
        let all = self.all_addresses().await?;
        Ok(all.into_iter().filter(|(index, _)| *index == link.index).map(|(_, address)| address).collect())
    }

    async fn all_addresses(&self) -> Result<Vec<(u32, Ipv4Net)>, NetError> {
        let messages: Result<Vec<AddressMessage>, _> =
            self.handle.address().get().execute().try_collect().await;
        let messages = messages.map_err(|error| refused("list", "addresses", to_io(error)))?;
        Ok(messages.iter().filter_map(|message| Some((message.header.index, address_of(message)?))).collect())
    }

    /// Gives a device an address; one it has already is no error.
    pub(crate) async fn add_address(&self, link: &Link, address: Ipv4Net) -> Result<(), NetError> {
        let request = self.handle.address().add(link.index, IpAddr::V4(address.addr()), address.prefix_len());
        match request.execute().await.map_err(to_io) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EEXIST) => Ok(()),
            other => other.map_err(|source| refused("give an address to", &link.name, source)),
        }
    }

    /// Takes an address away.
    pub(crate) async fn delete_address(&self, link: &Link, address: Ipv4Net) -> Result<(), NetError> {
        let message = AddressMessageBuilder::<std::net::Ipv4Addr>::new()
            .index(link.index)
            .address(address.addr(), address.prefix_len())
            .build();
        let done = self.handle.address().del(message).execute().await;
        done.map_err(|error| refused("take an address from", &link.name, to_io(error)))
    }

    /// Routes of all tables and addresses, the latter also of devices that are down and so have no routes.
    pub(crate) async fn routes(&self) -> Result<Vec<HostRoute>, NetError> {
        let links = self.all().await?;
        let name = |index: u32| links.iter().find(|link| link.index == index).map(|link| link.name.clone());
        let mut routes: Vec<_> = self
            .route_messages()
            .await?
            .iter()
            .filter_map(|message| {
                let destination = destination_of(message)?;
                Some(HostRoute { destination, device: output_of(message).and_then(name) })
            })
            .collect();
        let addresses = self.all_addresses().await?;
        routes.extend(
            addresses
                .iter()
                .map(|(index, address)| HostRoute { destination: address.trunc(), device: name(*index) }),
        );
        Ok(routes)
    }

    /// The MTU of the device of the default route, if there is one.
    pub(crate) async fn uplink_mtu(&self) -> Result<Option<u32>, NetError> {
        let messages = self.route_messages().await?;
        let is_default = |message: &&RouteMessage| {
            message.header.destination_prefix_length == 0 && destination_of(message).is_none()
        };
        let Some(index) = messages.iter().filter(is_default).find_map(output_of) else { return Ok(None) };
        Ok(self.all().await?.into_iter().find(|link| link.index == index).and_then(|link| link.mtu))
    }

    async fn route_messages(&self) -> Result<Vec<RouteMessage>, NetError> {
        let wanted = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
        let all: Result<Vec<RouteMessage>, _> = self.handle.route().get(wanted).execute().try_collect().await;
        let mut all = all.map_err(|error| refused("list", "routes", to_io(error)))?;
        all.retain(|message| message.header.address_family == AddressFamily::Inet);
        Ok(all)
    }
}

fn address_of(message: &AddressMessage) -> Option<Ipv4Net> {
    let find = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(IpAddr::V4(address)) if local => Some(*address),
            AddressAttribute::Address(IpAddr::V4(address)) if !local => Some(*address),
            _ => None,
        })
    };
    // On point-to-point devices "address" is the peer's.
    Ipv4Net::new(find(true).or_else(|| find(false))?, message.header.prefix_len).ok()
}

/// `None` for default routes, which carry no destination.
fn destination_of(message: &RouteMessage) -> Option<Ipv4Net> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => {
            Ipv4Net::new(*address, message.header.destination_prefix_length).ok().map(|net| net.trunc())
        }
        _ => None,
    })
}

fn output_of(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

async fn first<T>(stream: impl Stream<Item = Result<T, Error>>) -> io::Result<Option<T>> {
    std::pin::pin!(stream).try_next().await.map_err(to_io)
}

fn to_io(error: Error) -> io::Error {
    match error {
        Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

fn refused(action: &'static str, name: &str, source: io::Error) -> NetError {
    NetError::Netlink { action, name: name.to_owned(), source }
}
