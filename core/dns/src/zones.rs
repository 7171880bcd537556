//! Which zone a name is in, and the records that every zone has by itself.

use std::{collections::HashMap, net::IpAddr};

use hickory_server::proto::rr::{
    Name, RData, Record,
    rdata::{NS, SOA},
};
use ipnet::IpNet;

/// A zone this server is the authority for.
#[derive(Debug, Clone)]
pub(crate) struct Zone {
    /// Its topmost name.
    pub(crate) apex: Name,
    /// Whether it is the reverse zone of a private network.
    pub(crate) reverse: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Zones {
    by_apex: HashMap<Name, Zone>,
}

impl Zones {
    /// The zones of a resolver and of the networks whose addresses it can name.
    pub(crate) fn new(forward: Vec<Name>, reverse: &[IpNet]) -> Self {
        let forward = forward.into_iter().map(|apex| (apex, false));
        let reverse = reverse.iter().flat_map(reverse_zones).map(|apex| (apex, true));
        let by_apex = forward
            .chain(reverse)
            .map(|(mut apex, reverse)| {
                apex.set_fqdn(true);
                (apex.clone(), Zone { apex, reverse })
            })
            .collect();
        Self { by_apex }
    }

    /// The most specific zone that contains a name.
    pub(crate) fn find(&self, name: &Name) -> Option<&Zone> {
        let mut ancestor = name.clone();
        loop {
            if let Some(zone) = self.by_apex.get(&ancestor) {
                return Some(zone);
            }
            if ancestor.is_root() {
                return None;
            }
            ancestor = ancestor.base_name();
        }
    }
}

impl Zone {
    /// The start of authority, which every zone has and every negative answer carries (RFC 2308, section 3). The values are
    /// those of RFC 6303, section 3, for zones that exist on one host only, but for the time that "no" may be remembered.
    pub(crate) fn soa(&self, negative_ttl: u32) -> Record {
        let mailbox = Name::from_labels(["nobody", "invalid"]).unwrap_or_default();
        let soa = SOA::new(self.apex.clone(), mailbox, 1, 3600, 1200, 604_800, negative_ttl);
        Record::from_rdata(self.apex.clone(), negative_ttl, RData::SOA(soa))
    }

    /// The name server record, which every zone must have (RFC 1034, section 4.2.1).
    pub(crate) fn ns(&self, ttl: u32) -> Record {
        Record::from_rdata(self.apex.clone(), ttl, RData::NS(NS(self.apex.clone())))
    }
}

/// The zones that hold exactly the PTR records of a network: names are cut at bytes (RFC 1035, section 3.5) or at
/// hexadecimal digits (RFC 3596, section 2.5), so a network cut elsewhere has up to 128 of them.
fn reverse_zones(network: &IpNet) -> Vec<Name> {
    let (bits, parts) = match network {
        IpNet::V4(_) => (8, 4),
        IpNet::V6(_) => (4, 32),
    };
    let cut = network.prefix_len().div_ceil(bits) * bits;
    let Ok(subnets) = network.subnets(cut) else { return Vec::new() };
    subnets
        .map(|subnet: IpNet| {
            let unused = parts - usize::from(cut / bits);
            let mut name = Name::from(subnet.network());
            for _ in 0..unused {
                name = name.base_name();
            }
            name
        })
        .collect()
}

/// Whether an address is in one of these networks, however the kernel writes it (RFC 4291, section 2.5.5.2).
pub(crate) fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(network: &str) -> Vec<String> {
        reverse_zones(&network.parse().unwrap()).iter().map(Name::to_string).collect()
    }

    #[test]
    fn a_network_has_its_own_reverse_zones_and_no_other() {
        assert_eq!(names("10.213.4.0/24"), ["4.213.10.in-addr.arpa."]);
        assert_eq!(names("10.0.0.0/8"), ["10.in-addr.arpa."]);
        assert_eq!(names("10.213.4.0/23"), ["4.213.10.in-addr.arpa.", "5.213.10.in-addr.arpa."]);
        assert_eq!(names("10.213.4.7/32"), ["7.4.213.10.in-addr.arpa."]);
        assert_eq!(names("10.213.4.128/25").len(), 128);
        assert_eq!(names("fd00:1::/32"), ["1.0.0.0.0.0.d.f.ip6.arpa."]);
    }

    #[test]
    fn the_most_specific_zone_wins_and_case_does_not_matter() {
        let zones = Zones::new(
            vec!["vm".parse().unwrap(), "lab.VM.".parse().unwrap()],
            &["10.213.4.0/24".parse().unwrap()],
        );
        let find =
            |name: &str| zones.find(&name.parse().unwrap()).map(|zone| zone.apex.to_string().to_lowercase());
        assert_eq!(find("a.Vm.").as_deref(), Some("vm."));
        assert_eq!(find("vm.").as_deref(), Some("vm."));
        assert_eq!(find("a.b.LAB.vm.").as_deref(), Some("lab.vm."));
        assert_eq!(find("7.4.213.10.in-addr.arpa.").as_deref(), Some("4.213.10.in-addr.arpa."));
        assert_eq!(find("7.5.213.10.in-addr.arpa."), None);
        assert_eq!(find("evm."), None);
        assert_eq!(find("."), None);
    }
}
