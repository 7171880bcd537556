//! Names that stand for addresses (RFC 1035, section 3.5; RFC 3596, section 2.5).

use std::net::{AddrParseError, IpAddr, Ipv4Addr, Ipv6Addr};

/// What a name below the reverse domains stands for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reverse {
    /// One address.
    Address(IpAddr),
    /// A network: names of addresses are below it.
    Part,
    /// Nothing.
    Not,
}

/// None where the name is not below a reverse domain.
pub(crate) fn parse(name: &str) -> Option<Reverse> {
    let (labels, of_v4) = match name.strip_suffix(".in-addr.arpa") {
        Some(labels) => (labels, true),
        None => (name.strip_suffix(".ip6.arpa")?, false),
    };
    let mut bytes = [0_u8; 16];
    let mut count = 0;
    for label in labels.rsplit('.') {
        if of_v4 {
            // One form each: `07` is another name than `7`.
            let byte = label.parse::<u8>().ok().filter(|byte| byte.to_string() == label);
            let (Some(byte), true) = (byte, count < 4) else { return Some(Reverse::Not) };
            bytes[count] = byte;
        } else {
            let nibble = match label.as_bytes() {
                [byte] => char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok()),
                _ => None,
            };
            let (Some(nibble), true) = (nibble, count < 32) else { return Some(Reverse::Not) };
            bytes[count / 2] |= if count % 2 == 0 { nibble << 4 } else { nibble };
        }
        count += 1;
    }
    Some(match (of_v4, count) {
        (true, 4) => Reverse::Address(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()),
        (false, 32) => Reverse::Address(Ipv6Addr::from(bytes).into()),
        _ => Reverse::Part,
    })
}

/// The zones that hold the names of a network's addresses. A network whose prefix ends within a label has several; one that is
/// smaller than the last label shares its zone with its neighbours, who are none of ours on a bridge of our own.
pub(crate) fn zones(network: &str) -> Result<Vec<String>, AddrParseError> {
    let (address, prefix) = network.split_once('/').unwrap_or((network, ""));
    match address.parse()? {
        IpAddr::V4(address) => {
            let prefix = prefix.parse().unwrap_or(32).clamp(8, 24_usize);
            let labels = prefix.div_ceil(8);
            let free = labels * 8 - prefix;
            let mut octets = address.octets();
            octets[labels - 1] &= u8::MAX << free;
            Ok((0..1_u8 << free)
                .map(|number| {
                    let last = octets[labels - 1] | number;
                    let upper = octets[..labels - 1].iter().rev();
                    upper.fold(last.to_string(), |name, octet| format!("{name}.{octet}")) + ".in-addr.arpa"
                })
                .collect())
        }
        IpAddr::V6(address) => {
            let prefix = prefix.parse().unwrap_or(128).clamp(4, 124_usize);
            // The zone above, where the prefix ends within a digit.
            let digits = format!("{:032x}", address.to_bits());
            let labels = digits[..prefix / 4].chars().rev().map(|digit| format!("{digit}."));
            Ok(vec![labels.collect::<String>() + "ip6.arpa"])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_the_zones_of_all_its_addresses() {
        assert_eq!(zones("192.0.2.0/24").unwrap(), ["2.0.192.in-addr.arpa"]);
        assert_eq!(zones("192.0.2.64/26").unwrap(), ["2.0.192.in-addr.arpa"]);
        assert_eq!(zones("10.20.0.0/16").unwrap(), ["20.10.in-addr.arpa"]);
        assert_eq!(
            zones("10.20.5.1/22").unwrap(),
            [4, 5, 6, 7].map(|last| format!("{last}.20.10.in-addr.arpa"))
        );
        assert_eq!(zones("10.0.0.0/9").unwrap().len(), 128);
        assert_eq!(zones("2001:db8::/64").unwrap(), ["0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa"]);
        assert!(zones("bridge").is_err());
    }

    #[test]
    fn every_address_has_one_name() {
        for name in [
            "07.2.0.192.in-addr.arpa",
            "256.2.0.192.in-addr.arpa",
            "1.7.2.0.192.in-addr.arpa",
            "+7.2.0.192.in-addr.arpa",
        ] {
            assert_eq!(parse(name), Some(Reverse::Not), "{name}");
        }
        assert_eq!(parse("1.10.in-addr.arpa"), Some(Reverse::Part));
        assert_eq!(parse("ab.ip6.arpa"), Some(Reverse::Not));
        assert_eq!(parse("dev.vm"), None);
        assert_eq!(parse("4.3.2.1.in-addr.arpa"), Some(Reverse::Address([1, 2, 3, 4].into())));
    }
}
