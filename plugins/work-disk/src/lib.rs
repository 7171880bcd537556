//! Gives each VM a second disk for work, mounted at a path. By its lifetime it goes with the VM's run, with the VM, or stays
//! when both are gone.

use serde::Deserialize;
use vm_plugin_sdk::{
    ConfigChange, Context, ContributeGuest, ContributeMachine, Error, Facts, GuestConfig, HostPlan, Lifetime,
    MachineConfig, Outcome, PrepareHost, Result, Sandbox, Vm, capability,
};

/// By which the guest finds the drive.
const SERIAL: &str = "work";
const FILESYSTEM: &str = "ext4";

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct WorkDisk {
    path: String,
    size_gib: u64,
    lifetime: Keep,
    options: Vec<String>,
    /// Only for VMs with this label.
    label: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Keep {
    Run,
    Vm,
    Kept,
}

impl From<Keep> for Lifetime {
    fn from(keep: Keep) -> Self {
        match keep {
            Keep::Run => Self::Run,
            Keep::Vm => Self::Vm,
            Keep::Kept => Self::Kept,
        }
    }
}

impl WorkDisk {
    fn concerns(&self, vm: &Vm) -> bool {
        self.label.as_ref().is_none_or(|label| vm.label(label).is_some())
    }

    fn bytes(&self) -> Result<u64> {
        self.size_gib.checked_mul(1 << 30).ok_or_else(|| {
            Error::new("disk.too-large", format!("no disk has {} GiB", self.size_gib))
                .with_hint("give `size-gib` a smaller number")
        })
    }

    fn change(&self, former: &Self) -> Outcome {
        if self.size_gib < former.size_gib {
            let message = format!("a disk of {} GiB cannot become one of {}", former.size_gib, self.size_gib);
            let error = Error::new("disk.shrink", message)
                .with_hint("leave `size-gib`, or delete the VM and its disk first");
            return Outcome::Refused(error);
        }
        // A mounted disk is not taken from under those who work on it.
        if self == former { Outcome::Applied } else { Outcome::NeedsRestart }
    }
}

// The disk goes by the VM's name: a kept one is found again by the next VM of that name.

impl ContributeGuest for WorkDisk {
    fn run(&self, _: &Context, vm: &Vm, _: &Facts, guest: &GuestConfig) -> Result {
        if self.concerns(vm) {
            guest.mount_drive(SERIAL, &self.path, FILESYSTEM, &self.options)?;
        }
        Ok(())
    }
}

impl ContributeMachine for WorkDisk {
    fn run(&self, context: &Context, vm: &Vm, _: &Facts, machine: &MachineConfig) -> Result {
        if self.concerns(vm) {
            machine.drive(SERIAL, &context.reference(&vm.name())?, false)?;
        }
        Ok(())
    }
}

impl PrepareHost for WorkDisk {
    fn run(&self, _: &Context, vm: &Vm, _: &Facts, plan: &HostPlan) -> Result {
        if self.concerns(vm) {
            plan.disk(&vm.name(), self.bytes()?, Some(FILESYSTEM), self.lifetime.into())?;
        }
        Ok(())
    }
}

impl ConfigChange for WorkDisk {
    fn run(&self, _: &Context, vm: &Vm, _: &Facts, former: &Self, _: Option<&Sandbox>) -> Result<Outcome> {
        self.bytes()?;
        let concerned = self.concerns(vm) || former.concerns(vm);
        Ok(if concerned { self.change(former) } else { Outcome::Applied })
    }
}

capability!(WorkDisk: ContributeGuest, ContributeMachine, PrepareHost, ConfigChange);

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> WorkDisk {
        WorkDisk {
            path: "/work".to_owned(),
            size_gib: 10,
            lifetime: Keep::Vm,
            options: Vec::new(),
            label: None,
        }
    }

    #[test]
    fn a_disk_does_not_shrink_and_is_not_moved_under_work() {
        assert!(matches!(disk().change(&disk()), Outcome::Applied));
        let moved = WorkDisk { path: "/srv".to_owned(), ..disk() };
        assert!(matches!(moved.change(&disk()), Outcome::NeedsRestart));
        let larger = WorkDisk { size_gib: 11, ..disk() };
        assert!(matches!(larger.change(&disk()), Outcome::NeedsRestart));
        let Outcome::Refused(error) = disk().change(&larger) else { panic!("it shrinks") };
        assert!(error.hint.is_some() && error.message.contains("11") && error.message.contains("10"));
    }

    #[test]
    fn a_size_beyond_counting_is_an_error() {
        assert_eq!(disk().bytes().unwrap(), 10 << 30);
        assert_eq!(WorkDisk { size_gib: u64::MAX, ..disk() }.bytes().unwrap_err().code, "disk.too-large");
    }
}
