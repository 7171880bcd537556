//! Making a VM: image and kernel at hand, then name and address, then keys and disk.

use std::{collections::BTreeMap, sync::Arc};

use vm_locks::{Ctx, Unlocked};
use vm_types::{
    Effect, EventKind, OperationId, VmId, VmName,
    id::InvalidId,
    image::{ImageRecord, KernelRecord},
    operation::OperationKind,
    plugin::VmFacts,
    vm::{FailedAt, NetworkMode, Owner, RestartPolicy, VmRecord, VmSpec, VmmKind},
};

use super::{
    cell::{Activity, Cell, Reserved},
    disk_limits::LimitsRequest,
    now,
};
use crate::{Engine, EngineError, admission::Reservation, journal::Phase, keys, ops::OpContext};

/// What was asked for; `None` means the configuration's.
#[derive(Debug, Clone, Default)]
pub struct CreateRequest {
    /// Made up if absent.
    pub name: Option<VmName>,
    /// Reference or digest.
    pub image: Option<String>,
    /// Id or release.
    pub kernel: Option<String>,
    /// At least 1.
    pub cpus: Option<u32>,
    /// MiB.
    pub memory_mib: Option<u64>,
    /// Bytes.
    pub disk_bytes: Option<u64>,
    /// Of the root disk.
    pub disk_limits: LimitsRequest,
    /// NAT if absent.
    pub network: Option<NetworkMode>,
    /// Free-form.
    pub labels: BTreeMap<String, String>,
    /// Delete the VM when this process ends.
    pub owner: Option<Owner>,
    /// Never, if absent.
    pub restart: Option<RestartPolicy>,
    /// Delete it when it is this many seconds old; 0 means never.
    pub ttl_seconds: Option<u64>,
    /// Stop it after this many idle seconds; 0 means never.
    pub idle_stop_seconds: Option<u64>,
    /// What runs it; the daemon's choice if absent.
    pub vmm: Option<VmmKind>,
    /// Start it too.
    pub start: bool,
}

/// Bounds that no machine of ours goes beyond.
const CPUS_MAX: u32 = 255;
const MEMORY_MIN_MIB: u64 = 64;
const MEMORY_MAX_MIB: u64 = 1 << 24;
const DISK_MAX: u64 = 16 << 40;
/// No clock of ours goes beyond it.
const SECONDS_MAX: u64 = 100 * 365 * 24 * 3600;

/// Image and kernel are at hand and all is decided; nothing was made.
struct Settled {
    id: VmId,
    spec: VmSpec,
    /// Until the VM itself is found by whoever counts.
    _room: Reservation,
}

/// Written down with id, name and address, found by everybody, and ours alone.
struct Registered {
    reserved: Reserved,
}

impl Engine {
    /// Makes a VM in an operation of its own.
    ///
    /// # Errors
    /// What can be told at once: arguments that do not fit, a taken name.
    pub fn create(&self, request: CreateRequest) -> Result<OperationId, EngineError> {
        check(&request)?;
        if let Some(kind) = request.vmm {
            self.inner.vmm.get(kind)?;
        }
        let name = match &request.name {
            Some(name) => name.clone(),
            None => self.make_up_name()?,
        };
        if self.cells().values().any(|cell| *cell.name() == name) {
            return Err(vm_store::StoreError::NameTaken { name }.into());
        }
        let promised = self.admit_request(&name, &request)?;
        let engine = self.clone();
        let operation = self.operations().begin(
            OperationKind::VmCreate,
            name.to_string(),
            move |context, mut ctx| async move {
                let _promised = promised;
                engine.create_now(&mut ctx, name, request, context).await
            },
        )?;
        Ok(operation.id())
    }

