//! What happened, as the event log and its subscribers have it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

use crate::{OperationId, VmId, VmName};

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// The daemon is up.
    DaemonStarted,
    /// The daemon goes down; VMs go on.
    DaemonStopping,
    /// A returning daemon adopted, undid or removed something.
    Recovered,
    /// A VM was made.
    VmCreated,
    /// Its agent answered.
    VmStarted,
    /// It is off because somebody asked for that.
    VmStopped,
    /// It powered itself off.
    VmPoweredOff,
    /// It rebooted itself; it is started again.
    VmRebooted,
    /// It is off because of a failure; the message says which.
    VmFailed,
    /// A restart policy starts it again, or has given up.
    VmRestarting,
    /// Halted.
    VmPaused,
    /// Let run again.
    VmResumed,
    /// Its specification was changed.
    VmChanged,
    /// It was idle for as long as it may be, or its time is over.
    VmExpired,
    /// It was deleted.
    VmDeleted,
    /// The filesystem of VMs' disks has little room left.
    DiskLow,
    /// A VM's disk had no room on the host: its guest is halted or gets errors, as the message says.
    DiskFailed,
    /// A plugin that is not required failed, and was left out.
    PluginFailed,
    /// A plugin came, went or was changed.
    PluginsChanged,
    /// An image or a kernel came or went.
    CatalogueChanged,
    /// Not in the log: told to a follower that was too slow, in place of what it missed.
    Missed,
    /// Something that only a newer daemon knows; the message tells.
    #[serde(other)]
    Other,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Counts up from 1 over all lives of one daemon's state directory.
    pub sequence: u64,
    /// When, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What.
    pub kind: EventKind,
    /// To which VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<VmName>,
    /// By which operation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// For people.
    pub message: String,
}
