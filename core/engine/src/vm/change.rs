//! Changing a VM: its shape, its labels and its policies; pausing it and letting it run.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use vm_locks::{Ctx, Unlocked};
use vm_types::{
    EventKind, OperationId, VmId,
    operation::OperationKind,
    vm::{RestartPolicy, VmSpec},
};

use super::{
    cell::{Activity, Admitted, Cell},
    create::{check_shape, check_times},
    disk_limits::LimitsRequest,
    guest::ROOT_SERIAL,
    now, start,
    state::Request,
};
use crate::{
    Engine, EngineError,
    ops::{OpContext, VmChanged},
};

/// How long a guest may take to grow its filesystem.
const GROW: Duration = Duration::from_secs(120);

/// What to change; what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct SetRequest {
    /// At least 1; a running VM has them after its next start.
    pub cpus: Option<u32>,
    /// MiB; a running VM has it after its next start.
    pub memory_mib: Option<u64>,
    /// Bytes; only ever more.
    pub disk_bytes: Option<u64>,
    /// Of the root disk; a running VM has them after its next start.
    pub disk_limits: LimitsRequest,
    /// `None` removes a label.
    pub labels: BTreeMap<String, Option<String>>,
    /// See there.
    pub restart: Option<RestartPolicy>,
    /// From now; 0 means never.
    pub ttl_seconds: Option<u64>,
    /// 0 means never.
    pub idle_stop_seconds: Option<u64>,
    /// It stays though the process that it was made for ends.
    pub keep: bool,
}

impl SetRequest {
    /// The specification with the changes, the disk's size aside.
    fn apply_to(&self, spec: &mut VmSpec) {
        if let Some(cpus) = self.cpus {
            spec.cpus = cpus;
        }
        if let Some(memory_mib) = self.memory_mib {
            spec.memory_mib = memory_mib;
        }
        spec.disk_limits = self.disk_limits.over(spec.disk_limits);
        for (label, value) in &self.labels {
            match value {
                Some(value) => drop(spec.labels.insert(label.clone(), value.clone())),
                None => drop(spec.labels.remove(label)),
            }
        }
        if let Some(restart) = self.restart {
            spec.restart = restart;
        }
        if let Some(ttl) = self.ttl_seconds {
            spec.expires_at = (ttl > 0).then(|| now().saturating_add(ttl));
        }
        if let Some(idle) = self.idle_stop_seconds {
            spec.idle_stop_seconds = (idle > 0).then_some(idle);
        }
        if self.keep {
            spec.owner = None;
        }
    }
}

/// What became of a VMM that somebody ends meanwhile is no failure of the host's.
fn overtaken(cell: &Cell, context: &OpContext, result: Result<(), EngineError>) -> Result<(), EngineError> {
    match result {
        Err(_) if context.preempted() || cell.end_expected() => Err(EngineError::Cancelled),
        result => result,
    }
}

/// Names of the settings in which two specifications differ.
fn differences(before: &VmSpec, after: &VmSpec) -> Vec<&'static str> {
    [
        ("cpus", before.cpus != after.cpus),
        ("memory", before.memory_mib != after.memory_mib),
        ("disk", before.disk_bytes != after.disk_bytes),
        ("disk-bandwidth", before.disk_limits.bytes_per_second != after.disk_limits.bytes_per_second),
        ("disk-iops", before.disk_limits.operations_per_second != after.disk_limits.operations_per_second),
        ("labels", before.labels != after.labels),
        ("restart", before.restart != after.restart),
        ("ttl", before.expires_at != after.expires_at),
        ("idle-stop", before.idle_stop_seconds != after.idle_stop_seconds),
        ("owner", before.owner != after.owner),
    ]
    .into_iter()
    .filter_map(|(name, differs)| differs.then_some(name))
    .collect()
}

impl Engine {
    /// Changes a VM in an operation of its own.
    ///
    /// # Errors
    /// A shape that cannot be, or a smaller disk.
    pub fn set(&self, cell: Arc<Cell>, request: SetRequest) -> Result<OperationId, EngineError> {
        check_shape(request.cpus, request.memory_mib, request.disk_bytes)?;
        check_times([request.ttl_seconds, request.idle_stop_seconds])?;
        request.disk_limits.check()?;
        let has = cell.with_record(|record| record.spec.disk_bytes);
        if let Some(wanted) = request.disk_bytes.filter(|wanted| *wanted < has) {
            return Err(EngineError::InvalidArgument {
                message: format!("a disk of {} MiB cannot shrink to {} MiB", has >> 20, wanted >> 20),
                hint: format!(
                    "it only grows; make a new VM for a smaller one, or give more than {} MiB",
                    has >> 20
                ),
            });
        }
        start::refuse(&cell, Request::Set)?;
        let engine = self.clone();
        let operation = self.operations().begin(
            OperationKind::VmSet,
            cell.name().to_string(),
            move |context, mut ctx| async move { engine.set_now(&mut ctx, &cell, request, &context).await },
        )?;
        Ok(operation.id())
    }

