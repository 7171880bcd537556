//! What a fake does besides what is asked of it.

use serde::{Deserialize, Serialize};
use vm_types::shim::GuestEnd;

/// How a fake VMM and its guest behave. The default is flawless.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FakeBehaviour {
    /// How the guest's start goes.
    pub boot: Boot,
    /// When and how it dies of itself.
    pub crash: Option<Crash>,
    /// Answers a shutdown request and stays.
    pub ignore_shutdown: bool,
    /// Takes no notice of the power button.
    pub ignore_power_button: bool,
    /// The process takes no notice of SIGTERM, by which it ends otherwise.
    pub ignore_sigterm: bool,
    /// What the guest writes to its console without end, in bytes per second.
    pub console_flood_bytes_per_s: u64,
}

/// How a guest's start goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boot {
    /// Ready this long after the VMM's start.
    ReadyAfter {
        /// Milliseconds.
        millis: u64,
    },
    /// The agent answers, but is never ready.
    NeverReady,
    /// The agent answers that it cannot become ready.
    Fails {
        /// As in [`vm_types::guest::control::Reply::Error`].
        code: String,
        /// For people.
        message: String,
    },
    /// No agent ever answers.
    Silent,
}

impl Default for Boot {
    fn default() -> Self {
        Self::ReadyAfter { millis: 0 }
    }
}

/// An end nobody asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crash {
    /// When.
    pub at: CrashAt,
    /// How.
    pub end: End,
}

/// The moment of a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CrashAt {
    /// Before there is any socket.
    Launch,
    /// This long after there are sockets, however far the guest is.
    Up {
        /// Milliseconds.
        after_millis: u64,
    },
    /// Right after the first time that somebody was told the guest is ready.
    Ready,
    /// This long after the first time that somebody was told the guest is ready.
    AfterReady {
        /// Milliseconds.
        millis: u64,
    },
}

/// How a process or its guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It exits with this code.
    Code(i32),
    /// This signal number ends it.
    Signal(i32),
    /// The guest does this; the process tells it and exits with 0.
    Guest(GuestEnd),
}
