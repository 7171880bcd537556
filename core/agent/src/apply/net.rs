//! Links, addresses and routes by rtnetlink.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
        link::LinkAttribute,
    },
};
use vm_types::guest::config::{GuestConfig, Interface, Route};

/// Brings up the loopback and what is configured; the result says what did not work.
pub(super) async fn apply(config: &GuestConfig) -> Vec<String> {
    let (connection, handle, _) = match rtnetlink::new_connection() {
        Ok(parts) => parts,
        Err(error) => return vec![format!("network: {error}")],
    };
    let driver = tokio::spawn(connection);
    let warnings = with(&handle, config).await;
    driver.abort();
    warnings
}

async fn with(handle: &Handle, config: &GuestConfig) -> Vec<String> {
    let links = match links(handle).await {
        Ok(links) => links,
        Err(error) => return vec![format!("network: {error}")],
    };
    let mut warnings = Vec::new();
    // The loopback is link 1 of every network namespace.
    if let Err(error) = up(handle, 1, None).await {
        warnings.push(format!("loopback: {error}"));
    }
    for interface in &config.interfaces {
        match links.get(&interface.mac.to_ascii_lowercase()) {
            None => warnings.push(format!("network: no interface has address {}", interface.mac)),
            Some(index) => {
                if let Err(error) = configure(handle, *index, interface).await {
                    warnings.push(format!("interface {}: {error}", interface.mac));
                }
            }
        }
    }
    for route in &config.routes {
        if let Err(error) = add_route(handle, route).await {
            warnings.push(format!("route {} by {}: {error}", route.destination, route.gateway));
        }
    }
    warnings
}

/// Indices by hardware address.
async fn links(handle: &Handle) -> Result<BTreeMap<String, u32>, rtnetlink::Error> {
    let mut found = BTreeMap::new();
    let mut links = handle.link().get().execute();
    while let Some(link) = links.try_next().await? {
        for attribute in &link.attributes {
            if let LinkAttribute::Address(bytes) = attribute {
                let text: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                found.insert(text.join(":"), link.header.index);
            }
        }
    }
    Ok(found)
}

async fn up(handle: &Handle, index: u32, mtu: Option<u32>) -> Result<(), rtnetlink::Error> {
    let mut message = LinkMessageBuilder::<LinkUnspec>::new().index(index).up();
    if let Some(mtu) = mtu {
        message = message.mtu(mtu);
    }
    handle.link().set(message.build()).execute().await
}

async fn configure(handle: &Handle, index: u32, interface: &Interface) -> Result<(), rtnetlink::Error> {
    up(handle, index, interface.mtu).await?;
    // A restored guest may still have another's addresses.
    let mut present = handle.address().get().set_link_index_filter(index).execute();
    let mut kept = Vec::new();
    let mut stale = Vec::new();
    while let Some(address) = present.try_next().await? {
        match net_of(&address) {
            Some(net) if interface.addresses.contains(&net) => kept.push(net),
            Some(_) if address.header.scope == AddressScope::Universe => stale.push(address),
            _ => {}
        }
    }
    for address in stale {
        handle.address().del(address).execute().await?;
    }
    for net in interface.addresses.iter().filter(|net| !kept.contains(net)) {
        let mut request = handle.address().add(index, net.addr(), net.prefix_len());
        if net.addr().is_ipv6() {
            // The daemon gives out addresses; waiting for duplicates would cost seconds.
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.replace().execute().await?;
    }
    Ok(())
}

fn net_of(message: &AddressMessage) -> Option<IpNet> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(peer) if address.is_none() => address = Some(*peer),
            _ => {}
        }
    }
    debug_assert!(matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6));
    IpNet::new(address?, message.header.prefix_len).ok()
}

async fn add_route(handle: &Handle, route: &Route) -> Result<(), String> {
    let length = route.destination.prefix_len();
    let message = match (route.destination.network(), route.gateway) {
        (IpAddr::V4(network), IpAddr::V4(gateway)) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(network, length)
            .gateway(gateway)
            .build(),
        (IpAddr::V6(network), IpAddr::V6(gateway)) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(network, length)
            .gateway(gateway)
            .build(),
        _ => return Err("destination and gateway are of different families".into()),
    };
    handle.route().add(message).replace().execute().await.map_err(|error| error.to_string())
}
