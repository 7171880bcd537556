//! The guest channel: byte streams between the host and the guest's agent that need no guest network.
//!
//! ```text
//!   ssh.sock ──┐                                                ┌── SSH server
//!              ├─ HostChannel ══ one byte stream (virtio) ══ serve_guest
//! control.sock ┘      yamux, one stream per connection          └── control service
//! ```
//!
//! The carrier is a virtio-serial port, which has no notion of a connection: bytes of a former
//! session may still be under way when either end is new. So a session begins with a handshake
//! ([`HELLO`], [`ANSWER`], each with a fresh nonce) that skips whatever came before it. After it both ends speak yamux
//! (<https://github.com/hashicorp/yamux/blob/master/spec.md>), in which the host opens every stream and sends
//! one byte naming the [`Service`]; the guest answers with one byte when it has taken the stream.

mod handshake;
mod pings;
mod session;

pub use handshake::{ANSWER, HELLO};
pub use session::{ChannelStream, HostChannel, MAX_STREAMS, serve_guest};
pub use vm_types::guest::control::Service;
