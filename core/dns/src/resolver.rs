//! The seam between the server and whoever knows the names.

use std::{
    error::Error,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use async_trait::async_trait;
pub use hickory_server::proto::rr::Name;

/// Knows the names of some zones. The daemon's is the active `dns` component.
///
/// A call that takes longer than [`Limits::resolver_deadline`](crate::Limits), fails or panics gives SERVFAIL for its own
/// question and nothing else. It runs in a task of its own and is dropped at the deadline; what it must not do is block the thread.
#[async_trait]
pub trait Resolver: Send + Sync + 'static {
    /// The zones whose names it knows, e.g. `vm.`; asked once, when the resolver is given to the server. The zones for PTR
    /// questions come from [`Networks::reverse`](crate::Networks) instead.
    fn zones(&self) -> Vec<Name>;

    /// Answers one question about a name in those zones. SOA, NS (of a zone's apex) and ANY are never asked: the server
    /// answers them itself.
    ///
    /// # Errors
    /// Anything; it is logged, and the client gets SERVFAIL.
    async fn resolve(&self, question: &Question) -> Result<Answer, Box<dyn Error + Send + Sync>>;
}

/// What a client wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The name, fully qualified, in the client's spelling; compare with `==`, which ignores case (RFC 4343).
    pub name: Name,
    /// The record type by its number, e.g. 1 for A, 28 for AAAA, 12 for PTR (IANA, "DNS Parameters").
    pub qtype: u16,
    /// Who asks.
    pub client: IpAddr,
}

/// What a resolver says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Nothing: treat the name as if it were in no zone, that is, ask the host's resolvers. For reverse zones it means
    /// [`Answer::NxDomain`], because private addresses mean nothing to others (RFC 6303).
    Pass,
    /// These records. Only those that answer the question are used: its type, and aliases (CNAME) that lead there from its
    /// name. So a resolver may return all it has about a name; where nothing is left it counts as [`Answer::NoData`].
    Records(Vec<Record>),
    /// The name exists and has no record of this type.
    NoData,
    /// There is no such name.
    NxDomain,
    /// This client may not know.
    Refused,
}

/// A resource record of class IN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Whose it is.
    pub name: Name,
    /// How long others may keep it, in seconds; at most 2³¹−1 (RFC 2181, section 8).
    pub ttl: u32,
    /// The value.
    pub data: RecordData,
}

/// The value of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordData {
    /// An IPv4 address.
    A(Ipv4Addr),
    /// An IPv6 address.
    Aaaa(Ipv6Addr),
    /// The name of an address.
    Ptr(Name),
    /// Text; a string of more than 255 bytes is sent as several (RFC 1035, section 3.3).
    Txt(Vec<String>),
    /// The name is an alias of this one.
    Cname(Name),
}

/// Knows nothing: every question goes to the host's resolvers.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoResolver;

#[async_trait]
impl Resolver for NoResolver {
    fn zones(&self) -> Vec<Name> {
        Vec::new()
    }

    async fn resolve(&self, _question: &Question) -> Result<Answer, Box<dyn Error + Send + Sync>> {
        Ok(Answer::Pass)
    }
}
