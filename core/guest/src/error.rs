//! What can go wrong between us and a guest.

use std::{io, path::PathBuf, time::Duration};

use vm_types::{
    ErrorKind,
    guest::files::{SeenError, code},
};

/// Why something was not done in a guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The shim's socket.
    #[error("cannot reach the guest through {}", socket.display())]
    Connect {
        /// It.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The guest's recorded key.
    #[error("the guest's recorded host key is malformed")]
    RecordedKey {
        /// How.
        source: russh::keys::ssh_key::Error,
    },
    /// The file of the key to log in with.
    #[error("cannot read the client key {}", path.display())]
    ReadKey {
        /// It.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key to log in with.
    #[error("the client key {} is no OpenSSH private key", path.display())]
    ClientKey {
        /// Its file.
        path: PathBuf,
        /// How.
        source: russh::keys::ssh_key::Error,
    },
    /// The server has another key than the daemon gave it.
    #[error("the guest shows another host key than the one the daemon gave it")]
    HostKey,
    /// Greeting and key exchange.
    #[error("the guest's SSH server does not answer as it should")]
    Handshake {
        /// How.
        source: russh::Error,
    },
    /// Logging in did not work.
    #[error("cannot log in to the guest as {user}")]
    Login {
        /// The guest's user.
        user: String,
        /// Why.
        source: russh::Error,
    },
    /// The server says no.
    #[error("the guest has no user {user}, or does not let it in")]
    LoginRefused {
        /// The guest's user.
        user: String,
    },
    /// A command that cannot be sent.
    #[error("the command cannot be run: {reason}")]
    Command {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Opening a channel, or asking for what it is for.
    #[error("cannot begin in the guest")]
    Begin {
        /// Why.
        source: russh::Error,
    },
    /// The server says no.
    #[error("the guest's agent refuses {what}")]
    Refused {
        /// What was asked for.
        what: &'static str,
    },
    /// The stream ended before the work did.
    #[error("lost the connection to the guest{reason}")]
    Lost {
        /// Why, set off by a colon; empty where unknown.
        reason: String,
    },
    /// The command has taken longer than it may, and is being ended.
    #[error("the command in the guest was not done within {} ms", limit.as_millis())]
    TimeLimit {
        /// How long it had.
        limit: Duration,
    },
    /// What was to be sent.
    #[error("cannot read what is to be sent to the guest")]
    Source {
        /// Why; for an archive also that it cannot be decompressed.
        source: io::Error,
    },
    /// Where it was to go to.
    #[error("cannot write what the guest sends")]
    Sink {
        /// Why.
        source: io::Error,
    },
    /// The file service.
    #[error("in the guest: {message}")]
    File {
        /// One of [`vm_types::guest::files::code`].
        code: String,
        /// The agent's, with the file's name.
        message: String,
    },
    /// A list of what is in a directory.
    #[error("the guest's list of files is malformed")]
    Survey {
        /// How.
        source: SeenError,
    },
    /// A list that would not end.
    #[error("there are more files below {path} in the guest than can be handled")]
    TooMany {
        /// The directory.
        path: String,
    },
    /// A path that is to be below a directory.
    #[error("{path} is no path below a directory")]
    Path {
        /// It, with escapes.
        path: String,
    },
    /// The file service, without a reason.
    #[error("the guest's agent does not say what went wrong: {answer:?}")]
    Answer {
        /// What it says.
        answer: String,
    },
}

impl GuestError {
    /// Dotted and stable, for programs.
    pub fn code(&self) -> &str {
        match self {
            Self::Connect { .. } => "guest.connect",
            Self::RecordedKey { .. } | Self::HostKey => "guest.host-key",
            Self::ReadKey { .. } | Self::ClientKey { .. } => "guest.client-key",
            Self::Handshake { .. }
            | Self::Begin { .. }
            | Self::Refused { .. }
            | Self::Survey { .. }
            | Self::Answer { .. } => "guest.protocol",
            Self::TooMany { .. } => "guest.too-many",
            Self::Path { .. } => "guest.path",
            Self::Login { .. } | Self::LoginRefused { .. } => "guest.login",
            Self::Command { .. } => "guest.command",
            Self::Lost { .. } => "guest.lost",
            Self::TimeLimit { .. } => "guest.time-limit",
            Self::Source { .. } => "guest.source",
            Self::Sink { .. } => "guest.sink",
            Self::File { code, .. } => code,
        }
    }

    /// The sort, for clients.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File { code, .. } => code::kind(code),
            Self::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ErrorKind::PermissionDenied
            }
            Self::ReadKey { source, .. } | Self::Source { source } | Self::Sink { source } => {
                match source.kind() {
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
                    io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                    _ => ErrorKind::HostFailure,
                }
            }
            Self::Command { .. } | Self::Path { .. } | Self::TooMany { .. } => ErrorKind::InvalidArgument,
            Self::LoginRefused { .. } => ErrorKind::PermissionDenied,
            Self::RecordedKey { .. } | Self::ClientKey { .. } => ErrorKind::HostFailure,
            Self::Connect { .. }
            | Self::HostKey
            | Self::Handshake { .. }
            | Self::Login { .. }
            | Self::Begin { .. }
            | Self::Refused { .. }
            | Self::Lost { .. }
            | Self::TimeLimit { .. }
            | Self::Survey { .. }
            | Self::Answer { .. } => ErrorKind::GuestUnresponsive,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "run as root or as a member of the daemon's group"
            }
            Self::Connect { .. } | Self::Lost { .. } => "see whether the VM still runs: vm ls",
            Self::RecordedKey { .. } | Self::HostKey => {
                "somebody replaced the guest's agent or its key; delete the VM and make it anew"
            }
            Self::ReadKey { .. } | Self::ClientKey { .. } => {
                "the daemon makes this key when it starts and finds none; it must be readable"
            }
            Self::Handshake { .. }
            | Self::Login { .. }
            | Self::Begin { .. }
            | Self::Survey { .. }
            | Self::Answer { .. } => "look at the guest's console: vm logs NAME",
            Self::TooMany { .. } => "name a directory further down, or remove what is not needed there",
            Self::Path { .. } => "name what is in the directory by relative paths, without `..`",
            Self::LoginRefused { .. } => "name a user that the image has in /etc/passwd",
            Self::Command { .. } => "see what its arguments and variables are made of",
            Self::Refused { .. } => {
                "the VM was started by an older daemon; start it again: vm stop NAME, vm start NAME"
            }
            Self::TimeLimit { .. } => "give it more time, or see what it waits for: vm ssh NAME",
            Self::Source { .. } => "an archive must be a tar: plain, with gzip or with zstd",
            Self::Sink { .. } => "check the space of the host's state directory",
            Self::File { code, .. } => return file_hint(code),
        })
    }
}

fn file_hint(file_code: &str) -> Option<&'static str> {
    Some(match file_code {
        code::NOT_FOUND => "see what is there: vm ssh NAME -- ls -la DIRECTORY",
        code::IS_DIRECTORY => "name a file in that directory",
        code::NOT_DIRECTORY => "name another place, or remove the file that is in the way",
        code::NOT_REGULAR => "only regular files are read and written; for others run a command",
        code::NO_SPACE => "the guest's disk is full: make the VM with a larger --disk",
        code::DENIED => "the guest's filesystem is read-only there, or the file is immutable",
        code::OUTSIDE => "make the archive with relative names, and without links that lead out of it",
        code::UNSUPPORTED => "leave devices out of the archive",
        code::MALFORMED | code::TRUNCATED => {
            "make the archive anew; a tar is meant, plain, with gzip or with zstd"
        }
        code::NO_USER => "name a user that the image has in /etc/passwd, or a number",
        code::REQUEST => "name files by their absolute path, without `..`",
        _ => return None,
    })
}
