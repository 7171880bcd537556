//! Deleting a VM with all that was made for it, and deleting those whose owner has gone.

use std::sync::Arc;

use vm_host::process::PidFd;
use vm_types::{OperationId, operation::OperationKind, vm::FailedAt};

use super::cell::{Activity, Cell, Reserved};
use crate::{Engine, EngineError, journal::Phase, ops::Outcome};

impl Engine {
    /// Deletes a VM in an operation of its own. With `force` one that is up or being worked on is ended first.
    ///
    /// # Errors
    /// [`EngineError::WrongState`] for one that is up, without `force`.
    pub fn delete(&self, cell: Arc<Cell>, force: bool) -> Result<OperationId, EngineError> {
        if cell.live().is_some() && !force {
            return Err(EngineError::WrongState {
                name: cell.name().clone(),
                state: cell.state().word(),
                wanted: "deleted",
            });
        }
        let engine = self.clone();
        Ok(self.operations().begin(
            OperationKind::VmDelete,
            cell.name().to_string(),
            move |context| async move {
                context.progress("deleting", 0, None);
                engine.delete_now(&cell, force, context.id).await?;
                Ok(Outcome::Done)
            },
        ))
    }

    /// Cannot be cancelled: a half-deleted VM is of no use to anybody.
    pub(crate) async fn delete_now(
        &self,
        cell: &Arc<Cell>,
        force: bool,
        operation: OperationId,
    ) -> Result<(), EngineError> {
        let _reserved = if force {
            self.take(cell, Activity::Deleting, operation).await?
        } else {
            cell.reserve(Activity::Deleting, operation)?
        };
        if cell.live().is_some() && !force {
            return Err(EngineError::WrongState {
                name: cell.name().clone(),
                state: "running",
                wanted: "deleted",
            });
        }
        if let Err(error) = self.remove_all(cell).await {
            let failure = Some((FailedAt::Delete, error.chain()));
            cell.set_failure(failure.clone());
            self.inner.store.vms().set_failure(cell.id(), failure).await?;
            return Err(error);
        }
        Ok(())
    }

    /// Undoes all effects of a reserved VM, then forgets it.
    pub(crate) async fn remove_all(&self, cell: &Arc<Cell>) -> Result<(), EngineError> {
        // A daemon that dies from here on finds an incomplete VM and goes on removing it.
        self.inner.store.vms().set_incomplete(cell.id()).await?;
        cell.scope.unwind(Phase::Start).await?;
        cell.set_live(None);
        cell.scope.unwind(Phase::Create).await?;
        cell.scope.close().await?;
        self.inner.store.vms().delete(cell.id()).await?;
        cell.set_deleted();
        self.cells().remove(cell.id());
        Ok(())
    }

    /// Reserves a VM even from another operation, which is cancelled and waited for.
    pub(crate) async fn take(
        &self,
        cell: &Arc<Cell>,
        activity: Activity,
        operation: OperationId,
    ) -> Result<Reserved, EngineError> {
        loop {
            match cell.reserve(activity, operation) {
                Err(EngineError::Busy { .. }) => {
                    if let Some(other) = cell.operation() {
                        // Ended between the two looks: nothing to cancel.
                        let _ = self.operations().cancel(other);
                    }
                    cell.free().await;
                }
                result => return result,
            }
        }
    }

    /// Deletes the VM when the process that made it for itself has ended.
    pub(crate) fn watch_owner(&self, cell: Arc<Cell>) {
        let Some(owner) = cell.record().spec.owner else { return };
        let engine = self.clone();
        tokio::spawn(async move {
            match PidFd::open(owner) {
                Ok(Some(held)) => {
                    if let Err(error) = held.ended().await {
                        tracing::error!(vm = %cell.name(), %error, "its owner cannot be watched");
                        return;
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(vm = %cell.name(), %error, "its owner cannot be watched");
                    return;
                }
            }
            if engine.find(cell.id().as_str()).is_ok() {
                tracing::info!(vm = %cell.name(), owner = owner.pid, "deleted: its owner has ended");
                let _ = engine.delete(cell, true);
            }
        });
    }
}