    /// Makes a VM as part of another operation. Undone if that is cancelled meanwhile.
    ///
    /// # Errors
    /// As of [`Self::create`] and its operation.
    pub(crate) async fn create_as(
        &self,
        ctx: &mut Ctx<Unlocked>,
        name: &str,
        request: CreateRequest,
        context: &OpContext,
    ) -> Result<Arc<Cell>, EngineError> {
        check(&request)?;
        let name: VmName =
            name.parse().map_err(|error: InvalidId| EngineError::Panicked { detail: error.to_string() })?;
        let _promised = self.admit_request(&name, &request)?;
        let id = self.create_now(ctx, name.clone(), request, context.clone()).await?;
        self.by_id(&id).ok_or_else(|| EngineError::NotFound {
            what: "VM",
            name: name.to_string(),
            hint: "somebody has just deleted it".into(),
        })
    }

    async fn create_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        name: VmName,
        request: CreateRequest,
        context: OpContext,
    ) -> Result<VmId, EngineError> {
        let ephemeral = request.owner.is_some();
        let start = request.start;
        let settled = context.cancellable(Box::pin(Settled::new(self, ctx, name, request, &context))).await?;
        // From the record on, giving up means undoing, so this short step is not cancellable.
        let cell = settled.register(self, ctx, &context).await?.make(self, ctx, &context).await?;
        self.event(EventKind::VmCreated, &cell, Some(context.id), format!("created from {}", cell.image()));
        self.watch_owner(&cell);
        if start && let Err(error) = self.start_now(ctx, &cell, &context).await {
            // Nobody will come back for it, unless another operation has just taken it over.
            let given_up = matches!(error, EngineError::Cancelled) && !context.preempted();
            if (ephemeral || given_up)
                && let Err(undo) = self.delete_now(ctx, &cell, true, context.id).await
            {
                tracing::warn!(vm = %cell.name(), error = %undo.chain(), "it could not be deleted");
            }
            return Err(error);
        }
        Ok(cell.id().clone())
    }

    /// What plugins would be told of a VM that is asked for, with an id that no VM has. Nothing is changed and nothing acquired.
    ///
    /// # Errors
    /// As of [`Self::create`], and [`EngineError::NotFound`] for an image or kernel that would have to be acquired first.
    pub async fn facts_of_request(&self, request: CreateRequest) -> Result<VmFacts, EngineError> {
        check(&request)?;
        let name = match &request.name {
            Some(name) => name.clone(),
            None => self.make_up_name()?,
        };
        if self.cells().values().any(|cell| *cell.name() == name) {
            return Err(vm_store::StoreError::NameTaken { name }.into());
        }
        let image = self.image_at_hand(self.image_of(&request)).await?;
        let own = image.kernel.as_ref().map(ToString::to_string);
        let kernel = self.kernel_at_hand(request.kernel.as_deref().or(own.as_deref())).await?;
        let spec = self.spec_of(name, request, image, kernel)?;
        let address = match spec.network {
            NetworkMode::Nat => Some(self.next_address().await?),
            NetworkMode::None => None,
        };
        self.facts_of(&fresh_id()?, &spec, address).await
    }

    fn image_of<'a>(&'a self, request: &'a CreateRequest) -> &'a str {
        request.image.as_deref().unwrap_or(&self.inner.settings.default_image)
    }

    /// What a VM would be, with the configuration's defaults.
    fn spec_of(
        &self,
        name: VmName,
        request: CreateRequest,
        image: ImageRecord,
        kernel: KernelRecord,
    ) -> Result<VmSpec, EngineError> {
        let settings = &self.inner.settings;
        let reference = self.image_of(&request).to_owned();
        let disk_bytes = match request.disk_bytes {
            Some(bytes) if bytes < image.size_bytes => {
                return Err(EngineError::InvalidArgument {
                    message: format!("a disk of {bytes} bytes cannot hold image {reference}"),
                    hint: format!("it takes at least {} MiB", image.size_bytes.div_ceil(1 << 20)),
                });
            }
            Some(bytes) => bytes.next_multiple_of(1 << 20),
            None => settings.default_disk_bytes.max(image.size_bytes),
        };
        Ok(VmSpec {
            name,
            image_reference: reference,
            image: image.digest,
            kernel: kernel.id,
            cpus: request.cpus.unwrap_or(settings.default_cpus),
            memory_mib: request.memory_mib.unwrap_or(settings.default_memory_mib),
            disk_bytes,
            disk_limits: request.disk_limits.over(settings.default_disk_limits),
            network: request.network.unwrap_or_default(),
            labels: request.labels,
            owner: request.owner,
            restart: request.restart.unwrap_or_default(),
            idle_stop_seconds: request.idle_stop_seconds.filter(|seconds| *seconds > 0),
            expires_at: request
                .ttl_seconds
                .filter(|seconds| *seconds > 0)
                .map(|ttl| now().saturating_add(ttl)),
            vmm: request.vmm,
        })
    }

    fn make_up_name(&self) -> Result<VmName, EngineError> {
        let name = format!("vm-{}", keys::random_hex(3)?);
        name.parse().map_err(|error: InvalidId| EngineError::Panicked { detail: error.to_string() })
    }
}

