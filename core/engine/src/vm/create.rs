//! Making a VM: image and kernel at hand, then name and address, then keys and disk.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use vm_types::{
    Effect, OperationId, VmId, VmName,
    id::InvalidId,
    operation::OperationKind,
    vm::{FailedAt, NetworkMode, Owner, VmRecord, VmSpec},
};

use super::cell::{Activity, Cell, Reserved};
use crate::{
    Engine, EngineError,
    journal::Phase,
    keys,
    ops::{OpContext, Outcome},
};

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
    /// NAT if absent.
    pub network: Option<NetworkMode>,
    /// Free-form.
    pub labels: BTreeMap<String, String>,
    /// Delete the VM when this process ends.
    pub owner: Option<Owner>,
    /// Start it too.
    pub start: bool,
}

/// Bounds that no machine of ours goes beyond.
const CPUS_MAX: u32 = 255;
const MEMORY_MIN_MIB: u64 = 64;
const DISK_MAX: u64 = 16 << 40;

impl Engine {
    /// Makes a VM in an operation of its own.
    ///
    /// # Errors
    /// What can be told at once: arguments that do not fit, a taken name.
    pub fn create(&self, request: CreateRequest) -> Result<OperationId, EngineError> {
        check(&request)?;
        let name = match &request.name {
            Some(name) => name.clone(),
            None => self.make_up_name()?,
        };
        if self.cells().values().any(|cell| *cell.name() == name) {
            return Err(vm_store::StoreError::NameTaken { name }.into());
        }
        let engine = self.clone();
        self.operations()
            .begin(OperationKind::VmCreate, name.to_string(), move |context, _locks| async move {
                engine.create_now(name, request, context).await
            })
            .map(|operation| operation.id())
    }

    async fn create_now(
        &self,
        name: VmName,
        request: CreateRequest,
        context: OpContext,
    ) -> Result<Outcome, EngineError> {
        let ephemeral = request.owner.is_some();
        let start = request.start;
        let spec = context.cancellable(self.settle(name, request, &context)).await?;
        // From the record on, giving up means undoing, so this short step is not cancellable.
        let (cell, reserved) = self.register(spec, &context).await?;
        let made = context.cancellable(self.make(&cell, &context)).await;
        if let Err(error) = made {
            // What cannot be undone keeps the record, so that the VM can still be deleted.
            if let Err(undo) = self.remove_all(&cell).await {
                tracing::warn!(vm = %cell.name(), error = %undo.chain(), "its creation could not be undone");
                self.note_failure(&cell, FailedAt::Create, &undo).await;
            }
            return Err(error);
        }
        drop(reserved);
        self.watch_owner(&cell);
        if start && let Err(error) = self.start_now(&cell, &context).await {
            // Nobody will come back for it, unless another operation has just taken it over.
            let given_up = matches!(error, EngineError::Cancelled) && !context.preempted();
            if (ephemeral || given_up)
                && let Err(undo) = self.delete_now(&cell, true, context.id).await
            {
                tracing::warn!(vm = %cell.name(), error = %undo.chain(), "it could not be deleted");
            }
            return Err(error);
        }
        Ok(Outcome::Vm(cell.id().clone()))
    }

    /// Settles what the VM will be; acquires image and kernel if need be.
    async fn settle(
        &self,
        name: VmName,
        request: CreateRequest,
        context: &OpContext,
    ) -> Result<VmSpec, EngineError> {
        let settings = &self.inner.settings;
        let reference = request.image.unwrap_or_else(|| settings.default_image.clone());
        let image = self.require_image(&reference, context).await?;
        let kernel = self.require_kernel(request.kernel.as_deref(), context).await?;
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
            network: request.network.unwrap_or_default(),
            labels: request.labels,
            owner: request.owner,
            restart: Default::default(),
            idle_stop_seconds: None,
            expires_at: None,
        })
    }

    /// Gives the VM its id and address and writes it down as begun.
    async fn register(
        &self,
        spec: VmSpec,
        context: &OpContext,
    ) -> Result<(Arc<Cell>, Reserved), EngineError> {
        let _one_at_a_time = self.inner.create.lock().await;
        let address = match spec.network {
            NetworkMode::Nat => Some(self.free_address().await?),
            NetworkMode::None => None,
        };
        let id: VmId = keys::random_hex(6)?
            .parse()
            .map_err(|error: InvalidId| EngineError::Panicked { detail: error.to_string() })?;
        let record = VmRecord {
            id,
            spec,
            address,
            created_at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            complete: false,
            wanted_running: false,
            failure: None,
        };
        let cell = self.new_cell(record.clone())?;
        let reserved = cell.reserve(Activity::Creating, context.id)?;
        if let Err(error) = self.inner.store.vms().insert(record).await {
            cell.scope.close().await?;
            return Err(error.into());
        }
        self.publish(&cell);
        Ok((cell, reserved))
    }

    /// Keys and disk.
    async fn make(&self, cell: &Cell, context: &OpContext) -> Result<(), EngineError> {
        let record = cell.record();
        let paths = cell.paths();
        context.progress("making the disk", 0, None);
        cell.scope.apply(Effect::Directory { path: paths.state.clone(), mode: 0o700 }, Phase::Create).await?;
        let (host_key, _) = keys::generate(record.spec.name.as_str())?;
        let key = Effect::File { path: paths.host_key(), mode: 0o600, content: host_key.into_bytes() };
        cell.scope.apply(key, Phase::Create).await?;
        let disk = Effect::CowDisk {
            base: self.inner.layout.image_rootfs(&record.spec.image),
            path: paths.disk(),
            size_bytes: record.spec.disk_bytes,
        };
        cell.scope.apply(disk, Phase::Create).await?;
        self.inner.store.vms().set_complete(cell.id()).await?;
        cell.change_record(|record| record.complete = true);
        Ok(())
    }

    fn make_up_name(&self) -> Result<VmName, EngineError> {
        let name = format!("vm-{}", keys::random_hex(3)?);
        name.parse().map_err(|error: InvalidId| EngineError::Panicked { detail: error.to_string() })
    }
}

fn check(request: &CreateRequest) -> Result<(), EngineError> {
    let bad = |message: String, hint: String| Err(EngineError::InvalidArgument { message, hint });
    match request.cpus {
        Some(cpus) if !(1..=CPUS_MAX).contains(&cpus) => {
            return bad(format!("{cpus} CPUs are not possible"), format!("1 to {CPUS_MAX} are"));
        }
        _ => {}
    }
    match request.memory_mib {
        Some(memory) if memory < MEMORY_MIN_MIB => {
            return bad(
                format!("{memory} MiB of memory are too little to boot"),
                format!("give at least {MEMORY_MIN_MIB}M; 512M is a good beginning"),
            );
        }
        _ => {}
    }
    match request.disk_bytes {
        Some(bytes) if bytes > DISK_MAX => {
            return bad(format!("a disk of {bytes} bytes is too large"), "16T is the most".into());
        }
        _ => {}
    }
    Ok(())
}
