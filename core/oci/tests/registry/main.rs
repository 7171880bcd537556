//! Images from a real registry, Debian's `docker-registry`, filled by `skopeo`, and from layouts and archives that `skopeo` and
//! `umoci` write; with a proxy in between that does what networks do. Each test has a network namespace of its own.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod bench;
mod faults;
mod files;
mod local;
mod login;
mod made;
mod proxy;
mod pull;
mod push;
