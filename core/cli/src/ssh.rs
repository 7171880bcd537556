//! SSH to a guest, over the Unix stream that its shim offers: no network, no agent, no configuration files.
//!
//! ```text
//! stdin thread ──▶ pump task ──▶ ┐                         ┌ ▶ stdout thread
//!                                │  session::run ◀▶ russh  │
//! signals, window sizes ───────▶ ┘                         └ ▶ stderr thread
//! ```
//!
//! [`client`] connects and authenticates over a [`carrier`], [`session`] runs one command or shell, [`sink`] writes its output,
//! [`escape`] lets a person leave a hung session, [`terminal`] handles the local one.

mod carrier;
pub(crate) mod client;
mod escape;
pub(crate) mod session;
mod sink;
pub(crate) mod terminal;
#[cfg(test)]
mod tests;

use std::{io, path::PathBuf};

use vm_api::ErrorKind;

/// What went wrong between us and the guest's SSH server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SshError {
    /// The shim's socket.
    #[error("cannot reach the guest through {}", socket.display())]
    Connect {
        /// It.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The daemon told a key we cannot read.
    #[error("the guest's recorded host key is malformed")]
    RecordedKey {
        /// How.
        source: russh::keys::ssh_key::Error,
    },
    /// The server has another key than the daemon gave it.
    #[error("the guest shows another host key than the one the daemon gave it")]
    HostKey,
    /// The private key to log in with.
    #[error("cannot read the client key {}", path.display())]
    ClientKey {
        /// It.
        path: PathBuf,
        /// Why.
        source: russh::keys::Error,
    },
    /// Greeting and key exchange.
    #[error("the guest's SSH server does not answer as it should")]
    Handshake {
        /// How.
        source: russh::Error,
    },
    /// Greeting and key exchange, for too long.
    #[error("the guest's SSH server did not answer within {seconds} s")]
    Silent {
        /// How long it was given.
        seconds: u64,
    },
    /// Logging in did not work.
    #[error("cannot log in as {user}")]
    Login {
        /// The guest's user.
        user: String,
        /// Why.
        source: russh::Error,
    },
    /// The server says no.
    #[error("the guest refused to let {user} in")]
    LoginRefused {
        /// The guest's user.
        user: String,
    },
    /// Opening the session or asking for the command.
    #[error("cannot start the command")]
    Start {
        /// Why.
        source: russh::Error,
    },
    /// The server says no.
    #[error("the guest refused to start the command")]
    StartRefused,
    /// The stream ended before the command did.
    #[error("lost the connection to the guest{reason}")]
    Lost {
        /// Why, set off by a colon; empty where unknown.
        reason: String,
    },
    /// Stdout or stderr, with output of the command.
    #[error("cannot write the command's output to {what}")]
    Write {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Stdin, stdout, stderr or the terminal.
    #[error("cannot use {what}")]
    Local {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl SshError {
    /// The sort, for programs.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ErrorKind::PermissionDenied
            }
            Self::ClientKey { .. } | Self::LoginRefused { .. } => ErrorKind::PermissionDenied,
            Self::Connect { .. }
            | Self::Handshake { .. }
            | Self::Silent { .. }
            | Self::Login { .. }
            | Self::Start { .. }
            | Self::StartRefused
            | Self::Lost { .. } => ErrorKind::GuestUnresponsive,
            Self::RecordedKey { .. } | Self::HostKey => ErrorKind::Internal,
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            Self::Write { .. } | Self::Local { .. } => ErrorKind::HostFailure,
        }
    }

    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        Some(
            match self {
                Self::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                    "run as root or as a member of the daemon's group"
                }
                Self::ClientKey { .. } => "run as root or as a member of the daemon's group",
                Self::Connect { .. } | Self::Lost { .. } => "see whether the VM still runs: vm ls",
                Self::Handshake { .. } | Self::Silent { .. } | Self::Login { .. } => {
                    "look at the guest's console: vm logs NAME"
                }
                Self::HostKey | Self::RecordedKey { .. } => {
                    "somebody replaced the guest's agent or its key; delete the VM and make it anew"
                }
                Self::LoginRefused { .. } => "name a user that the image has: --user NAME",
                Self::Start { .. } | Self::StartRefused => {
                    "check --user and --workdir: both must exist in the guest"
                }
                Self::Write { .. } => {
                    "the command was ended or its output is incomplete; check the space where it is redirected to"
                }
                Self::Local { .. } => "check where stdin, stdout and stderr of vm lead to",
            }
            .to_owned(),
        )
    }
}
