//! Deleting a VM with all that was made for it, and deleting those whose owner has gone.

use std::sync::Arc;

use vm_host::process::PidFd;
use vm_locks::{Ctx, Unlocked};
use vm_types::{EventKind, OperationId, operation::OperationKind, vm::FailedAt};

use super::{
    cell::{Activity, Admitted, Cell},
    start,
    state::Request,
    stop::kill_at_once,
};
use crate::{Engine, EngineError, journal::Phase, ops::Operation};

/// Between two attempts to delete a VM whose owner has ended.
const RETRY: std::time::Duration = std::time::Duration::from_secs(5);

impl Engine {
    /// Deletes a VM in an operation of its own. With `force` one that is up or being worked on is ended first.
    ///
    /// # Errors
    /// [`EngineError::WrongState`] for one that is up, without `force`.
    pub fn delete(&self, cell: Arc<Cell>, force: bool) -> Result<Operation<()>, EngineError> {
        start::refuse(&cell, Request::Delete { force })?;
        let engine = self.clone();
        self.operations().begin(
            OperationKind::VmDelete,
            cell.name().to_string(),
            move |context, mut ctx| async move {
                context.progress("deleting", 0, None);
                engine.delete_now(&mut ctx, &cell, force, context.id).await
            },
        )
    }

    /// Cannot be cancelled: a half-deleted VM is of no use to anybody.
    pub(crate) async fn delete_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        force: bool,
        operation: OperationId,
    ) -> Result<(), EngineError> {
        let request = Request::Delete { force };
        // As for `kill`: whoever works on the VM sees its end and unwinds the sooner.
        let _killing = force.then(|| kill_at_once(cell));
        let admitted = match self.reserve(ctx, cell, request, Activity::Deleting, operation).await {
            // Its creation was called off, or somebody else has deleted it: gone it is.
            Err(EngineError::NotFound { .. }) => return Ok(()),
            admitted => admitted?,
        };
        let Admitted::Reserved(_reserved) = admitted else { return Ok(()) };
        if let Err(error) = self.remove_all(ctx, cell).await {
            self.note_failure(ctx, cell, FailedAt::Delete, &error).await;
            return Err(error);
        }
        self.event(EventKind::VmDeleted, cell, Some(operation), "deleted".into());
        Ok(())
    }

    /// Shows a failure from now on. That it cannot be written down is logged: the failure itself is what its caller must know.
    pub(crate) async fn note_failure(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        at: FailedAt,
        error: &EngineError,
    ) {
        let failure = Some((at, error.chain()));
        {
            let mut writer = cell.lock(ctx).await;
            writer.change_record(|record| record.failure = failure.clone());
            if let Err(error) = self.inner.store.vms().set_failure(cell.id(), failure).await {
                tracing::warn!(vm = %cell.name(), %error, "its failure could not be written down");
            }
        }
        self.event(EventKind::VmFailed, cell, None, error.chain());
    }

    /// Undoes all effects of a reserved VM, then forgets it.
    pub(crate) async fn remove_all(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
    ) -> Result<(), EngineError> {
        {
            // A daemon that dies from here on finds an incomplete VM and goes on removing it. Where even this cannot be written
            // (a full disk), removing is what makes room.
            let mut writer = cell.lock(ctx).await;
            writer.change_record(|record| {
                record.complete = false;
                record.wanted_running = false;
            });
            if let Err(error) = self.inner.store.vms().set_incomplete(cell.id()).await {
                tracing::warn!(vm = %cell.name(), %error, "the deletion could not be written down");
            }
        }
        let unwound = self.unwind_run(ctx, cell).await;
        self.note_off(ctx, cell).await;
        unwound?;
        cell.scope.unwind(ctx, Phase::Create).await?;
        self.clean_up(ctx, cell, "deleted").await;
        cell.scope.close(ctx).await?;
        let mut writer = cell.lock(ctx).await;
        self.inner.store.vms().delete(cell.id()).await?;
        self.inner.hooks.forget(cell.id()).await;
        cell.set_gone(&mut writer);
        self.cells().remove(cell.id());
        Ok(())
    }

    /// Deletes the VM when the process that made it for itself has ended. Ends when the VM is gone.
    pub(crate) fn watch_owner(&self, cell: &Arc<Cell>) {
        let Some(owner) = cell.record().spec.owner else { return };
        let engine = self.clone();
        let gone = cell.gone();
        let id = cell.id().clone();
        // It holds no cell: that would keep a deleted VM's journal open for as long as its owner lives.
        let watch = async move {
            if owner.boot_id == engine.inner.boot_id {
                loop {
                    match PidFd::open(owner.process) {
                        Ok(None) => break,
                        Ok(Some(held)) if held.ended().await.is_ok() => break,
                        _ => {
                            tracing::error!(vm = %id, "its owner cannot be watched; trying again");
                            tokio::time::sleep(RETRY).await;
                        }
                    }
                }
            }
            while let Some(cell) = engine.by_id(&id) {
                if cell.with_record(|record| record.spec.owner.is_none()) {
                    // It was given up, and the VM kept.
                    return;
                }
                tracing::info!(vm = %cell.name(), owner = owner.process.pid, "deleted: its owner has ended");
                let Ok(operation) = engine.delete(cell, true) else { return };
                if operation.wait().await.is_err() {
                    tokio::time::sleep(RETRY).await;
                }
            }
        };
        tokio::spawn(async move {
            // Cancel-safe: `gone` ends only when there is nothing left to delete.
            tokio::select! {
                () = gone.cancelled() => {}
                () = watch => {}
            }
        });
    }
}
