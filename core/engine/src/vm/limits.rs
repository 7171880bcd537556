//! What a VMM may take of the host beside what its guest has been promised.

use std::path::Path;

use vm_locks::{Ctx, Unlocked};
use vm_types::{Effect, machine::MachineSpec, shim::Jail};

use super::cell::Cell;
use crate::{
    Engine, EngineError,
    effects::cgroups::{self, Limits},
    journal::Phase,
};

/// Threads of a VMM beside those of virtual processors: QEMU has up to 64 for each disk's input and output, and few others.
const TASKS: u64 = 512;
/// Processors for a VMM's own threads.
const CPUS: u64 = 1;

impl Engine {
    /// Makes the control group of a VM's VMM, which is to join it. Where the host has no place for one, or refuses it, the VM goes
    /// without: its jail does not depend on that, and the doctor tells of it.
    ///
    /// # Errors
    /// The journal.
    pub(super) async fn limit(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        jail: &mut Jail,
        machine: &MachineSpec,
    ) -> Result<(), EngineError> {
        let name = cgroups::name(self.instance(), cell.id().as_str());
        let mut memory_bytes = (machine.memory_mib + jail.overhead_mib) << 20;
        // What is written to a disk in memory is the writer's memory, and cannot be taken back from it.
        let in_memory = machine.drives.iter().filter(|drive| is_in_memory(&drive.path));
        memory_bytes += in_memory.filter_map(|drive| Some(drive.path.metadata().ok()?.len())).sum::<u64>();
        let cpus = u64::from(machine.cpus);
        let limits = Limits { memory_bytes, cpus: cpus + CPUS, tasks: cpus + TASKS };
        let groups = cgroups::group(&name, limits);
        if groups.is_empty() {
            return Ok(());
        }
        let directories = groups.iter().map(|group| group.path.clone()).collect();
        match cell.scope.apply(ctx, Effect::Cgroup { name, groups }, Phase::Start).await {
            Ok(_) => jail.cgroups = directories,
            Err(error @ EngineError::File { .. }) => {
                tracing::warn!(vm = %cell.name(), error = %error.chain(), "its VMM has no limits");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn is_in_memory(path: &Path) -> bool {
    use nix::sys::statfs::{TMPFS_MAGIC, statfs};
    statfs(path).is_ok_and(|about| about.filesystem_type() == TMPFS_MAGIC)
}