impl Settled {
    /// Settles what the VM will be; acquires image and kernel if need be.
    async fn new(
        engine: &Engine,
        ctx: &mut Ctx<Unlocked>,
        name: VmName,
        request: CreateRequest,
        context: &OpContext,
    ) -> Result<Self, EngineError> {
        let image = engine.require_image(ctx, engine.image_of(&request), context).await?;
        engine.check_base(&image.digest).await?;
        let own = image.kernel.as_ref().map(ToString::to_string);
        let kernel =
            engine.require_kernel(ctx, request.kernel.as_deref().or(own.as_deref()), context).await?;
        let base = engine.inner.layout.image_rootfs(&image.digest);
        let spec = engine.spec_of(name, request, image, kernel)?;
        let room = engine.admit_create(&spec.name, spec.disk_bytes, &base)?;
        let id = fresh_id()?;
        // Asked now, and once more at each start: nothing is made of what must not be.
        if let Some(mut asked) = engine.ask_about(&id, &spec, None, "create").await? {
            engine.preflight(ctx, &mut asked).await?;
        }
        Ok(Self { id, spec, _room: room })
    }

    /// Gives the VM its id and address and writes it down as begun.
    async fn register(
        self,
        engine: &Engine,
        ctx: &mut Ctx<Unlocked>,
        context: &OpContext,
    ) -> Result<Registered, EngineError> {
        let mut names = ctx.lock(&engine.inner.create).await;
        let address = match self.spec.network {
            NetworkMode::Nat => Some(engine.free_address().await?),
            NetworkMode::None => None,
        };
        let record = VmRecord {
            id: self.id,
            spec: self.spec,
            address,
            created_at: now(),
            complete: false,
            wanted_running: false,
            failure: None,
        };
        let cell = engine.new_cell(record.clone())?;
        let reserved = Reserved::new(&cell, Activity::Creating, context.id);
        if let Err(error) = engine.inner.store.vms().insert(record).await {
            cell.scope.close(names.ctx()).await?;
            return Err(error.into());
        }
        engine.publish(&cell);
        Ok(Registered { reserved })
    }
}

impl Registered {
    /// Makes what the VM is made of, or leaves nothing of it. What cannot be undone keeps the record, so that the VM can
    /// still be deleted.
    async fn make(
        self,
        engine: &Engine,
        ctx: &mut Ctx<Unlocked>,
        context: &OpContext,
    ) -> Result<Arc<Cell>, EngineError> {
        let cell = self.reserved.cell().clone();
        match context.cancellable(engine.make(ctx, &cell, context)).await {
            Ok(()) => Ok(cell),
            Err(error) => {
                if let Err(undo) = engine.remove_all(ctx, &cell).await {
                    tracing::warn!(vm = %cell.name(), error = %undo.chain(), "its creation could not be undone");
                    engine.note_failure(ctx, &cell, FailedAt::Create, &undo).await;
                }
                Err(error)
            }
        }
    }
}

