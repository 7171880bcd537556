//! Watching that disks have room to differ from their bases.
//!
//! A disk's file, whether a copy or one of differences, may grow to its full size: it never overflows by itself. What can run out is
//! the filesystem that all of them are on, which is told early. What a write then comes to depends on what it is to:
//!
//! - a file, by QEMU: it halts the guest, which is let run when there is room again, and knows nothing of it;
//! - a file, by Firecracker: the guest gets an error;
//! - a device of differences: the kernel gives it up, and its VM has to be started again when there is room.

use std::{collections::HashSet, sync::Arc, time::Duration};

use vm_disk::Backend;
use vm_locks::{Ctx, Unlocked};
use vm_types::{EventKind, VmId};

use super::cell::{Cell, OUT_OF_ROOM};
use crate::{Engine, EngineError};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(15);
/// The same while a guest is halted.
const LOOK_HALTED: Duration = Duration::from_secs(1);
/// A halted guest is let run with as much room, so that it does not stop and go.
const ROOM_BYTES: u64 = 16 << 20;
/// Told when less is free, each once until there is more again.
const LOW_BYTES: [u64; 3] = [8 << 30, 2 << 30, 512 << 20];

/// What was told already.
#[derive(Debug, Default)]
struct Told {
    /// How many of [`LOW_BYTES`].
    low: usize,
    given_up: HashSet<VmId>,
}

/// How many thresholds are passed.
fn passed(free_bytes: u64) -> usize {
    LOW_BYTES.iter().filter(|low| free_bytes < **low).count()
}

impl Told {
    /// What to tell of the free bytes. A threshold counts as left when a quarter more is free, so that none is told again and again.
    fn look(&mut self, free_bytes: u64) -> Option<String> {
        let now = passed(free_bytes);
        if now > self.low {
            self.low = now;
            return Some(format!(
                "the disks of VMs have {} MiB left to grow: free some space, e.g. with `vm prune` or `vm image rm`",
                free_bytes >> 20
            ));
        }
        self.low = self.low.min(passed(free_bytes - free_bytes / 5));
        None
    }
}

impl Engine {
    /// Looks after the disks' room from now on. To be called once.
    pub(crate) fn watch_disks(&self) {
        let engine = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            let mut told = Told::default();
            while let Some(inner) = engine.upgrade() {
                let engine = Self { inner };
                engine.look_at_disks(&mut told).await;
                let halted = engine.all().iter().any(|cell| cell.out_of_room());
                drop(engine);
                tokio::time::sleep(if halted { LOOK_HALTED } else { LOOK }).await;
            }
        });
    }

    /// Lets a guest run that its VMM has halted, if there is room again, and tells of either.
    async fn look_at_halt(&self, cell: &Arc<Cell>, has_room: bool) -> Result<(), EngineError> {
        let (Some(live), Some(pause)) = (cell.live(), self.vmm_of(cell)?.pause()) else { return Ok(()) };
        let paths = cell.paths();
        let before = cell.out_of_room();
        let mut now = pause.is_out_of_room(&paths).await?;
        if before && now && has_room {
            pause.resume(&paths).await?;
            // Halted again at once, it is told of no second time.
            now = pause.is_out_of_room(&paths).await?;
        }
        if before == now {
            return Ok(());
        }
        let note = async |mut ctx: Ctx<Unlocked>| cell.lock(&mut ctx).await.set_out_of_room(live.vmm, now);
        self.locks().root("look at disks", note).await;
        if now {
            tracing::error!(vm = %cell.name(), "{OUT_OF_ROOM}");
            self.event(EventKind::DiskFailed, cell, None, OUT_OF_ROOM.to_owned());
        } else {
            self.event(EventKind::VmResumed, cell, None, "its disk has room again".to_owned());
        }
        Ok(())
    }

    async fn look_at_disks(&self, told: &mut Told) {
        let up: Vec<_> = self.all().into_iter().filter(|cell| cell.live().is_some()).collect();
        told.given_up.retain(|id| up.iter().any(|cell| cell.id() == id));
        // With nobody up, nothing grows.
        if up.is_empty() {
            return;
        }
        let free_bytes = vm_disk::free_bytes(&self.inner.layout.state.join("vms"));
        let has_room = free_bytes.as_ref().is_ok_and(|bytes| *bytes >= ROOM_BYTES);
        match free_bytes {
            Ok(free_bytes) => {
                if let Some(message) = told.look(free_bytes) {
                    tracing::warn!("{message}");
                    self.inner.events.record(EventKind::DiskLow, None, None, message);
                }
            }
            Err(error) => tracing::warn!(%error, "the room of VMs' disks cannot be looked at"),
        }
        for cell in up {
            if let Err(error) = self.look_at_halt(&cell, has_room).await {
                tracing::debug!(vm = %cell.name(), error = %error.chain(), "its VMM does not say how it does");
            }
            let is_delta =
                self.inner.host.cow.backend() == Backend::DmSnapshot || cell.paths().disk_delta().exists();
            if !is_delta {
                continue;
            }
            match self.inner.host.cow.fill(&self.device_of(cell.id())).await {
                Ok(Some(fill)) if fill.invalid => {
                    if !told.given_up.insert(cell.id().clone()) {
                        continue;
                    }
                    let message = "its disk had no room on the host and was given up: free some space there, then stop and \
                                   start the VM; what was written before is there";
                    tracing::error!(vm = %cell.name(), "{message}");
                    self.event(EventKind::DiskFailed, &cell, None, message.to_owned());
                }
                Ok(_) => drop(told.given_up.remove(cell.id())),
                Err(error) => tracing::warn!(vm = %cell.name(), %error, "its disk cannot be looked at"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn each_threshold_is_told_once_until_there_is_room_again() {
        let mut told = Told::default();
        assert_eq!(told.look(20 * GIB), None);
        assert!(told.look(7 * GIB).unwrap().contains("7168 MiB"));
        // Up and down around it.
        for free in [7 * GIB, 8 * GIB, 9 * GIB, 7 * GIB] {
            assert_eq!(told.look(free), None, "{free}");
        }
        // Two at once are one message.
        assert!(told.look(GIB / 4).is_some());
        assert_eq!(told.look(GIB / 3), None);
        assert_eq!(told.look(20 * GIB), None);
        assert!(told.look(7 * GIB).is_some());
    }
}
