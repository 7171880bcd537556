//! The daemon's DNS server.
//!
//! ```text
//!  guests ── bridge:53 ──┐                                     ┌─ in a zone ── Resolver (a component, kept at arm's length)
//!                        ├─ listen ── handler ── who? what? ───┤
//!  host ── loopback:N ───┘   bounds    protocol                └─ elsewhere ── forwarder ── the host's resolvers
//! ```
//!
//! It is the authority for the zones of one [`Resolver`] and for the reverse zones of the guests' networks, asks the host's
//! resolvers about everything else, and refuses strangers. Every question has a task and a deadline of its own: a resolver or
//! an upstream that is slow, fails or panics spoils only the answers that need it. Everything a client can make the server
//! hold (questions, connections, sockets, cached answers) is bounded, see [`Limits`].
//!
//! The wire format, the upstreams' pools and the cache are [hickory](https://hickory-dns.org)'s. There is no DNSSEC validation here:
//! signatures are handed on to guests that ask for them (DO), and the AD flag is never set, because
//! nothing was verified. This crate knows nothing of bridges, VMs or components: the engine says where to listen
//! and who may ask.

mod authority;
mod config;
mod error;
mod forward;
mod gate;
mod handler;
mod listen;
mod reply;
mod resolver;
mod server;
mod stats;
mod table;
mod upstreams;
mod zones;

pub use config::{Config, Limits, Networks, Upstreams};
pub use error::DnsError;
pub use handler::loopback;
pub use resolver::{Answer, Name, NoResolver, Question, Record, RecordData, Resolver};
pub use server::Server;
pub use stats::Stats;
pub use table::Table;
pub use upstreams::{name_servers, read_name_servers};
