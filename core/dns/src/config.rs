//! What the server is told.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;

/// Everything it is told at the start.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who may ask and which addresses have names here.
    pub networks: Networks,
    /// Who is asked about everything else.
    pub upstreams: Upstreams,
    /// What it may cost.
    pub limits: Limits,
}

/// Who may ask and which addresses have names here.
#[derive(Debug, Clone, Default)]
pub struct Networks {
    /// Whose questions are answered: the guests' subnet and loopback. Everybody else is a stranger and gets REFUSED.
    pub clients: Vec<IpNet>,
    /// Whose PTR questions (`in-addr.arpa`, `ip6.arpa`) go to the resolver: the guests' subnet.
    pub reverse: Vec<IpNet>,
}

/// Who is asked about names outside the zones.
#[derive(Debug, Clone)]
pub enum Upstreams {
    /// These, in this order.
    Given(Vec<SocketAddr>),
    /// The name servers of a resolv.conf(5), which is read again when it changes.
    ResolvConf(PathBuf),
}

/// What the server may cost. Whatever is beyond a limit gets SERVFAIL at once; memory stays bounded.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Questions being answered at one time.
    pub questions: usize,
    /// Of these, at most so many by one client; the host's own (loopback) have no such limit.
    pub questions_per_client: usize,
    /// Calls of the resolver at one time.
    pub resolver_calls: usize,
    /// How long one call of the resolver may take.
    pub resolver_deadline: Duration,
    /// Questions waiting for an upstream at one time; each has up to four sockets.
    pub forwards: usize,
    /// How long one upstream may take, retransmissions included, before the next one is asked.
    pub upstream_timeout: Duration,
    /// How long all of them together may take.
    pub forward_deadline: Duration,
    /// How long an upstream that did not answer is asked last.
    pub upstream_penalty: Duration,
    /// Answers of upstreams that are kept.
    pub cache_entries: u64,
    /// TCP connections at one time.
    pub connections: usize,
    /// Of these, at most so many by one client; the host's own (loopback) have no such limit.
    pub connections_per_client: usize,
    /// How long a TCP connection may be silent (RFC 7766, section 6.2.3).
    pub idle: Duration,
    /// REFUSED answers to strangers, in a second; further questions of theirs are dropped.
    pub refusals_per_second: u32,
    /// How long "no" may be remembered by clients, whole seconds.
    pub negative_ttl: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            questions: 2048,
            questions_per_client: 256,
            resolver_calls: 1024,
            resolver_deadline: Duration::from_secs(1),
            forwards: 128,
            upstream_timeout: Duration::from_millis(1500),
            forward_deadline: Duration::from_secs(4),
            upstream_penalty: Duration::from_secs(30),
            cache_entries: 2048,
            connections: 256,
            connections_per_client: 32,
            idle: Duration::from_secs(10),
            refusals_per_second: 50,
            negative_ttl: Duration::from_secs(5),
        }
    }
}
