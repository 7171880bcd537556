//! What can go wrong: [`StartError`] inside a shim, [`ShimError`] for those who deal with one.

use std::{io, path::PathBuf};

use vm_host::HttpError;

/// Why a shim could not start its VMM. Reaches people through [`vm_types::shim::ShimFailed`].
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The specification could not be read.
    #[error("could not read the shim's specification {}", path.display())]
    ReadSpec {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The specification is not there.
    #[error("there is no shim specification {}", path.display())]
    NoSpec {
        /// The file.
        path: PathBuf,
    },
    /// The process could not be made independent of its starter.
    #[error("could not {what}")]
    Detach {
        /// The step that failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The run directory cannot be used.
    #[error("could not lock the run directory {}", path.display())]
    Lock {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A VM must not be started twice on one disk.
    #[error("another shim already runs this VM in {}", path.display())]
    AlreadyRuns {
        /// The run directory.
        path: PathBuf,
    },
    /// The record of the VMM's former end could not be removed.
    #[error("could not remove the former exit record {}", path.display())]
    RemoveRecord {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A log could not be made.
    #[error("could not create the log {}", path.display())]
    CreateLog {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A Unix socket address is too short for the path.
    #[error("the socket path {} is longer than {} bytes", path.display(), vm_types::layout::SOCKET_PATH_MAX)]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
    /// A socket could not be made.
    #[error("could not create the socket {}", path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory in which the VMM makes its sockets could not be made.
    #[error("could not make the VMM's directory {}", path.display())]
    OwnDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A tap could not be attached to.
    #[error("could not attach to the tap {name}")]
    Tap {
        /// The device.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A file or device that the VMM inherits could not be opened.
    #[error("could not open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM could not be locked in.
    #[error("the VMM's jail could not be made: {said}")]
    Jail {
        /// What the jail says.
        said: String,
        /// Its advice.
        hint: Option<String>,
    },
    /// The VMM's program could not be run.
    #[error("could not run the VMM {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM ended before it had its machine.
    #[error("the VMM ended before it was configured ({status})")]
    Ended {
        /// How.
        status: String,
    },
    /// The VMM did not take its machine.
    #[error("the VMM could not be configured")]
    Configure {
        /// Why.
        source: HttpError,
    },
}

impl StartError {
    /// How to mend it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::ReadSpec { .. } | Self::NoSpec { .. } => {
                Some("vmd writes this file before it starts a shim; start the VM with `vm start`".into())
            }
            Self::AlreadyRuns { .. } => {
                Some("stop the VM with `vm stop --force`, then start it again".into())
            }
            Self::SocketPath { .. } => Some("configure a shorter run directory".into()),
            Self::Spawn { program, source } if source.kind() == io::ErrorKind::NotFound => {
                Some(format!("install {} or configure where it is; see `vm doctor`", program.display()))
            }
            Self::Spawn { .. } => Some("see `vm doctor`".into()),
            Self::Lock { .. }
            | Self::CreateLog { .. }
            | Self::Socket { .. }
            | Self::RemoveRecord { .. }
            | Self::OwnDir { .. } => {
                Some("check that the directory exists, is writable by vmd and has free space".into())
            }
            Self::Configure { source: HttpError::Refused { .. } } => {
                Some("the VMM does not take this machine; see `vm doctor` for what its version is".into())
            }
            Self::Ended { .. } | Self::Configure { .. } => {
                Some("see the VM's vmm.log in its state directory".into())
            }
            Self::Tap { .. } | Self::Open { .. } => {
                Some("vmd makes it when it starts a VM; start the VM again, and see `vm doctor`".into())
            }
            Self::Jail { hint, .. } => hint.clone(),
            Self::Detach { .. } => None,
        }
    }
}

/// What went wrong while dealing with a shim.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// The shim's program could not be run.
    #[error("could not start a shim with {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The shim said why it could not start the VMM.
    #[error("{error}")]
    Refused {
        /// The shim's words.
        error: String,
        /// Its advice.
        hint: Option<String>,
    },
    /// The shim ended or stopped talking before it said anything of use.
    #[error("the shim ended without an answer{}", said(stderr))]
    NoAnswer {
        /// The end of its stderr.
        stderr: String,
    },
    /// The shim did not answer in time and was killed.
    #[error("the shim did not start the VMM within {seconds} s")]
    StartTimedOut {
        /// The limit.
        seconds: u64,
    },
    /// Nobody listens on the shim's socket.
    #[error("no shim listens on {}", socket.display())]
    NotRunning {
        /// The socket.
        socket: PathBuf,
    },
    /// The shim's socket failed.
    #[error("could not talk to the shim on {}", socket.display())]
    Talk {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The shim did not answer a request in time.
    #[error("the shim on {} did not answer within {seconds} s", socket.display())]
    TimedOut {
        /// The socket.
        socket: PathBuf,
        /// The limit.
        seconds: u64,
    },
    /// The shim's answer fits no question of ours.
    #[error("the shim on {} gave an unexpected answer: {answer}", socket.display())]
    Unexpected {
        /// The socket.
        socket: PathBuf,
        /// What it said.
        answer: String,
    },
    /// A file of the shim could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A process could not be held or signalled.
    #[error("could not signal process {pid}")]
    Signal {
        /// Its pid.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// A killed process did not end in time.
    #[error("process {pid} did not end within {seconds} s although it was killed")]
    StillRunning {
        /// Its pid.
        pid: u32,
        /// The limit.
        seconds: u64,
    },
}

impl ShimError {
    /// How to mend it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Refused { hint, .. } => hint.clone(),
            Self::Spawn { .. } => Some("check that the vmd program is still where it was installed".into()),
            Self::NoAnswer { .. } => Some("see the VM's vmm.log in its state directory".into()),
            Self::StartTimedOut { .. } | Self::TimedOut { .. } => {
                Some("the host may be overloaded; try again, and see `vm doctor`".into())
            }
            Self::NotRunning { .. } => Some("the VM does not run; start it with `vm start`".into()),
            Self::StillRunning { .. } => {
                Some("the process hangs in the kernel, often on storage that does not answer".into())
            }
            Self::Unexpected { .. } => {
                Some("the VM was started by another version of vmd; restart the VM".into())
            }
            Self::Talk { .. } | Self::Read { .. } | Self::Signal { .. } => None,
        }
    }
}

fn said(stderr: &str) -> String {
    if stderr.trim().is_empty() { String::new() } else { format!("; it said: {}", stderr.trim()) }
}
