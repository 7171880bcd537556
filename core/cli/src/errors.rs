//! What can go wrong for a user, and the exit code it gives.

use std::{io, path::PathBuf};

use vm_api::{ErrorKind, Problem};
use vm_archive::Failure;
use vm_guest::GuestError;
use vm_types::guest::files::code;

use crate::{daemon::DaemonError, ssh::SshError};

/// The exit codes, as `vm help exit-codes` shows them.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed in a way not listed here
  2    wrong usage or an argument that does not fit
  3    no such VM, image, kernel, operation or daemon
  4    not now: the name is taken, the thing is in use or in the wrong state
  5    the host cannot: no space, a missing program, a network clash, unsupported
  6    the guest: it does not answer, or its VMM died
  7    an image, archive or kernel that is not what it should be
  8    permission denied
  9    the daemon cannot be reached, started, or is shutting down
  10   a plugin: it failed, refused, or is none
  130  ended by Ctrl-C (128+n: by signal n)
  141  the reader of the output is gone

`vm run` and `vm ssh` exit with the command's own code, and besides:
  125    vm itself failed: the VM could not be made, reached, or died
  126    the command could not be run
  127    the command was not found
  128+n  the command was ended by signal n";

/// Exit code of a session verb when `vm` itself fails.
pub(crate) const EXIT_SESSION_FAILED: u8 = 125;
/// Exit code where the reader of the output is gone, as of a process ended by SIGPIPE.
pub(crate) const EXIT_OUTPUT_CLOSED: u8 = 141;

/// An error as a user meets it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The daemon said no.
    #[error(transparent)]
    Refused(#[from] Problem),
    /// There is no daemon to ask.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The session with the guest failed.
    #[error(transparent)]
    Ssh(#[from] SshError),
    /// The agent's file service in a guest failed.
    #[error("VM {vm}")]
    Guest {
        /// The VM.
        vm: String,
        /// How.
        source: Box<GuestError>,
    },
    /// Packing or unpacking on the host failed.
    #[error("{place}")]
    Archive {
        /// Where.
        place: String,
        /// How.
        source: Failure,
    },
    /// The session ended because the VM did.
    #[error("VM {name} {what} before the command ended{console}")]
    VmLost {
        /// The VM.
        name: String,
        /// What became of it.
        what: String,
        /// The end of its console, on lines of its own; empty where there is none.
        console: String,
    },
    /// Arguments that clap cannot judge.
    #[error("{message}")]
    Usage {
        /// What does not fit.
        message: String,
        /// What would.
        hint: String,
    },
    /// A file named on the command line.
    #[error("cannot read {}", path.display())]
    File {
        /// It.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that `vm` keeps for its user.
    #[error("cannot write {}", path.display())]
    WriteFile {
        /// It.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A signal ended `vm` before its work was done.
    #[error("{what}")]
    Interrupted {
        /// Signal number.
        signal: i32,
        /// What was left, for people.
        what: String,
    },
    /// Not all checks of the doctor went well; they were shown.
    #[error("{count} of the checks failed")]
    Unhealthy {
        /// How many.
        count: usize,
    },
    /// Some of several targets failed.
    #[error("{summary}")]
    Partly {
        /// Which, and why.
        summary: String,
        /// What to do about the first.
        hint: Option<String>,
        /// Sort of the first.
        kind: ErrorKind,
    },
    /// The daemon answered with something that does not fit its interface.
    #[error("the daemon's answer does not fit")]
    Answer {
        /// How.
        source: serde_json::Error,
    },
    /// Standard output.
    #[error("cannot write the output")]
    Output {
        /// Why.
        source: io::Error,
    },
    /// Signal handlers or the event loop.
    #[error("cannot set up {what}")]
    Setup {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl From<jsonrpsee::core::client::Error> for CliError {
    fn from(error: jsonrpsee::core::client::Error) -> Self {
        Self::Refused(vm_api::client::problem(&error))
    }
}

impl CliError {
    /// The sort, for programs.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused(problem) => problem.kind,
            Self::Daemon(error) => error.kind(),
            Self::Ssh(error) => error.kind(),
            Self::Guest { source, .. } => source.kind(),
            Self::Archive { source: Failure::Told { code, .. }, .. } => code::kind(code),
            Self::Archive { source: Failure::Gone, .. } => ErrorKind::Internal,
            Self::VmLost { .. } => ErrorKind::VmmDied,
            Self::Usage { .. } => ErrorKind::InvalidArgument,
            Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::File { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ErrorKind::PermissionDenied
            }
            Self::Partly { kind, .. } => *kind,
            Self::Interrupted { .. } => ErrorKind::Cancelled,
            Self::WriteFile { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                ErrorKind::NoSpace
            }
            Self::Unhealthy { .. }
            | Self::File { .. }
            | Self::WriteFile { .. }
            | Self::Output { .. }
            | Self::Setup { .. } => ErrorKind::HostFailure,
            Self::Answer { .. } => ErrorKind::Internal,
        }
    }

    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Refused(problem) => problem.hint.clone(),
            Self::Daemon(error) => error.hint(),
            Self::Ssh(error) => error.hint(),
            Self::Guest { source, .. } => source.hint().map(str::to_owned),
            Self::Archive { source, .. } => file_hint(source).map(str::to_owned),
            Self::VmLost { name, .. } => Some(format!(
                "its whole console, while it exists (`vm run --keep` sees to that): vm logs {name}"
            )),
            Self::Usage { hint, .. } => Some(hint.clone()),
            Self::Answer { .. } => {
                Some("`vm` and `vmd` may be of different versions: see `vm version`".to_owned())
            }
            Self::Unhealthy { .. } => Some("follow the fixes above, then run `vm doctor` again".to_owned()),
            Self::File { .. } => Some("check the path and its permissions".to_owned()),
            Self::WriteFile { .. } => Some("check the space and permissions of its directory".to_owned()),
            Self::Output { .. } => Some("check the space and permissions of where stdout goes".to_owned()),
            Self::Setup { .. } => Some("check the limits of this shell: `ulimit -a`".to_owned()),
            Self::Partly { hint, .. } => hint.clone(),
            Self::Interrupted { .. } => None,
        }
    }

    /// The message with its causes.
    pub(crate) fn message(&self) -> String {
        vm_types::report::chain(self)
    }

    /// Whether there is nobody left to tell.
    pub(crate) fn is_closed_output(&self) -> bool {
        matches!(self, Self::Output { source } if source.kind() == io::ErrorKind::BrokenPipe)
    }

    /// The exit code; `session` is whether the verb passes on a command's own.
    pub(crate) fn exit_code(&self, session: bool) -> u8 {
        match self {
            Self::Interrupted { signal, .. } => signalled(*signal),
            Self::Usage { .. } => 2,
            Self::Unhealthy { .. } => 1,
            _ if self.is_closed_output() => EXIT_OUTPUT_CLOSED,
            _ if session => EXIT_SESSION_FAILED,
            Self::Daemon(error) => error.exit_code(),
            _ => exit_code(self.kind()),
        }
    }
}

/// What to do about a failure on the host.
fn file_hint(failure: &Failure) -> Option<&'static str> {
    let Failure::Told { code, .. } = failure else { return None };
    Some(match *code {
        code::NO_SPACE => "make room on the host's disk",
        code::DENIED => "check the permissions on the host, or run as another user",
        code::NOT_FOUND => "it was removed meanwhile; try again",
        code::IS_DIRECTORY | code::NOT_DIRECTORY => "name another place, or remove what is in the way",
        code::OUTSIDE | code::UNSUPPORTED | code::MALFORMED | code::TRUNCATED => {
            "the guest sent what it should not: what it says is not to be trusted"
        }
        _ => return None,
    })
}

