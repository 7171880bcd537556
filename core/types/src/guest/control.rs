//! The agent's control service: one JSON [`Request`] a line, one JSON [`Reply`] a line, in order, on a
//! stream of the guest channel opened for [`Service::Control`].

use serde::{Deserialize, Serialize};

use super::config::GuestConfig;

/// What a stream of the guest channel is for; its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Service {
    /// [`Request`] and [`Reply`] lines.
    Control = 1,
    /// The SSH protocol.
    Ssh = 2,
}

impl Service {
    /// The service of a stream's first byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Control),
            2 => Some(Self::Ssh),
            _ => None,
        }
    }
}

/// Host to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Who are you? Answered at once with [`Reply::Hello`].
    Hello,
    /// Answered with [`Reply::Ready`] when the phase is reached, or [`Reply::Error`] if it never can be.
    WaitReady {
        /// Which phase.
        phase: Phase,
    },
    /// Apply this configuration live.
    Apply {
        /// The whole of it.
        config: Box<GuestConfig>,
    },
    /// Shut down through the image's own init. Answered with [`Reply::ShuttingDown`], then the VM powers off or resets.
    Shutdown {
        /// Off or again.
        kind: ShutdownKind,
        /// How long processes get between SIGTERM and SIGKILL where the agent is init, in milliseconds.
        grace_ms: u64,
    },
    /// Flush filesystems. Answered with [`Reply::Done`].
    Sync,
    /// Grow the root filesystem to its drive's size. Answered with [`Reply::Grown`].
    GrowRoot {
        /// What the drive has been grown to, in bytes; the guest may see it a moment later, so it waits for this.
        drive_bytes: u64,
    },
    /// End all processes but the agent's own and the kernel's, where the agent is init. Answered with
    /// [`Reply::ProcessesEnded`] when they are gone.
    EndProcesses {
        /// How long they get between SIGTERM and SIGKILL, in milliseconds.
        grace_ms: u64,
    },
}

/// Codes of [`Reply::Error`] that programs tell apart.
pub mod code {
    /// The line is no request that this agent knows.
    pub const REQUEST: &str = "control.request";
    /// [`super::Request::EndProcesses`]: the image's own init runs, and starts again what is ended.
    pub const PROCESSES_INIT: &str = "processes.init";
    /// [`super::Request::EndProcesses`]: there are some that not even SIGKILL ends.
    pub const PROCESSES_STAY: &str = "processes.stay";
}

/// How far the guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Root mounted, configuration applied, SSH served.
    Agent,
    /// The image's own init has finished its start (at once where there is none).
    Init,
}

/// How a guest goes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutdownKind {
    /// Off.
    PowerOff,
    /// Reset.
    Reboot,
}

/// Who is PID 1 in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitKind {
    /// The agent itself.
    Agent,
    /// The image's own, at this path.
    Image(String),
}

/// Names that [`Reply::ProcessesEnded`] has at most.
pub const ENDED_NAMES: usize = 16;

/// Agent to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello {
        /// The agent's version.
        agent_version: String,
        /// The newest [`GuestConfig`] version it knows.
        config_version: u32,
        /// `uname -r`.
        kernel_release: String,
        /// PID 1.
        init: InitKind,
    },
    /// To [`Request::WaitReady`].
    Ready {
        /// The phase.
        phase: Phase,
        /// What did not work on the way but need not stop anybody, for people.
        warnings: Vec<String>,
    },
    /// To [`Request::Apply`].
    Applied {
        /// As in [`Reply::Ready`].
        warnings: Vec<String>,
    },
    /// To [`Request::Shutdown`].
    ShuttingDown,
    /// To [`Request::Sync`].
    Done,
    /// To [`Request::GrowRoot`].
    Grown {
        /// The filesystem's size now, in bytes. Less than the drive's by a rest too small to use.
        bytes: u64,
    },
    /// To [`Request::EndProcesses`].
    ProcessesEnded {
        /// How many there were.
        count: u64,
        /// Their names (proc_pid_comm(5)), each once, sorted: the first [`ENDED_NAMES`].
        names: Vec<String>,
    },
    /// It could not be done.
    Error {
        /// Dotted, stable, e.g. `root.mount`.
        code: String,
        /// For people.
        message: String,
    },
}
