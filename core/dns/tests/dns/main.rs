//! The server from outside: real sockets on loopback addresses, hickory as the client.

#![expect(clippy::unwrap_used, reason = "helpers outside of test functions fail their test this way")]

mod answers;
mod bounds;
mod forwarding;
mod isolation;
mod listeners;
mod support;