/// Exit code of a sort of error; documented in [`EXIT_CODES`].
pub(crate) fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Internal | ErrorKind::HostFailure | ErrorKind::Cancelled | ErrorKind::CommandFailed => 1,
        ErrorKind::InvalidArgument => 2,
        ErrorKind::NotFound => 3,
        ErrorKind::AlreadyExists | ErrorKind::WrongState | ErrorKind::InUse => 4,
        ErrorKind::NoSpace | ErrorKind::NotInstalled | ErrorKind::NetworkClash | ErrorKind::Unsupported => 5,
        ErrorKind::GuestUnresponsive | ErrorKind::VmmDied => 6,
        ErrorKind::BadImage => 7,
        ErrorKind::PermissionDenied => 8,
        ErrorKind::ShuttingDown => 9,
        ErrorKind::PluginFailed | ErrorKind::PluginRefused => 10,
    }
}

/// Exit code of a process ended by a signal, as shells have it.
pub(crate) fn signalled(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_code_is_documented() {
        for kind in ErrorKind::ALL {
            let code = exit_code(*kind);
            assert!(EXIT_CODES.contains(&format!("\n  {code} ")), "{kind:?} gives {code}");
        }
    }

    #[test]
    fn session_verbs_keep_125_for_themselves() {
        let refused = CliError::Refused(Problem::new(ErrorKind::NotFound, "no VM a"));
        assert_eq!(refused.exit_code(false), 3);
        assert_eq!(refused.exit_code(true), 125);
        let interrupted = CliError::Interrupted { signal: 2, what: "interrupted".to_owned() };
        assert_eq!(interrupted.exit_code(true), 130);
        let gone = CliError::Output { source: io::ErrorKind::BrokenPipe.into() };
        assert_eq!(gone.exit_code(false), 141);
    }

    #[test]
    fn causes_are_told_once() {
        let path = PathBuf::from("kernel");
        let error = CliError::File { path, source: io::Error::other("broken") };
        assert_eq!(error.message(), "cannot read kernel: broken");
    }
}
