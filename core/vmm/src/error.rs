//! What can go wrong with a VMM.

use std::{io, path::PathBuf};

use vm_host::{HttpError, RunError};
use vm_types::vm::VmmKind;

use crate::QmpError;

/// A failed exchange with a VMM's control socket, in whichever language that is.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// QEMU's, which the fake speaks too.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// Firecracker's.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// What it said lacks something.
    #[error("an answer to {request} has no {lacks}")]
    Strange {
        /// What was asked.
        request: &'static str,
        /// What should have been there.
        lacks: &'static str,
    },
}

impl ControlError {
    /// What to do about it, for people.
    pub fn hint(&self) -> Option<String> {
        const VERSION: &str = "the VMM's version may not fit; see what doctor says of it";
        Some(match self {
            Self::Qmp(error) => return error.hint(),
            Self::Http(error) if error.is_nobody() => "the VMM has ended; start the VM again".to_owned(),
            Self::Http(HttpError::Connect { socket, .. }) => {
                format!("check the permissions of {}", socket.display())
            }
            Self::Http(HttpError::Broken { .. }) => "the VMM has ended; see its log for why".to_owned(),
            Self::Http(HttpError::TimedOut { .. }) => "the VMM is stuck; a forced stop ends it".to_owned(),
            Self::Http(_) | Self::Strange { .. } => VERSION.to_owned(),
        })
    }
}

/// A failed operation of a VMM driver.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// This kind of VMM cannot do it at all.
    #[error("{} does not support {what}", name(*vmm))]
    Unsupported {
        /// Which kind.
        vmm: VmmKind,
        /// What was asked for, e.g. `pausing`.
        what: &'static str,
    },
    /// The daemon has no driver of this kind.
    #[error("this daemon runs no VMs under {}", name(*vmm))]
    NoDriver {
        /// Which kind.
        vmm: VmmKind,
    },
    /// This version of it cannot, a later one can.
    #[error("{} {version} does not support {what}; {needed} does", name(*vmm))]
    TooOld {
        /// Which kind.
        vmm: VmmKind,
        /// The version that is installed.
        version: String,
        /// The first version that can.
        needed: &'static str,
        /// What was asked for.
        what: &'static str,
    },
    /// It runs guests only on processors that can be virtualised.
    #[error("{} cannot run VMs on this host: {reason}", name(*vmm))]
    NoKvm {
        /// Which kind.
        vmm: VmmKind,
        /// What is missing.
        reason: String,
    },
    /// It was to be locked in, and cannot be.
    #[error("{} cannot be locked in on this host: {reason}", name(*vmm))]
    NoJail {
        /// Which kind.
        vmm: VmmKind,
        /// What is in the way.
        reason: String,
    },
    /// A drive's image could not be made larger.
    #[error("could not grow {}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What machine it is that runs could not be learned.
    #[error("could not read the machine's description {}", path.display())]
    Machine {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM's program is not on this host.
    #[error("{} is not installed: there is no executable {program}", name(*vmm))]
    NotInstalled {
        /// Which kind.
        vmm: VmmKind,
        /// The program that was looked for.
        program: String,
    },
    /// The VMM's program would not say its version.
    #[error("could not ask {program} for its version")]
    Probe {
        /// The program.
        program: String,
        /// Why.
        source: RunError,
    },
    /// What it said is no version.
    #[error("{program} states no version: {output:?}")]
    NoVersion {
        /// The program.
        program: String,
        /// What it printed.
        output: String,
    },
    /// The machine cannot be expressed.
    #[error("a machine with {what} {value:?} cannot be started: {rule}")]
    BadMachine {
        /// The offending part, e.g. `drive serial`.
        what: &'static str,
        /// Its value.
        value: String,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// A behaviour file of the fake VMM could not be used.
    #[error("could not read {path}")]
    Behaviour {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The VMM did not answer on its control socket in time.
    #[error("{} did not answer on {socket} within {millis} ms", name(*vmm))]
    NotUp {
        /// Which kind.
        vmm: VmmKind,
        /// Its control socket.
        socket: PathBuf,
        /// The limit.
        millis: u128,
        /// The last attempt's failure.
        source: ControlError,
    },
    /// A drive that is not attached cannot be changed.
    #[error("{} has no drive with the serial {serial:?}", name(*vmm))]
    NoDrive {
        /// Which kind.
        vmm: VmmKind,
        /// The drive's serial.
        serial: String,
    },
    /// A size that the drive cannot grow to.
    #[error("the drive {serial:?} cannot be grown to {size_bytes} bytes: {rule}")]
    Growth {
        /// The drive's serial.
        serial: String,
        /// What was asked for.
        size_bytes: u64,
        /// Why not.
        rule: String,
    },
    /// The VMM could not be made to do something.
    #[error("could not {operation} through {}'s control socket", name(*vmm))]
    Control {
        /// Which kind.
        vmm: VmmKind,
        /// What it should have done, e.g. `pause the VM`.
        operation: &'static str,
        /// Why.
        source: ControlError,
    },
}

impl VmmError {
    /// What to do about it, for people.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unsupported { what, .. } => Some(format!("use a VMM that supports {what}")),
            Self::NoDriver { .. } => {
                Some("use another VMM, or set vmm.driver in the configuration to \"auto\"".to_owned())
            }
            Self::TooOld { vmm, needed, .. } => {
                Some(format!("install {} {needed} or later, or use another VMM", name(*vmm)))
            }
            Self::NoKvm { .. } => Some(
                "enable VT-x or AMD-V in the firmware, or nested virtualisation where this host is a VM itself; QEMU works without"
                    .to_owned(),
            ),
            Self::NoJail { .. } => Some(
                "remove what is in the way (`vm doctor` names it), use QEMU, or set vmm.jail in the configuration to \"auto\"".to_owned(),
            ),
            Self::Image { .. } => {
                Some("check that the state directory is writable and has free space".to_owned())
            }
            Self::Machine { .. } => Some("stop and start the VM, which writes it anew".to_owned()),
            Self::NotInstalled { vmm: VmmKind::Qemu, program } => Some(format!(
                "install QEMU's system emulator (Debian and Ubuntu: apt install {}), or name {program}'s place in the configuration",
                crate::qemu::PACKAGE
            )),
            Self::NotInstalled { vmm: VmmKind::Firecracker, program } => Some(format!(
                "install Firecracker (its releases have static binaries for x86_64 and aarch64), or name {program}'s place in the configuration"
            )),
            Self::NotInstalled { vmm: VmmKind::Fake, .. } => {
                Some("build vm-fake-vmm (feature `fake`) and name its path".to_owned())
            }
            Self::Probe { program, .. } | Self::NoVersion { program, .. } => {
                Some(format!("see what `{program} --version` prints; it may be broken or another program"))
            }
            Self::BadMachine { what, rule, .. } => Some(format!("change the {what} ({rule})")),
            Self::Behaviour { path, .. } => Some(format!("correct or remove {}", path.display())),
            Self::NotUp { .. } => {
                Some("see the VMM's log and the VM's console for why it did not start".to_owned())
            }
            Self::NoDrive { .. } => {
                Some("the VM runs a machine without it; restart the VM to attach it".to_owned())
            }
            Self::Growth { .. } => Some("choose a size that is not below the present one".to_owned()),
            Self::Control { source, .. } => source.hint(),
        }
    }
}

/// What people call it.
fn name(vmm: VmmKind) -> &'static str {
    match vmm {
        VmmKind::Qemu => "QEMU",
        VmmKind::Firecracker => "Firecracker",
        VmmKind::Fake => "the fake VMM",
    }
}
