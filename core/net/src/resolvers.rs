//! The name servers guests can use.

use std::{fs, io, net::Ipv4Addr, path::Path};

use crate::NetError;

/// Most that a guest's libc looks at (resolv.conf(5), MAXNS).
const MAX: usize = 3;

/// The host's upstream name servers (IPv4) that a guest can reach: those of `/etc/resolv.conf`, or, where that has
/// only loopback ones (systemd-resolved, dnsmasq), of `/run/systemd/resolve/resolv.conf`. Empty where there are none.
///
/// # Errors
/// A file exists and cannot be read.
pub fn resolvers() -> Result<Vec<Ipv4Addr>, NetError> {
    first_usable(["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"].map(Path::new))
}

fn first_usable<'a>(files: impl IntoIterator<Item = &'a Path>) -> Result<Vec<Ipv4Addr>, NetError> {
    for path in files {
        let servers = match fs::read(path) {
            Ok(bytes) => usable(&String::from_utf8_lossy(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(NetError::Resolvers { path: path.display().to_string(), source }),
        };
        if !servers.is_empty() {
            return Ok(servers);
        }
    }
    Ok(Vec::new())
}

/// The IPv4 name servers of a resolv.conf that mean the same seen from a guest.
fn usable(text: &str) -> Vec<Ipv4Addr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(Ok(address)) = words.next().map(str::parse::<Ipv4Addr>) else { continue };
        let useless = address.is_loopback() || address.is_unspecified() || address.is_link_local();
        if !useless && !servers.contains(&address) && servers.len() < MAX {
            servers.push(address);
        }
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_comments_and_other_families_are_left_out() {
        let text = "# nameserver 9.9.9.9\nsearch lan\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\n\
                    nameserver\t10.0.0.2 # office\nnameserver 10.0.0.2\n;x\nnameserver 1.1.1.1\noptions edns0\n";
        assert_eq!(usable(text), [Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(1, 1, 1, 1)]);
    }

    #[test]
    fn a_stub_resolver_leads_to_the_next_file() {
        let dir = tempfile::tempdir().unwrap();
        let (stub, real) = (dir.path().join("stub"), dir.path().join("real"));
        fs::write(&stub, "nameserver 127.0.0.53\n").unwrap();
        fs::write(&real, "nameserver 192.168.1.1\n").unwrap();
        let missing = dir.path().join("missing");
        let files = [missing.as_path(), &stub, &real];
        assert_eq!(first_usable(files).unwrap(), [Ipv4Addr::new(192, 168, 1, 1)]);
        assert!(first_usable([missing.as_path()]).unwrap().is_empty());
        let error = first_usable([dir.path()]).unwrap_err();
        assert!(error.hint().unwrap().contains("network.resolvers"));
    }
}
