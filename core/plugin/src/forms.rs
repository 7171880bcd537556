//! The forms of names, paths and values that a plugin gives. What passes here can stand in a configuration file, a command
//! line or a rule without meaning anything else.

use std::net::IpAddr;

use crate::{error::PluginError, plan::Network};

type Checked<T = ()> = Result<T, PluginError>;

fn bad(code: &str, what: &str, value: &str, rule: &str) -> PluginError {
    PluginError::new(&format!("bad.{code}"), format!("{value:.200?} is no {what}: {rule}"))
}

/// Letters, digits and some more, beginning with a letter or digit.
fn wordy(text: &str, most: usize, more: &[u8]) -> bool {
    (1..=most).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || more.contains(&b))
        && text.as_bytes()[0].is_ascii_alphanumeric()
}

/// The name that something planned goes by.
pub(crate) fn name(text: &str) -> Checked {
    if wordy(text, 63, b"-_.") && !text.contains("..") {
        return Ok(());
    }
    Err(bad(
        "name",
        "name",
        text,
        "1 to 63 of a-z, A-Z, 0-9, '-', '_', '.', beginning with a letter or digit",
    ))
}

/// A drive's serial (virtio: 20 bytes).
pub(crate) fn serial(text: &str) -> Checked {
    let form = (1..=20).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_');
    // The root's own name is not to be had.
    if form && text != "root" {
        return Ok(());
    }
    Err(bad("serial", "serial of a drive", text, "1 to 20 of a-z, 0-9, '-', '_', and not root"))
}

/// A path from the root.
pub(crate) fn absolute_path(text: &str) -> Checked {
    match text.strip_prefix('/') {
        Some(rest) if relative(rest) => Ok(()),
        _ => Err(bad(
            "path",
            "absolute path",
            text,
            "it begins with / and has no empty part, '.', '..' or control character",
        )),
    }
}

/// A path from somewhere.
pub(crate) fn relative_path(text: &str) -> Checked {
    if relative(text) && wordy(text, 255, b"-_./") {
        return Ok(());
    }
    Err(bad(
        "path",
        "relative path",
        text,
        "its parts are of a-z, A-Z, 0-9, '-', '_', '.', and none is empty, '.' or '..'",
    ))
}

fn relative(text: &str) -> bool {
    text.len() < 4096
        && !text.chars().any(char::is_control)
        && text.split('/').all(|part| !matches!(part, "" | "." | "..") && part.len() <= 255)
}

/// Permission bits.
pub(crate) fn mode(mode: u32) -> Checked {
    if mode <= 0o7777 {
        return Ok(());
    }
    Err(bad("mode", "file mode", &format!("{mode:o}"), "at most 7777 in octal"))
}

/// A variable's name (POSIX, 8.1).
pub(crate) fn variable(text: &str) -> Checked {
    let form = (1..=255).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !text.as_bytes()[0].is_ascii_digit();
    if form {
        return Ok(());
    }
    Err(bad("variable", "name of a variable", text, "letters, digits and '_', not beginning with a digit"))
}

/// A value that must not hold NUL or the end of a line.
pub(crate) fn line(what: &str, text: &str) -> Checked {
    if text.contains(['\0', '\n', '\r']) {
        return Err(bad("value", what, text, "no line breaks, no NUL"));
    }
    Ok(())
}

/// One of the kernel's arguments.
pub(crate) fn kernel_argument(text: &str) -> Checked {
    let form = (1..=256).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
    // What follows `--` goes to init.
    if form && text != "--" {
        return Ok(());
    }
    Err(bad(
        "kernel-argument",
        "kernel argument",
        text,
        "1 to 256 printable characters without spaces and quotes",
    ))
}

/// A name of the name service, in lower case.
pub(crate) fn domain(text: &str) -> Checked {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if text.len() <= 253 && text.split('.').all(label) {
        return Ok(());
    }
    Err(bad("domain", "domain name", text, "labels of a-z, 0-9, '-', '_', without a dot at the end"))
}

/// A word of the system: filesystem, module, mount option, unit, user.
pub(crate) fn word(what: &str, text: &str) -> Checked {
    if wordy(text, 255, b"-_.=:@+%/") && !text.contains("..") {
        return Ok(());
    }
    Err(bad("word", what, text, "letters, digits and -_.=:@+%/, beginning with a letter or digit"))
}

/// A module's or filesystem's name.
pub(crate) fn identifier(what: &str, text: &str) -> Checked {
    if wordy(text, 63, b"-_") {
        return Ok(());
    }
    Err(bad("identifier", what, text, "1 to 63 of letters, digits, '-' and '_'"))
}