impl Engine {
    /// Keys and disk.
    async fn make(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        let record = cell.record();
        let paths = cell.paths();
        context.progress("making the disk", 0, None);
        cell.scope
            .apply(ctx, Effect::Directory { path: paths.state.clone(), mode: 0o700 }, Phase::Create)
            .await?;
        let (host_key, _) = keys::generate(record.spec.name.as_str())?;
        let key = Effect::File { path: paths.host_key(), mode: 0o600, content: host_key.into_bytes() };
        cell.scope.apply(ctx, key, Phase::Create).await?;
        cell.scope.apply(ctx, self.new_disk(&record, &paths), Phase::Create).await?;
        self.check_base(&record.spec.image).await?;
        cell.scope.settle(ctx).await;
        let mut writer = cell.lock(ctx).await;
        self.inner.store.vms().set_complete(cell.id()).await?;
        writer.change_record(|record| record.complete = true);
        Ok(())
    }
}

fn fresh_id() -> Result<VmId, EngineError> {
    keys::random_hex(6)?
        .parse()
        .map_err(|error: InvalidId| EngineError::Panicked { detail: error.to_string() })
}

fn check(request: &CreateRequest) -> Result<(), EngineError> {
    check_shape(request.cpus, request.memory_mib, request.disk_bytes)?;
    check_times([request.ttl_seconds, request.idle_stop_seconds])?;
    request.disk_limits.check()
}

/// Bounds of times in seconds.
pub(super) fn check_times<const N: usize>(times: [Option<u64>; N]) -> Result<(), EngineError> {
    match times.into_iter().flatten().find(|seconds| *seconds > SECONDS_MAX) {
        None => Ok(()),
        Some(seconds) => Err(EngineError::InvalidArgument {
            message: format!("{seconds} seconds are too long"),
            hint: format!("{SECONDS_MAX} (a hundred years) are the most; leave it out for ever"),
        }),
    }
}

/// Bounds of what a machine can be; `None` is not looked at.
pub(super) fn check_shape(
    cpus: Option<u32>,
    memory_mib: Option<u64>,
    disk_bytes: Option<u64>,
) -> Result<(), EngineError> {
    let bad = |message: String, hint: String| Err(EngineError::InvalidArgument { message, hint });
    match (cpus, memory_mib, disk_bytes) {
        (Some(cpus), ..) if !(1..=CPUS_MAX).contains(&cpus) => {
            bad(format!("{cpus} CPUs are not possible"), format!("1 to {CPUS_MAX} are"))
        }
        (_, Some(memory), _) if memory < MEMORY_MIN_MIB => bad(
            format!("{memory} MiB of memory are too little to boot"),
            format!("give at least {MEMORY_MIN_MIB}M; 512M is a good beginning"),
        ),
        (_, Some(memory), _) if memory > MEMORY_MAX_MIB => {
            bad(format!("{memory} MiB of memory are not possible"), "16T is the most".into())
        }
        (.., Some(bytes)) if bytes > DISK_MAX => {
            bad(format!("a disk of {bytes} bytes is too large"), "16T is the most".into())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_no_machine_has_are_refused() {
        assert!(check_shape(Some(2), Some(1 << 24), Some(DISK_MAX)).is_ok());
        for (shape, said) in [
            ((Some(0), None, None), "0 CPUs"),
            ((None, Some(63), None), "63 MiB of memory are too little"),
            ((None, Some((1 << 24) + 1), None), "16777217 MiB of memory are not possible"),
            ((None, Some(u64::MAX), None), "of memory are not possible"),
            ((None, None, Some(DISK_MAX + 1)), "is too large"),
        ] {
            let (cpus, memory, disk) = shape;
            let error = check_shape(cpus, memory, disk).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
