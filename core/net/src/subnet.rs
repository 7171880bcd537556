//! Choosing a subnet that nothing on the host uses.

use ipnet::Ipv4Net;

use crate::{Net, NetError};

/// A route or address of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRoute {
    /// Where to; an address counts with its prefix length.
    pub destination: Ipv4Net,
    /// Through which device; none for e.g. blackhole routes.
    pub device: Option<String>,
}

/// The subnets that are tried, in this order, where the configuration names none: 10.213.0.0/24 to 10.213.255.0/24, then, for
/// hosts where a VPN takes all of 10.0.0.0/8, 192.168.213.0/24 and 172.29.213.0/24 (all private: RFC 1918).
pub fn candidates() -> Vec<Ipv4Net> {
    let ten = (0..=255_u32).map(|third| 0x0ad5_0000 | third << 8);
    ten.chain([0xc0a8_d500, 0xac1d_d500]).filter_map(|base| Ipv4Net::new(base.into(), 24).ok()).collect()
}

/// The first candidate that overlaps with nothing.
///
/// # Errors
/// [`NetError::NoFreeSubnet`], or the host cannot be asked.
pub async fn pick_subnet(
    net: &dyn Net,
    candidates: &[Ipv4Net],
    own_bridge: &str,
) -> Result<Ipv4Net, NetError> {
    let routes = net.routes().await?;
    candidates
        .iter()
        .copied()
        .find(|subnet| clash(*subnet, &routes, own_bridge).is_none())
        .ok_or(NetError::NoFreeSubnet { count: candidates.len() })
}

/// The first route that overlaps. Default routes do not count, nor do their halves 0.0.0.0/1 and 128.0.0.0/1,
/// with which VPN clients overrule them.
pub(crate) fn clash<'a>(subnet: Ipv4Net, routes: &'a [HostRoute], own_bridge: &str) -> Option<&'a HostRoute> {
    routes
        .iter()
        .filter(|route| route.destination.prefix_len() > 1 && route.device.as_deref() != Some(own_bridge))
        .find(|route| subnet.contains(&route.destination) || route.destination.contains(&subnet))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: &str, device: &str) -> HostRoute {
        HostRoute { destination: destination.parse().unwrap(), device: Some(device.to_owned()) }
    }

    #[test]
    fn wider_narrower_and_equal_routes_clash() {
        let subnet = "10.213.4.0/24".parse().unwrap();
        for (destination, clashes) in [
            ("10.213.4.0/24", true),
            ("10.0.0.0/8", true),
            ("10.213.4.77/32", true),
            ("10.213.5.0/24", false),
            ("0.0.0.0/0", false),
            ("0.0.0.0/1", false),
        ] {
            let routes = [route(destination, "tun0")];
            assert_eq!(clash(subnet, &routes, "vmbr-3f2a").is_some(), clashes, "{destination}");
        }
        assert!(clash(subnet, &[route("10.213.4.0/24", "vmbr-3f2a")], "vmbr-3f2a").is_none());
    }

    #[test]
    fn candidates_are_private_and_differ() {
        let all = candidates();
        assert_eq!(all.len(), 258);
        assert_eq!(all[0].to_string(), "10.213.0.0/24");
        assert_eq!(all[257].to_string(), "172.29.213.0/24");
        assert!(all.iter().all(|subnet| subnet.network().is_private()));
    }
}
