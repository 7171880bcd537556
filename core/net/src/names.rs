//! Names and hardware addresses that follow from ids, so that they can be found without records.

use std::net::Ipv4Addr;

use vm_types::InstanceId;

use crate::NetError;

/// Longest name of a network device in bytes (IFNAMSIZ less the final NUL, see netdevice(7)).
pub const DEVICE_NAME_MAX: usize = 15;

/// The daemon's bridge, e.g. `vmbr-3f2a`.
pub fn bridge_name(instance: &InstanceId) -> String {
    format!("vmbr-{instance}")
}

/// The tap of the VM whose address has this host number in the subnet (see [`crate::addresses::host_number`]), e.g. `vt3f2a0002`. 14
/// bytes at most.
pub fn tap_name(instance: &InstanceId, host_number: u32) -> String {
    format!("vt{instance}{host_number:04x}")
}

/// What the names of all taps of a daemon begin with.
pub fn tap_prefix(instance: &InstanceId) -> String {
    format!("vt{instance}")
}

/// The daemon's nftables table, e.g. `vmd_3f2a`.
pub fn table_name(instance: &InstanceId) -> String {
    format!("vmd_{instance}")
}

/// The hardware address that goes with an address: locally administered (the 2 in 02), unicast, e.g. `02:00:0a:d5:00:02`.
pub fn mac_for(address: Ipv4Addr) -> String {
    mac_bytes(address).map(|byte| format!("{byte:02x}")).join(":")
}

pub(crate) fn mac_bytes(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x00, a, b, c, d]
}

/// Refuses what the kernel would (dev_valid_name).
pub(crate) fn check_device_name(name: &str) -> Result<(), NetError> {
    let fits = (1..=DEVICE_NAME_MAX).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.bytes().any(|b| matches!(b, b'/' | b':' | b'%' | 0) || b.is_ascii_whitespace());
    if fits { Ok(()) } else { Err(NetError::BadName { name: name.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_say_whose_they_are() {
        let instance: InstanceId = "3f2a".parse().unwrap();
        assert_eq!(bridge_name(&instance), "vmbr-3f2a");
        assert_eq!(tap_name(&instance, 2), "vt3f2a0002");
        assert_eq!(table_name(&instance), "vmd_3f2a");
        for name in [bridge_name(&instance), tap_name(&instance, u32::MAX)] {
            check_device_name(&name).unwrap();
        }
        assert!(tap_name(&instance, 7).starts_with(&tap_prefix(&instance)));
        for bad in ["", "a/b", "0123456789abcdef", "a b", ".."] {
            assert!(check_device_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hardware_addresses_are_local_unicast_and_differ_by_address() {
        assert_eq!(mac_for(Ipv4Addr::new(10, 213, 0, 255)), "02:00:0a:d5:00:ff");
    }
}
