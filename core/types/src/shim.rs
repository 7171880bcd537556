//! The contract between the daemon and the per-VM shim.
//!
//! The daemon writes a [`ShimSpec`] and starts `vmd shim --spec FILE`. The shim starts the VMM and
//! prints one line of JSON, a [`ShimStarted`] or a [`ShimFailed`], to its stdout, then closes it. From
//! then on it answers one [`ShimRequest`] per line on `shim.sock` with one [`ShimReply`] per line. When the VMM ends it
//! writes an [`ExitRecord`] and exits itself.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ProcessRef, VmId,
    machine::MachineSpec,
    vm::{ExitStatus, VmmKind},
};

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
    /// The VMM's kind; nothing to the shim, but a daemon that returns controls it by this one's driver.
    #[serde(default)]
    pub vmm: Option<VmmKind>,
    /// The machine that `launch` was made of; nothing to the shim, but a daemon that returns learns from it what runs.
    #[serde(default)]
    pub machine: Option<MachineSpec>,
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
    /// Where the VMM listens for one client to tell its events, as [`QmpEvent`] reads them.
    #[serde(default)]
    pub events: Option<PathBuf>,
    /// What a VMM that takes no machine on its command line is asked for before it counts as started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup: Option<Setup>,
    /// How the guest's end is read off its console, for a VMM that has no [`Self::events`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_words: Option<LastWords>,
    /// What the shim opens for the VMM, which inherits it: the first with the number [`FIRST_INHERITED`], and so on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inherited: Vec<Inherited>,
    /// Where the VMM makes sockets of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_dir: Option<OwnDir>,
    /// What the VMM is locked into; run as the daemon's user, with all that is its, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jail: Option<Jail>,
}

/// A directory that the shim makes for the VMM alone, mode 0700, and removes with all that is in it when the VMM has ended. In a jail
/// it is the jail's user's, so that nothing in it but the pipes, which are open before the VMM is run, is to be trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnDir {
    /// Absolute.
    pub path: PathBuf,
    /// Named pipes in it that the shim makes, and reads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pipes: Vec<VmmPipe>,
}

/// A named pipe (fifo(7)) that a VMM writes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmPipe {
    /// In [`OwnDir::path`].
    pub path: PathBuf,
    /// What comes through it.
    pub what: Told,
}

/// What a VMM tells through a pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// Text, which goes where its stderr goes.
    Log,
    /// Lines of one JSON object each, of which the shim keeps the last.
    Metrics,
}

/// The descriptor of the first of [`LaunchPlan::inherited`]: above what a shim has open when it starts its VMM.
pub const FIRST_INHERITED: i32 = 100;

/// What a VMM needs and is better given than let open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "inherited", rename_all = "snake_case")]
pub enum Inherited {
    /// A Unix socket that listens.
    Listener {
        /// Its path.
        path: PathBuf,
    },
    /// A tap device, attached for frames without packet information and with virtio's header.
    Tap {
        /// Its name.
        name: String,
    },
    /// A file or device, opened for reading and writing.
    File {
        /// Its path.
        path: PathBuf,
    },
}

/// A process of a user of its own, in namespaces of its own, that sees no files but these, and has no capability.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jail {
    /// User and group id.
    pub user: u32,
    /// Group id of the jails that may read what several VMs share.
    pub shared_group: u32,
    /// What there is, at the paths that it has on the host, besides the program itself.
    pub files: Vec<JailFile>,
    /// What the VMM takes beyond the guest's memory, in MiB, at most.
    pub overhead_mib: u64,
    /// Directories of the control groups to join.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
    /// Whether it stays in the daemon's network namespace, as a VMM must that attaches to its taps itself.
    #[serde(default)]
    pub host_network: bool,
    /// Taps that are there, outlive the VMM, and that nobody but the jail's user may attach to without privileges from then on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taps: Vec<String>,
}

/// A file that is seen in a jail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailFile {
    /// Absolute.
    pub path: PathBuf,
    /// How it is there.
    pub access: JailAccess,
}

