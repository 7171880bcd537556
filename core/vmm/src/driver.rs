//! What a VMM driver is, and the small interfaces it may offer beyond that.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use vm_types::{VmPaths, machine::MachineSpec, shim::LaunchPlan, vm::VmmKind};

use crate::VmmError;

/// How long [`Vmm::quit`] and the optional interfaces wait for the VMM's answer.
pub const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's CPU, through `/dev/kvm`.
    Kvm,
    /// QEMU's software emulation.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// What a driver found on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Availability {
    /// The VMM's version as it states it, e.g. `7.2.22`.
    pub version: String,
    /// What would run a VM that is started now.
    pub accelerator: Accelerator,
    /// Why that one, for people.
    pub reason: String,
    /// Why a VMM that is started now is not locked in, where it was to be.
    pub jail_obstacle: Option<String>,
}

/// A driver for one kind of VMM.
#[async_trait]
pub trait Vmm: Send + Sync + fmt::Debug {
    /// Which kind it drives.
    fn kind(&self) -> VmmKind;

    /// Whether it can run VMs on this host, and how.
    ///
    /// # Errors
    /// The VMM not being installed, or not saying its version.
    async fn availability(&self) -> Result<Availability, VmmError>;

    /// Whether it boots a bzImage as well as an ELF vmlinux.
    fn unpacks_kernels(&self) -> bool {
        true
    }

    /// The command line for a machine whose sockets are those of `paths`. Starts nothing.
    ///
    /// # Errors
    /// The VMM not being installed, or a machine it cannot express.
    async fn plan(&self, machine: &MachineSpec, paths: &VmPaths) -> Result<LaunchPlan, VmmError>;

    /// Ends when the VMM answers on its control socket. Cancel-safe.
    ///
    /// # Errors
    /// [`VmmError::NotUp`] when it has not answered `within` this time, for instance because it died; whoever is its
    /// parent knows.
    async fn wait_up(&self, paths: &VmPaths, within: Duration) -> Result<(), VmmError>;

    /// Ends the VMM at once, without asking the guest. The VMM has been told when this returns, but may not be
    /// gone yet.
    ///
    /// # Errors
    /// The VMM not answering, being gone already, or having no such request ([`VmmError::Unsupported`]): its parent can
    /// kill it.
    async fn quit(&self, paths: &VmPaths) -> Result<(), VmmError>;

    /// Its power button, where it has one.
    fn power_button(&self) -> Option<&dyn PowerButton> {
        None
    }

    /// Its pause and resume, where it has them.
    fn pause(&self) -> Option<&dyn Pause> {
        None
    }

    /// Its way to change a drive's size while the guest runs, where it has one.
    fn resize(&self) -> Option<&dyn Resize> {
        None
    }

    /// [`Self::power_button`], its absence as an error.
    ///
    /// # Errors
    /// [`VmmError::Unsupported`].
    fn require_power_button(&self) -> Result<&dyn PowerButton, VmmError> {
        self.power_button().ok_or(VmmError::Unsupported { vmm: self.kind(), what: "a power button" })
    }

    /// [`Self::pause`], its absence as an error.
    ///
    /// # Errors
    /// [`VmmError::Unsupported`].
    fn require_pause(&self) -> Result<&dyn Pause, VmmError> {
        self.pause().ok_or(VmmError::Unsupported { vmm: self.kind(), what: "pausing" })
    }

    /// [`Self::resize`], its absence as an error.
    ///
    /// # Errors
    /// [`VmmError::Unsupported`].
    fn require_resize(&self) -> Result<&dyn Resize, VmmError> {
        self.resize().ok_or(VmmError::Unsupported { vmm: self.kind(), what: "growing a disk while it runs" })
    }
}

/// Asks a guest to go down without its agent.
#[async_trait]
pub trait PowerButton: Send + Sync {
    /// Presses the ACPI power button, or Control-Alt-Delete where there is none. What comes of it is up to the guest.
    ///
    /// # Errors
    /// The VMM not answering or refusing.
    async fn press(&self, paths: &VmPaths) -> Result<(), VmmError>;
}

/// Halts and resumes virtual CPUs.
#[async_trait]
pub trait Pause: Send + Sync {
    /// Halts the virtual CPUs; halted ones stay so.
    ///
    /// # Errors
    /// The VMM not answering or refusing.
    async fn pause(&self, paths: &VmPaths) -> Result<(), VmmError>;

    /// Lets them run; running ones stay so.
    ///
    /// # Errors
    /// The VMM not answering or refusing.
    async fn resume(&self, paths: &VmPaths) -> Result<(), VmmError>;

    /// Whether they are halted now.
    ///
    /// # Errors
    /// The VMM not answering.
    async fn is_paused(&self, paths: &VmPaths) -> Result<bool, VmmError>;

    /// Whether the VMM has halted them itself, as the host had no room for what the guest wrote to a drive. [`Self::resume`]
    /// then writes that again. A VMM that gives its guest an error instead never does.
    ///
    /// # Errors
    /// The VMM not answering.
    async fn is_out_of_room(&self, _paths: &VmPaths) -> Result<bool, VmmError> {
        Ok(false)
    }
}

/// Changes the size of drives under a running guest.
#[async_trait]
pub trait Resize: Send + Sync {
    /// Makes a drive larger and lets the guest know. Where its image is a file, that grows; a block device has to have the
    /// size already. A drive that has this size stays as it is. What is on it, a filesystem say, does not grow with it.
    ///
    /// # Errors
    /// [`VmmError::NoDrive`], [`VmmError::Growth`] for a size that is smaller or no multiple of 512 bytes, the VMM not
    /// answering or refusing.
    async fn grow_disk(&self, paths: &VmPaths, serial: &str, size_bytes: u64) -> Result<(), VmmError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Bare;

    #[async_trait]
    impl Vmm for Bare {
        fn kind(&self) -> VmmKind {
            VmmKind::Fake
        }
        async fn availability(&self) -> Result<Availability, VmmError> {
            Err(VmmError::Unsupported { vmm: VmmKind::Fake, what: "anything" })
        }
        async fn plan(&self, _: &MachineSpec, _: &VmPaths) -> Result<LaunchPlan, VmmError> {
            Err(VmmError::Unsupported { vmm: VmmKind::Fake, what: "anything" })
        }
        async fn wait_up(&self, _: &VmPaths, _: Duration) -> Result<(), VmmError> {
            Ok(())
        }
        async fn quit(&self, _: &VmPaths) -> Result<(), VmmError> {
            Ok(())
        }
    }

    #[test]
    fn what_a_driver_lacks_is_a_typed_error_with_a_hint() {
        let bare: &dyn Vmm = &Bare;
        let absent =
            [bare.require_pause().err(), bare.require_power_button().err(), bare.require_resize().err()];
        for error in absent.map(Option::unwrap) {
            assert!(matches!(error, VmmError::Unsupported { vmm: VmmKind::Fake, .. }), "{error}");
            assert!(error.hint().is_some());
        }
    }
}