    async fn set_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        request: SetRequest,
        context: &OpContext,
    ) -> Result<VmChanged, EngineError> {
        let admitted = self.reserve(ctx, cell, Request::Set, Activity::Changing, context.id).await?;
        let Admitted::Reserved(_reserved) = admitted else {
            return Ok(VmChanged { vm: cell.id().clone(), needs_restart: cell.needs_restart() });
        };
        let mut _room = None;
        let disk_bytes = match request.disk_bytes.map(|bytes| bytes.next_multiple_of(1 << 20)) {
            Some(bytes) if bytes > cell.with_record(|record| record.spec.disk_bytes) => {
                context.progress("growing the disk", 0, None);
                _room = Some(self.admit_growth(cell, bytes)?);
                self.grow_disk(ctx, cell, bytes).await?;
                Some(bytes)
            }
            _ => None,
        };
        self.write_spec(ctx, cell, &request, disk_bytes, context).await?;
        // Last: whatever becomes of it, the disk has its size, and the filesystem follows at the next boot at the latest.
        if let (Some(bytes), true) = (disk_bytes, cell.live().is_some()) {
            context.progress("growing the filesystem", 0, None);
            context.cancellable(self.grow_root(ctx, cell, bytes)).await?;
        }
        Ok(VmChanged { vm: cell.id().clone(), needs_restart: cell.needs_restart() })
    }

    async fn write_spec(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        request: &SetRequest,
        disk_bytes: Option<u64>,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        let mut writer = cell.lock(ctx).await;
        let mut spec = cell.record().spec;
        request.apply_to(&mut spec);
        if let Some(bytes) = disk_bytes {
            spec.disk_bytes = bytes;
        }
        let changes = differences(&cell.record().spec, &spec);
        if !changes.is_empty() {
            self.inner.store.vms().set_spec(cell.id(), spec.clone()).await?;
            writer.change_record(|record| record.spec = spec);
            drop(writer);
            let message = format!("changed: {}", changes.join(", "));
            self.event(EventKind::VmChanged, cell, Some(context.id), message);
        }
        Ok(())
    }

    /// Grows the root disk; of a VM that runs, the drive.
    async fn grow_disk(&self, ctx: &mut Ctx<Unlocked>, cell: &Cell, bytes: u64) -> Result<(), EngineError> {
        if cell.live().is_none() {
            return self.grow_file(ctx, cell, bytes).await;
        }
        if cell.paused() {
            return Err(EngineError::InvalidArgument {
                message: format!("VM {} is paused: its guest cannot grow its filesystem", cell.name()),
                hint: format!("let it run first: `vm resume {}`", cell.name()),
            });
        }
        let resize = self.vmm_of(cell)?.require_resize()?;
        self.grow_device(ctx, cell, bytes).await?;
        Ok(resize.grow_disk(&cell.paths(), ROOT_SERIAL, bytes).await?)
    }

    async fn grow_root(&self, _: &mut Ctx<Unlocked>, cell: &Cell, bytes: u64) -> Result<(), EngineError> {
        let grown = async {
            let (mut control, _) = vm_shim::connect_control(&cell.paths(), GROW).await?;
            control.grow_root(bytes, GROW).await
        };
        let bytes =
            grown.await.map_err(|source| EngineError::Guest { what: "grow its filesystem", source })?;
        tracing::info!(vm = %cell.name(), bytes, "its root filesystem has grown");
        Ok(())
    }

    /// Halts a VM's CPUs in an operation of its own.
    ///
    /// # Errors
    /// One that is off, or a VMM that cannot do that.
    pub fn pause(&self, cell: Arc<Cell>) -> Result<OperationId, EngineError> {
        start::refuse(&cell, Request::Pause)?;
        self.vmm_of(&cell)?.require_pause()?;
        let engine = self.clone();
        let begun = self.operations().begin(
            OperationKind::VmPause,
            cell.name().to_string(),
            move |context, mut ctx| async move {
                let ctx = &mut ctx;
                let admitted =
                    engine.reserve(ctx, &cell, Request::Pause, Activity::Changing, context.id).await?;
                if let Admitted::Reserved(_reserved) = admitted {
                    let paused = engine.vmm_of(&cell)?.require_pause()?.pause(&cell.paths()).await;
                    overtaken(&cell, &context, paused.map_err(Into::into))?;
                    let before = cell.paused();
                    cell.lock(ctx).await.set_paused(true);
                    if !before {
                        engine.event(EventKind::VmPaused, &cell, Some(context.id), "paused".into());
                    }
                }
                Ok::<VmId, EngineError>(cell.id().clone())
            },
        )?;
        Ok(begun.id())
    }

    /// Lets a paused VM run in an operation of its own.
    ///
    /// # Errors
    /// One that is off.
    pub fn resume(&self, cell: Arc<Cell>) -> Result<OperationId, EngineError> {
        start::refuse(&cell, Request::Resume)?;
        let engine = self.clone();
        let begun = self.operations().begin(
            OperationKind::VmResume,
            cell.name().to_string(),
            move |context, mut ctx| async move {
                let ctx = &mut ctx;
                let admitted =
                    engine.reserve(ctx, &cell, Request::Resume, Activity::Changing, context.id).await?;
                if let Admitted::Reserved(_reserved) = admitted {
                    let before = cell.paused();
                    let runs = engine.let_run(ctx, &cell).await;
                    overtaken(&cell, &context, runs)?;
                    if before {
                        engine.event(EventKind::VmResumed, &cell, Some(context.id), "resumed".into());
                    }
                }
                Ok::<VmId, EngineError>(cell.id().clone())
            },
        )?;
        Ok(begun.id())
    }

    pub(super) async fn let_run(&self, ctx: &mut Ctx<Unlocked>, cell: &Cell) -> Result<(), EngineError> {
        self.vmm_of(cell)?.require_pause()?.resume(&cell.paths()).await?;
        cell.lock(ctx).await.set_paused(false);
        Ok(())
    }
}
