//! The guest's configuration from the VM's record.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    time::{SystemTime, UNIX_EPOCH},
};

use ipnet::{IpNet, Ipv4Net};
use vm_types::{
    guest::config::{GuestConfig, HostsEntry, Interface, Root, Route, SshConfig, VERSION},
    image::ImageConfig,
    vm::VmRecord,
};

/// virtio serial of the root disk.
pub(super) const ROOT_SERIAL: &str = "root";

/// A VM's place in the network.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) subnet: Ipv4Net,
    pub(super) gateway: Ipv4Addr,
    pub(super) address: Ipv4Addr,
    pub(super) mac: String,
    pub(super) resolvers: Vec<IpAddr>,
    pub(super) search: Vec<String>,
    pub(super) mtu: Option<u32>,
}

pub(super) fn config(
    record: &VmRecord,
    place: Option<&Place>,
    host_key: String,
    client_public_key: &str,
) -> GuestConfig {
    let name = record.spec.name.to_string();
    // Derived, so that it stays the same over all boots: the VM's id, repeated to the length of a machine id.
    let machine_id: String = record.id.as_str().chars().cycle().take(32).collect();
    let default_route: IpNet = Ipv4Net::default().into();
    GuestConfig {
        version: VERSION,
        hostname: name.clone(),
        machine_id,
        clock_unix_nanos: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .ok()
            .and_then(|since| u64::try_from(since.as_nanos()).ok()),
        interfaces: place
            .map(|place| Interface {
                mac: place.mac.clone(),
                addresses: Ipv4Net::new(place.address, place.subnet.prefix_len())
                    .map(IpNet::V4)
                    .into_iter()
                    .collect(),
                mtu: place.mtu,
            })
            .into_iter()
            .collect(),
        routes: place
            .map(|place| Route { destination: default_route, gateway: place.gateway.into() })
            .into_iter()
            .collect(),
        resolvers: place.map(|place| place.resolvers.clone()).unwrap_or_default(),
        search: place.map(|place| place.search.clone()).unwrap_or_default(),
        hosts: vec![HostsEntry {
            // Debian's convention (hostname resolution without a permanent address) where there is no network.
            address: place.map_or(Ipv4Addr::new(127, 0, 1, 1), |place| place.address).into(),
            names: vec![name],
        }],
        ssh: SshConfig { host_key, authorized_keys: vec![client_public_key.to_owned()] },
        environment: BTreeMap::new(),
        files: Vec::new(),
        mounts: Vec::new(),
        boot_commands: Vec::new(),
        modules: Vec::new(),
        units: Vec::new(),
        root: Root { serial: ROOT_SERIAL.into(), fstype: "ext4".into(), grow: true },
        agent_init: false,
    }
}

/// The variables of an image. A name without a value is one of the maker's own environment, which is not here.
pub(super) fn environment(image: &ImageConfig) -> BTreeMap<String, String> {
    let variables = image.env.iter().filter_map(|variable| variable.split_once('='));
    variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}
