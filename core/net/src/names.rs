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

/// A tap of the daemon, e.g. `vt3f2a0002`. 14 bytes at most. Numbers are not used twice, whoever has the tap.
pub fn tap_name(instance: &InstanceId, number: u32) -> String {
    format!("vt{instance}{number:04x}")
}

/// The number of a tap of this instance; `None` for any other device.
pub fn tap_number(instance: &InstanceId, name: &str) -> Option<u32> {
    let number = u32::from_str_radix(name.strip_prefix(&tap_prefix(instance))?, 16).ok()?;
    // Only as we write it: a sign, capitals or further zeros are somebody else's.
    (tap_name(instance, number) == name).then_some(number)
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
        assert_eq!(tap_number(&instance, "vt3f2a00ff"), Some(255));
        assert_eq!(tap_number(&instance, &tap_name(&instance, u32::MAX)), Some(u32::MAX));
        for other in ["vt3f2a", "vt3f2a+001", "vt3f2a00FF", "vt3f2a00001", "vt3f2b0001", "vt3f2a0001x"] {
            assert_eq!(tap_number(&instance, other), None, "{other}");
        }
        for bad in ["", "a/b", "0123456789abcdef", "a b", ".."] {
            assert!(check_device_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hardware_addresses_are_local_unicast_and_differ_by_address() {
        assert_eq!(mac_for(Ipv4Addr::new(10, 213, 0, 255)), "02:00:0a:d5:00:ff");
    }
}
