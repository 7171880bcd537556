//! Names of devices, which follow from ids.

use vm_types::{InstanceId, VmId};

/// Behind the name of a disk: the base as large as the disk.
const ORIGIN: &str = "-origin";

/// The device-mapper name of a VM's disk, e.g. `vmd-3f2a-0123456789ab`.
pub fn device_name(instance: &InstanceId, vm: &VmId) -> String {
    format!("{}{vm}", device_prefix(instance))
}

/// What the names of all devices of a daemon begin with.
pub fn device_prefix(instance: &InstanceId) -> String {
    format!("vmd-{instance}-")
}

/// The VM that a device of this instance is of, whether it is its disk or what that is made of.
pub fn vm_of_device(instance: &InstanceId, name: &str) -> Option<VmId> {
    let id = name.strip_prefix(&device_prefix(instance))?;
    id.strip_suffix(ORIGIN).unwrap_or(id).parse().ok()
}

pub(crate) fn origin(name: &str) -> String {
    format!("{name}{ORIGIN}")
}

/// Tells our devices from others of the same name.
pub(crate) fn uuid(name: &str) -> String {
    format!("VMD-{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_tells_whose_it_is() {
        let (ours, other): (InstanceId, InstanceId) = ("3f2a".parse().unwrap(), "3f2b".parse().unwrap());
        let vm: VmId = "0123456789ab".parse().unwrap();
        let name = device_name(&ours, &vm);
        assert_eq!(name, "vmd-3f2a-0123456789ab");
        assert_eq!(vm_of_device(&ours, &name), Some(vm.clone()));
        assert_eq!(vm_of_device(&ours, &origin(&name)), Some(vm));
        assert_eq!(vm_of_device(&other, &name), None);
        for foreign in ["vmd-3f2a-", "vmd-3f2a-web", "vmd-3f2a-0123456789ab-cow", "vg0-root"] {
            assert_eq!(vm_of_device(&ours, foreign), None, "{foreign}");
        }
    }
}
