//! A VM's root disk: a file, or a device that is put together of the image and what differs from it while the VM is up.

use std::path::PathBuf;

use vm_disk::Backend;
use vm_locks::{Ctx, Unlocked};
use vm_types::{Effect, VmId, VmPaths, vm::VmRecord};

use super::cell::Cell;
use crate::{Engine, EngineError, journal::Phase};

impl Engine {
    /// What the disk of a new VM is made by.
    pub(super) fn new_disk(&self, record: &VmRecord, paths: &VmPaths) -> Effect {
        self.disk_of(record, paths, self.inner.host.cow.backend() == Backend::DmSnapshot)
    }

    fn disk_of(&self, record: &VmRecord, paths: &VmPaths, delta: bool) -> Effect {
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
                self.check_base(&cell.record().spec.image).await?;
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
        let delta = self.disk_device(ctx, cell).await.is_some();
        let disk = self.disk_of(&cell.record(), &cell.paths(), delta);
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

impl Engine {
    /// A device of which nothing but the VM is known any more; enough to take it apart.
    pub(crate) fn device_of(&self, id: &VmId) -> Effect {
        let paths = self.inner.layout.vm(id);
        Effect::DmSnapshot {
            name: vm_disk::dm::device_name(&self.inner.instance, id),
            base: PathBuf::new(),
            delta: paths.disk_delta(),
            node: paths.disk_node(),
            size_bytes: 0,
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_disk::FakeCow;
    use vm_types::Observed;

    use super::*;
    use crate::{ports::NoHooks, testing::Bench};

    #[tokio::test]
    async fn a_disk_of_differences_is_put_together_for_a_run_and_its_file_stays() {
        let bench = Bench::over(Arc::new(NoHooks), 0, FakeCow::with(Backend::DmSnapshot)).await;
        let (engine, cell) = (&bench.engine, bench.cell(1));
        let (record, paths) = (cell.record(), cell.paths());
        let work = engine.locks().root("test", async |mut ctx| {
            let ctx = &mut ctx;
            let disk = engine.new_disk(&record, &paths);
            cell.scope.apply(ctx, disk, Phase::Create).await.unwrap();
            assert_eq!(engine.open_disk(ctx, &cell).await.unwrap(), paths.disk_node());
            assert_eq!(bench.cow.disks(), [paths.disk_delta(), paths.disk_node()]);
            let device = engine.disk_device(ctx, &cell).await.unwrap();
            engine.grow_device(ctx, &cell, 2 << 20).await.unwrap();
            engine.grow_file(ctx, &cell, 2 << 20).await.unwrap();
            // It is what it was for a journal that knows the former size.
            assert!(matches!(engine.inner.host.observe(&device).await.unwrap(), Observed::Present(_)));
            cell.scope.unwind(ctx, Phase::Start).await.unwrap();
            assert_eq!(bench.cow.disks(), [paths.disk_delta()]);
        });
        work.await;
    }

    #[tokio::test]
    async fn a_disk_that_is_a_file_stays_one_whatever_new_ones_are() {
        let bench = Bench::over(Arc::new(NoHooks), 0, FakeCow::with(Backend::DmSnapshot)).await;
        let (engine, cell) = (&bench.engine, bench.cell(1));
        let paths = cell.paths();
        let work = engine.locks().root("test", async |mut ctx| {
            let ctx = &mut ctx;
            let (base, path) = ("/base".into(), paths.disk());
            let disk = Effect::CowDisk { base, path, size_bytes: 1 << 20, delta: false };
            cell.scope.apply(ctx, disk, Phase::Create).await.unwrap();
            assert_eq!(engine.open_disk(ctx, &cell).await.unwrap(), paths.disk());
            assert_eq!(bench.cow.disks(), [paths.disk()]);
        });
        work.await;
    }
}
