//! A VM's root disk: a file, or a device that is put together of the image and what differs from it while the VM is up.

use std::path::PathBuf;

use vm_disk::Backend;
use vm_locks::{Ctx, Unlocked};
use vm_types::{Effect, VmPaths, vm::VmRecord};

use super::cell::Cell;
use crate::{Engine, EngineError, journal::Phase};

impl Engine {
    /// What the disk of a new VM is made by.
    pub(super) fn new_disk(&self, record: &VmRecord, paths: &VmPaths) -> Effect {
        let delta = self.inner.host.cow.backend() == Backend::DmSnapshot;
        Effect::CowDisk {
            base: self.inner.layout.image_rootfs(&record.spec.image),
            path: if delta { paths.disk_delta() } else { paths.disk() },
            size_bytes: record.spec.disk_bytes,
            delta,
        }
    }

    /// What the device of a VM's disk is made by; `None` where the disk is a file. That follows from how it was made, not from how
    /// new ones are.
    pub(super) async fn disk_device(&self, ctx: &mut Ctx<Unlocked>, cell: &Cell) -> Option<Effect> {
        let delta = cell.paths().disk_delta();
        let made =
            |effect: &Effect| matches!(effect, Effect::CowDisk { path, delta: true, .. } if *path == delta);
        let is_delta = cell.scope.look(ctx, |entries| entries.iter().any(|entry| made(&entry.effect))).await;
        is_delta.then(|| device(self, &cell.record(), &cell.paths()))
    }

    /// Makes what the VMM opens as root disk, and says where it is.
    ///
    /// # Errors
    /// The disk cannot be put together.
    pub(super) async fn open_disk(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
    ) -> Result<PathBuf, EngineError> {
        let paths = cell.paths();
        match self.disk_device(ctx, cell).await {
            Some(device) => {
                cell.scope.apply(ctx, device, Phase::Start).await?;
                Ok(paths.disk_node())
            }
            None => Ok(paths.disk()),
        }
    }

    /// Makes the disk of a VM that is off larger.
    ///
    /// # Errors
    /// The disk.
    pub(super) async fn grow_file(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        bytes: u64,
    ) -> Result<(), EngineError> {
        let (record, paths) = (cell.record(), cell.paths());
        let delta = self.disk_device(ctx, cell).await.is_some();
        let disk = Effect::CowDisk {
            base: self.inner.layout.image_rootfs(&record.spec.image),
            path: if delta { paths.disk_delta() } else { paths.disk() },
            size_bytes: record.spec.disk_bytes,
            delta,
        };
        Ok(self.inner.host.cow.grow(&disk, bytes).await?)
    }

    /// Makes the device below a VM that is up larger, where there is one; the VMM is told after that.
    ///
    /// # Errors
    /// The disk.
    pub(super) async fn grow_device(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        bytes: u64,
    ) -> Result<(), EngineError> {
        match self.disk_device(ctx, cell).await {
            Some(device) => Ok(self.inner.host.cow.grow(&device, bytes).await?),
            None => Ok(()),
        }
    }
}

fn device(engine: &Engine, record: &VmRecord, paths: &VmPaths) -> Effect {
    Effect::DmSnapshot {
        name: vm_disk::dm::device_name(&engine.inner.instance, &record.id),
        base: engine.inner.layout.image_rootfs(&record.spec.image),
        delta: paths.disk_delta(),
        node: paths.disk_node(),
        size_bytes: record.spec.disk_bytes,
    }
}
