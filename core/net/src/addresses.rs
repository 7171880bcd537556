//! Choosing addresses in the subnet. Pure: what is taken, the store knows.

use std::{collections::HashSet, net::Ipv4Addr};

use ipnet::Ipv4Net;

/// The lowest host address that is neither the gateway nor taken; `None` where the subnet is full. Network and broadcast
/// address are never given.
pub fn next_free(subnet: Ipv4Net, gateway: Ipv4Addr, taken: &[Ipv4Addr]) -> Option<Ipv4Addr> {
    let taken: HashSet<_> = taken.iter().collect();
    usable(subnet).find(|address| *address != gateway && !taken.contains(address))
}

/// The gateway the host takes: the first usable address.
pub fn gateway(subnet: Ipv4Net) -> Option<Ipv4Addr> {
    usable(subnet).next()
}

/// How many VMs fit beside the gateway.
pub fn capacity(subnet: Ipv4Net) -> u64 {
    (1_u64 << (32 - subnet.prefix_len())).saturating_sub(3)
}

/// An address's number in its subnet, e.g. 2 for 10.213.0.2 in 10.213.0.0/24.
pub fn host_number(subnet: Ipv4Net, address: Ipv4Addr) -> u32 {
    u32::from(address).wrapping_sub(u32::from(subnet.network()))
}

/// All but network and broadcast address; nothing for /31 and /32, on which there is no room for a gateway and a guest.
fn usable(subnet: Ipv4Net) -> impl Iterator<Item = Ipv4Addr> {
    let (network, broadcast) = (u32::from(subnet.network()), u32::from(subnet.broadcast()));
    (network.saturating_add(1)..broadcast).map(Ipv4Addr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_given_from_below_without_the_special_ones() {
        let subnet: Ipv4Net = "10.213.0.0/29".parse().unwrap();
        let gateway = gateway(subnet).unwrap();
        assert_eq!(gateway, Ipv4Addr::new(10, 213, 0, 1));
        let mut taken = Vec::new();
        while let Some(next) = next_free(subnet, gateway, &taken) {
            taken.push(next);
        }
        assert_eq!(taken, (2..=6).map(|n| Ipv4Addr::new(10, 213, 0, n)).collect::<Vec<_>>());
        assert_eq!(taken.len() as u64, capacity(subnet));
        // A freed one is given again.
        let freed = taken.remove(2);
        assert_eq!(next_free(subnet, gateway, &taken), Some(freed));
    }

    #[test]
    fn subnets_without_room_give_nothing() {
        for subnet in ["10.0.0.0/31", "10.0.0.0/32", "10.0.0.4/30"] {
            let subnet: Ipv4Net = subnet.parse().unwrap();
            let host = gateway(subnet).unwrap_or(Ipv4Addr::UNSPECIFIED);
            assert_eq!(next_free(subnet, host, &[]).is_some(), subnet.prefix_len() == 30);
            assert_eq!(capacity(subnet), u64::from(subnet.prefix_len() == 30));
        }
    }

    #[test]
    fn host_numbers_count_from_the_network_address() {
        let subnet: Ipv4Net = "10.213.0.0/16".parse().unwrap();
        assert_eq!(host_number(subnet, Ipv4Addr::new(10, 213, 1, 2)), 258);
    }
}
