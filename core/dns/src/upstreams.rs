//! Which name servers the host uses.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant, SystemTime},
};

use tracing::warn;

use crate::config::Upstreams;

/// Most that a libc looks at (resolv.conf(5), MAXNS).
const MAX: usize = 3;
/// How often the file is looked at, at most.
const LOOK: Duration = Duration::from_secs(1);

/// The list, or the file that has it.
#[derive(Debug)]
pub(crate) struct Source {
    of: Upstreams,
    watch: Mutex<Watch>,
}

#[derive(Debug, Default)]
struct Watch {
    looked: Option<Instant>,
    seen: Option<Stamp>,
}

/// Tells one state of a file from another; a file put in place of another by renaming has another inode.
type Stamp = (u64, u64, Option<SystemTime>);

impl Source {
    pub(crate) fn new(of: Upstreams) -> Self {
        Self { of, watch: Mutex::default() }
    }

    /// The list if it may differ from the one given last, else nothing. Reads at most a small file, once in a second.
    pub(crate) fn changed(&self, now: Instant) -> Option<Vec<SocketAddr>> {
        // Whoever comes while another looks goes on with what there is.
        let mut watch = self.watch.try_lock().ok()?;
        match &self.of {
            Upstreams::Given(list) if watch.looked.is_none() => {
                watch.looked = Some(now);
                Some(list.clone())
            }
            Upstreams::Given(_) => None,
            Upstreams::ResolvConf(path) => {
                if watch.looked.is_some_and(|looked| now.saturating_duration_since(looked) < LOOK) {
                    return None;
                }
                watch.looked = Some(now);
                let stamp = stamp(path);
                if stamp.is_some() && watch.seen == stamp {
                    return None;
                }
                match fs::read(path) {
                    Ok(bytes) => {
                        watch.seen = stamp;
                        Some(name_servers(&String::from_utf8_lossy(&bytes)))
                    }
                    // It is being replaced, or gone for good: what was known is still the best guess.
                    Err(error) => {
                        if error.kind() != io::ErrorKind::NotFound || watch.seen.take().is_some() {
                            warn!(path = %path.display(), %error, "cannot read the host's resolvers; keeping those known");
                        }
                        None
                    }
                }
            }
        }
    }
}

fn stamp(path: &PathBuf) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.len(), metadata.modified().ok()))
}

/// The name servers that a resolv.conf names, loopback ones such as systemd-resolved's stub included: unlike a guest, the
/// daemon can reach them. Link-local IPv6 addresses are left out, because they mean nothing without their interface.
pub fn name_servers(text: &str) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(Ok(address)) = words.next().map(str::parse::<IpAddr>) else { continue };
        let server = SocketAddr::new(reachable(address), 53);
        let link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        if !link_local && !servers.contains(&server) && servers.len() < MAX {
            servers.push(server);
        }
    }
    servers
}

/// The unspecified address means this host, to a client.
fn reachable(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

/// The name servers of the host, from a file.
///
/// # Errors
/// It cannot be read.
pub fn read_name_servers(path: &Path) -> io::Result<Vec<SocketAddr>> {
    Ok(name_servers(&String::from_utf8_lossy(&fs::read(path)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Vec<String> {
        name_servers(text).iter().map(SocketAddr::to_string).collect()
    }

    #[test]
    fn a_stub_counts_and_nonsense_does_not() {
        let text = "# nameserver 9.9.9.9\nsearch lan\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\nnameserver fe80::2\n\
                    nameserver nonsense\nnameserver\noptions edns0 weird:x\nnameserver\t2001:db8::1 # office\n\
                    nameserver 127.0.0.53\nnameserver 0.0.0.0\nnameserver 192.0.2.9\n";
        assert_eq!(shown(text), ["127.0.0.53:53", "[2001:db8::1]:53", "127.0.0.1:53"]);
    }

    #[test]
    fn a_changed_file_is_noticed_and_a_missing_one_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let source = Source::new(Upstreams::ResolvConf(path.clone()));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(source.changed(at(0)), None);
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(source.changed(at(0)), None, "looked at a moment ago");
        assert_eq!(source.changed(at(2)).unwrap().len(), 1);
        assert_eq!(source.changed(at(4)), None);
        let next = dir.path().join("next");
        fs::write(&next, "nameserver 192.0.2.2\nnameserver 192.0.2.3\n").unwrap();
        fs::rename(&next, &path).unwrap();
        assert_eq!(source.changed(at(6)).unwrap().len(), 2);
        fs::remove_file(&path).unwrap();
        assert_eq!(source.changed(at(8)), None);
        fs::write(&path, "nameserver 192.0.2.2\n").unwrap();
        assert_eq!(source.changed(at(10)).unwrap().len(), 1);
    }
}