/// How a file is there in a jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JailAccess {
    /// A file, or a directory with all that is in it, to be read by those who may anyhow.
    System,
    /// A file that VMs share, to be read: given to the jails' shared group.
    Shared,
    /// The VM's own file or directory, to be read and written: given to the jail's user.
    Own,
    /// A node of its own, the jail's user's, of the device that the path is a node of.
    Device,
}

/// What a kernel says last on its console. A line that contains one of these texts counts, unless more follows on it that is none
/// of them. A VMM that outlives a guest which has powered off is ended by the shim, once the guest is seen to be dead.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastWords {
    /// The machine is off.
    pub power_off: Vec<String>,
    /// It is reset.
    pub reboot: Vec<String>,
    /// The kernel panicked. What follows of that, follows from it.
    pub panic: Vec<String>,
    /// How the VMM says that the guest is paused, which then is not dead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<Paused>,
}

/// A question to a VMM's own socket, by HTTP, and the answer that means that its guest is paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paused {
    /// The VMM's control socket.
    pub socket: PathBuf,
    /// What is to be got, e.g. `/`.
    pub path: String,
    /// Where in the answer (RFC 6901).
    pub pointer: String,
    /// What is there then.
    pub value: String,
}

/// HTTP requests to a VMM's own socket, made by the shim in this order as soon as the VMM listens. The first that is refused
/// ends the VMM, and the start with the VMM's own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The VMM's control socket.
    pub socket: PathBuf,
    /// In this order; the last one starts the guest.
    pub requests: Vec<ApiRequest>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiRequest {
    /// `PUT` or `PATCH`.
    pub method: String,
    /// Absolute, e.g. `/boot-source`.
    pub path: String,
    /// Its body.
    pub body: serde_json::Value,
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
    /// A vsock device whose host end is a listening Unix socket: `CONNECT PORT` and a newline, answered by `OK` and a number,
    /// makes one byte stream to the guest's agent
    /// (<https://github.com/firecracker-microvm/firecracker/blob/main/docs/vsock.md>), on which streams are multiplexed.
    Vsock {
        /// The VMM's socket.
        socket: PathBuf,
        /// What the agent listens on in the guest.
        port: u32,
    },
}

impl ChannelEndpoint {
    /// The VMM's socket.
    pub fn socket(&self) -> &std::path::Path {
        match self {
            Self::VirtioSerial { socket } | Self::Vsock { socket, .. } => socket,
        }
    }
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
        /// Connections to `ssh.sock` that are open now.
        #[serde(default)]
        ssh_connections: u32,
        /// When the last of them ended, seconds since the Unix epoch; `None` while one is open and before the first.
        #[serde(default)]
        ssh_idle_since: Option<u64>,
        /// Connections to `console.sock` that are open now.
        #[serde(default)]
        console_connections: u32,
        /// Since when nobody has been connected to `ssh.sock` or `console.sock`, from the VMM's start on, in seconds since
        /// the Unix epoch. `None` while somebody is, and from a shim that is too old to tell.
        #[serde(default)]
        idle_since: Option<u64>,
        /// The last object that came through a pipe of [`Told::Metrics`], in the VMM's own terms and as trustworthy as the VMM.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vmm_metrics: Option<serde_json::Value>,
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
    /// What the guest did to end it, if it was the guest and the VMM could still tell. Then its status is 0, as a rule.
    #[serde(default)]
    pub guest: Option<GuestEnd>,
    /// When, seconds since the Unix epoch.
    pub at: u64,
    /// Host boot in which it ended (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

/// How a guest ended its machine by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuestEnd {
    /// It switched the machine off, be it that somebody inside wanted it or that it was asked to.
    PowerOff,
    /// It reset the machine. So does a kernel that panics before it can report that, as its command line says.
    Reboot,
    /// Its kernel panicked.
    Panic,
}

impl std::fmt::Display for GuestEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "the guest powered off",
            Self::Reboot => "the guest rebooted",
            Self::Panic => "the guest's kernel panicked",
        })
    }
}

