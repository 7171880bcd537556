//! The program `vm` as a user meets it, without a daemon and with one that plays a part.

#![expect(clippy::unwrap_used, reason = "a test's set-up that fails is a failed test")]

mod command_line;
mod host;
mod lifecycle;
mod plugins;
mod scaffold;
mod stub;
mod terminal;
mod watching;
mod workspaces;