/// A systemd unit's file name (systemd.unit(5)), of a kind that can be started at boot.
pub(crate) fn unit(text: &str) -> Checked {
    let kind = [".service", ".timer", ".socket", ".path", ".target"].iter().any(|kind| text.ends_with(kind));
    if kind && wordy(text, 128, b"-_.@") {
        return Ok(());
    }
    Err(bad(
        "unit",
        "name of a unit",
        text,
        "letters, digits and -_.@, ending with .service, .timer, .socket, .path or .target",
    ))
}

/// A setting of the bridge below `net/FAMILY/conf/BRIDGE`.
pub(crate) fn bridge_sysctl(key: &str) -> Checked {
    let form = key
        .split_once('/')
        .is_some_and(|(family, name)| matches!(family, "ipv4" | "ipv6") && wordy(name, 63, b"_"));
    if form {
        return Ok(());
    }
    Err(bad("sysctl", "setting of the bridge", key, "ipv4/NAME or ipv6/NAME"))
}

/// An address.
pub(crate) fn address(text: &str) -> Checked<IpAddr> {
    text.parse().map_err(|_| bad("address", "address", text, "IPv4 or IPv6, e.g. 192.0.2.1"))
}

/// An address or network; bits beyond the prefix are cleared.
pub(crate) fn network(text: &str) -> Checked<Network> {
    let error =
        || bad("network", "network", text, "an address, or one with a prefix length, e.g. 192.0.2.0/24");
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) if !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit()) => {
            (address, Some(prefix.parse::<u8>().map_err(|_| error())?))
        }
        Some(_) => return Err(error()),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| error())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.unwrap_or(most);
    if prefix > most {
        return Err(error());
    }
    let address = match address {
        IpAddr::V4(v4) => {
            IpAddr::V4((v4.to_bits() & u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)).into())
        }
        IpAddr::V6(v6) => {
            IpAddr::V6((v6.to_bits() & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)).into())
        }
    };
    Ok(Network { address, prefix })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_cannot_lead_elsewhere() {
        for good in ["/etc/motd", "/a b/c", "/.hidden", "/...", "/ä"] {
            absolute_path(good).unwrap();
        }
        for bad in [
            "",
            "/",
            "etc",
            "//etc",
            "/etc/",
            "/etc/../x",
            "/..",
            "/./x",
            "/a\0b",
            "/a\nb",
            &format!("/{}", "x".repeat(256)),
        ] {
            assert!(absolute_path(bad).is_err(), "{bad:?}");
        }
        for bad in ["../x", "a/../b", "/etc/passwd", ".", "", "-rf", "a b", "a\nb"] {
            assert!(relative_path(bad).is_err(), "{bad:?}");
        }
        relative_path("notes/a.txt").unwrap();
    }

    #[test]
    fn networks_have_one_form() {
        let text =
            |text: &str| network(text).map(|network| format!("{}/{}", network.address, network.prefix));
        assert_eq!(text("192.0.2.77/24").unwrap(), "192.0.2.0/24");
        assert_eq!(text("192.0.2.77").unwrap(), "192.0.2.77/32");
        assert_eq!(text("10.1.2.3/0").unwrap(), "0.0.0.0/0");
        assert_eq!(text("2001:db8::1/32").unwrap(), "2001:db8::/32");
        for bad in [
            "192.0.2.0/33",
            "192.0.2.0/",
            "192.0.2.0/+4",
            "x",
            "192.0.2.1 accept",
            "192.0.2.1; flush ruleset",
            "1.2.3",
        ] {
            assert!(text(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn words_are_words() {
        for bad in ["", "-o", "a b", "a;b", "a\n", "../x", "a$(b)"] {
            assert!(word("option", bad).is_err(), "{bad:?}");
        }
        for bad in ["", "a b", "a\"b", "--", "a\nb", "é"] {
            assert!(kernel_argument(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "1A", "A-B", "A=B", "A B"] {
            assert!(variable(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "A.vm", "a..vm", "a.vm.", "-a.vm", "a b.vm"] {
            assert!(domain(bad).is_err(), "{bad:?}");
        }
        for bad in ["ipv4/../../x", "ipv4", "net/x", "ipv4/", "ipv4/a/b"] {
            assert!(bridge_sysctl(bad).is_err(), "{bad:?}");
        }
        for bad in ["x", "x.mount", "../x.service", "a b.service"] {
            assert!(unit(bad).is_err(), "{bad:?}");
        }
        assert!(serial("root").is_err() && serial(&"x".repeat(21)).is_err() && serial("work").is_ok());
    }
}