/// A line of an event socket ([`LaunchPlan::events`]), as far as it tells how the guest ended. What else the QEMU Machine
/// Protocol says there (<https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html>, events `SHUTDOWN` and
/// `GUEST_PANICKED`) is passed over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QmpEvent {
    /// The event's name; `None` where the line is no event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    /// What it says besides.
    #[serde(default)]
    pub data: QmpEventData,
}

/// The data of a [`QmpEvent`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QmpEventData {
    /// Of `SHUTDOWN`: whether the guest asked for it.
    #[serde(default)]
    pub guest: bool,
    /// Of `SHUTDOWN`: `guest-shutdown`, `guest-reset`, `guest-panic`, or one of the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl QmpEvent {
    /// How the guest ended, known after this event, where `before` was known before it. A panic is never outdone by what
    /// follows from it.
    pub fn guest_end(&self, before: Option<GuestEnd>) -> Option<GuestEnd> {
        let reason = self.data.reason.as_deref().filter(|_| self.data.guest);
        match (self.event.as_deref(), reason) {
            _ if before == Some(GuestEnd::Panic) => before,
            (Some("GUEST_PANICKED"), _) | (Some("SHUTDOWN"), Some("guest-panic")) => Some(GuestEnd::Panic),
            (Some("SHUTDOWN"), Some("guest-shutdown")) => Some(GuestEnd::PowerOff),
            (Some("SHUTDOWN"), Some("guest-reset")) => Some(GuestEnd::Reboot),
            // The host wanted the end, or it is for a reason that this version does not know.
            (Some("SHUTDOWN"), _) => None,
            _ => before,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lines: &[&str]) -> Option<GuestEnd> {
        lines.iter().fold(None, |before, line| {
            serde_json::from_str::<QmpEvent>(line).expect("the line is understood").guest_end(before)
        })
    }

    #[test]
    fn what_qemu_says_at_a_guests_end_is_understood() {
        let stop = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;
        let shutdown = |guest: bool, reason: &str| {
            format!(
                r#"{{"timestamp": {{}}, "event": "SHUTDOWN", "data": {{"guest": {guest}, "reason": "{reason}"}}}}"#
            )
        };
        let end = |guest, reason| told(&[&shutdown(guest, reason), stop]);
        assert_eq!(end(true, "guest-shutdown"), Some(GuestEnd::PowerOff));
        assert_eq!(end(true, "guest-reset"), Some(GuestEnd::Reboot));
        assert_eq!(end(true, "guest-panic"), Some(GuestEnd::Panic));
        assert_eq!(end(false, "host-qmp-quit"), None);
        assert_eq!(end(false, "host-signal"), None);
        let panicked =
            r#"{"event": "GUEST_PANICKED", "data": {"action": "poweroff", "info": {"type": "s390"}}}"#;
        assert_eq!(told(&[panicked, &shutdown(true, "guest-reset")]), Some(GuestEnd::Panic));
        assert_eq!(
            told(&[r#"{"QMP": {"version": {}, "capabilities": []}}"#, r#"{"return": {}}"#, stop]),
            None
        );
    }

    #[test]
    fn what_an_older_build_wrote_is_read() {
        let record =
            r#"{"vmm": {"pid": 1, "start_ticks": 2}, "status": {"code": 0}, "at": 3, "boot_id": "x"}"#;
        assert_eq!(serde_json::from_str::<ExitRecord>(record).expect("it is a record").guest, None);
        let status = r#"{"reply": "status", "vm": "0123456789ab", "shim": {"pid": 1, "start_ticks": 2},
            "vmm": {"pid": 1, "start_ticks": 2}, "started_at": 3, "guest_connected": true}"#;
        let status = serde_json::from_str::<ShimReply>(status).expect("it is a status");
        assert!(
            matches!(
                status,
                ShimReply::Status { ssh_connections: 0, idle_since: None, vmm_metrics: None, .. }
            ),
            "{status:?}"
        );
        let jail = r#"{"user": 1, "shared_group": 2, "files": [], "overhead_mib": 3}"#;
        let jail = serde_json::from_str::<Jail>(jail).expect("it is a jail");
        assert!(!jail.host_network && jail.taps.is_empty(), "{jail:?}");
    }
}
