//! The contract between the daemon and the per-VM shim.
//!
//! The daemon writes a [`ShimSpec`] and starts `vmd shim --spec FILE`. The shim starts the VMM and
//! prints one line of JSON, a [`ShimStarted`] or a [`ShimFailed`], to its stdout, then closes it. From
//! then on it answers one [`ShimRequest`] per line on `shim.sock` with one [`ShimReply`] per line. When the VMM ends it
//! writes an [`ExitRecord`] and exits itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{ProcessRef, VmId, vm::ExitStatus};

/// What a shim is told. Sockets and logs are those of [`crate::VmPaths`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimSpec {
    /// Whose shim it is.
    pub vm: VmId,
    /// The VM's run directory.
    pub run_dir: PathBuf,
    /// The VM's state directory.
    pub state_dir: PathBuf,
    /// How to start the VMM.
    pub launch: LaunchPlan,
    /// Bound of the console log in bytes, both files together.
    pub console_log_bytes: u64,
    /// Group that may open `ssh.sock` and `console.sock`, if any besides root.
    pub socket_group: Option<u32>,
}

/// A VMM's command line and where its guest channel comes out. Its stdin and stdout are the serial console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchPlan {
    /// Absolute path of the program.
    pub program: PathBuf,
    /// Its arguments, without the program itself.
    pub args: Vec<String>,
    /// How the shim reaches the guest.
    pub channel: ChannelEndpoint,
}

/// Where the host end of a guest channel is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "channel", rename_all = "snake_case")]
pub enum ChannelEndpoint {
    /// One byte stream to the guest's virtio-serial port, offered by the VMM as a listening Unix socket; streams are multiplexed on it.
    VirtioSerial {
        /// The VMM's socket.
        socket: PathBuf,
    },
}

/// First line of a shim that started its VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimStarted {
    /// The shim.
    pub shim: ProcessRef,
    /// The VMM.
    pub vmm: ProcessRef,
}

/// First line of a shim that could not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimFailed {
    /// What went wrong, for people.
    pub error: String,
    /// How to mend it, where the shim knows.
    #[serde(default)]
    pub hint: Option<String>,
}

/// A line to `shim.sock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum ShimRequest {
    /// Who are you and how is the VMM?
    Status,
    /// Kill the VMM (SIGKILL). Safe against pid reuse: the shim is its parent.
    Kill,
}

/// A line back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum ShimReply {
    /// To [`ShimRequest::Status`].
    Status {
        /// Whose shim it is.
        vm: VmId,
        /// The shim.
        shim: ProcessRef,
        /// The VMM.
        vmm: ProcessRef,
        /// Start of the VMM, seconds since the Unix epoch.
        started_at: u64,
        /// Whether the guest's agent has answered on the channel.
        guest_connected: bool,
    },
    /// To [`ShimRequest::Kill`].
    Killed,
    /// The line was no request.
    Error {
        /// Why.
        message: String,
    },
}

/// How a VMM ended; written whole to `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The VMM that ended.
    pub vmm: ProcessRef,
    /// How.
    pub status: ExitStatus,
    /// When, seconds since the Unix epoch.
    pub at: u64,
    /// Host boot in which it ended (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}
