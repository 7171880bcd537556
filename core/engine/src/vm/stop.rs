//! Stopping a VM, killing it, and what follows when a VMM ends by itself.
//!
//! ```text
//!   agent shuts the guest down ── grace ──> power button ──> kill
//! ```

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;
use vm_host::process;
use vm_types::{
    OperationId,
    guest::control::ShutdownKind,
    operation::OperationKind,
    vm::{ExitStatus, FailedAt},
};

use super::{
    cell::{Activity, Cell, Live},
    start,
};
use crate::{
    Engine, EngineError,
    journal::Phase,
    ops::{OpContext, Outcome},
};

/// How long an agent may take to answer that it shuts down.
const ANSWER: Duration = Duration::from_secs(10);

/// What a guest may take beyond its grace to kill what is left, unmount and power off: killed before, its filesystem is not clean.
const UNMOUNT: Duration = Duration::from_secs(15);
/// Between two attempts to watch or clean up after a VMM.
const RETRY: Duration = Duration::from_secs(1);

impl Engine {
    /// Shuts a VM down in an operation of its own; one that is off already is left so.
    ///
    /// # Errors
    /// [`EngineError::ShuttingDown`].
    pub fn stop(&self, cell: Arc<Cell>, grace: Option<Duration>) -> Result<OperationId, EngineError> {
        let engine = self.clone();
        self.operations()
            .begin(OperationKind::VmStop, cell.name().to_string(), move |context, _locks| async move {
                let grace = grace.unwrap_or(engine.inner.settings.stop_grace);
                let _reserved = cell.reserve(Activity::Stopping, context.id)?;
                if let Some(live) = cell.live() {
                    let down = engine.shut_guest_down(&cell, live, grace, &context);
                    context.cancellable(down).await?;
                    engine.finish(&cell, None).await?;
                }
                Ok(Outcome::Vm(cell.id().clone()))
            })
            .map(|operation| operation.id())
    }

    /// Ends a VM at once, whatever is being done to it, in an operation of its own.
    ///
    /// # Errors
    /// [`EngineError::ShuttingDown`].
    pub fn kill(&self, cell: Arc<Cell>) -> Result<OperationId, EngineError> {
        let engine = self.clone();
        self.operations()
            .begin(OperationKind::VmKill, cell.name().to_string(), move |context, _locks| async move {
                let _reserved = engine.take(&cell, Activity::Stopping, context.id).await?;
                context.progress("killing", 0, None);
                engine.finish(&cell, None).await?;
                Ok(Outcome::Vm(cell.id().clone()))
            })
            .map(|operation| operation.id())
    }

    /// Asks the guest, then the machine. The VMM may still run afterwards; undoing the shim kills it.
    async fn shut_guest_down(
        &self,
        cell: &Cell,
        live: Live,
        grace: Duration,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        context.progress("shutting down", 0, None);
        let paths = cell.paths();
        let asked = async {
            let (mut control, _) = vm_shim::connect_control(&paths, ANSWER).await?;
            control.shutdown(ShutdownKind::PowerOff, grace, ANSWER).await
        };
        let mut ended = std::pin::pin!(start::ended(live.vmm, live.shim));
        if let Err(error) = asked.await {
            tracing::warn!(vm = %cell.name(), %error, "the guest's agent does not shut down; pressing the power button");
            if let Some(button) = self.inner.vmm.power_button()
                && let Err(error) = button.press(&paths).await
            {
                tracing::warn!(vm = %cell.name(), error = %EngineError::from(error).chain(), "no power button");
            }
        }
        match timeout(grace + UNMOUNT, &mut ended).await {
            Ok(result) => result,
            Err(_) => {
                tracing::warn!(vm = %cell.name(), ?grace, "not down within its grace; killed");
                Ok(())
            }
        }
    }

    /// Undoes all that a run needed; kills what still runs.
    pub(crate) async fn finish(
        &self,
        cell: &Cell,
        failure: Option<(FailedAt, String)>,
    ) -> Result<(), EngineError> {
        let store = self.inner.store.vms();
        // The host first: a full disk, where the store cannot write, must not keep a VM from being stopped.
        let ran = cell.live();
        let unwound = cell.scope.unwind(Phase::Start).await;
        if let Some(live) = ran {
            cell.set_last_exit(Some(start::exit_status(&cell.paths())));
            if !process::alive(live.vmm) && !process::alive(live.shim) {
                cell.set_live(None);
            }
        }
        cell.change_record(|record| record.wanted_running = false);
        let failure = match &unwound {
            Ok(()) => failure,
            Err(error) => Some((FailedAt::Stop, error.chain())),
        };
        cell.set_failure(failure.clone());
        let noted = async {
            // In this order: a daemon that dies in between finds a VM that should run and does not, and judges its end anew.
            store.set_failure(cell.id(), failure).await?;
            store.set_wanted_running(cell.id(), false).await
        };
        let noted = noted.await;
        unwound?;
        Ok(noted?)
    }

    /// Notices the VMM's end at once and cleans up after it.
    pub(crate) fn watch_vmm(&self, cell: Arc<Cell>, live: Live) {
        let engine = self.clone();
        tokio::spawn(async move {
            while let Err(error) = start::ended(live.vmm, live.shim).await {
                tracing::error!(vm = %cell.name(), error = %error.chain(), "its VMM cannot be watched; trying again");
                tokio::time::sleep(RETRY).await;
            }
            loop {
                // Whoever works on the VM now sees the end too; afterwards it may be up again, or gone.
                cell.free().await;
                if cell.live() != Some(live) {
                    return;
                }
                let begun = engine.operations().begin(OperationKind::VmStop, cell.name().to_string(), {
                    let (engine, cell) = (engine.clone(), cell.clone());
                    move |context, _locks| async move { engine.after_end(&cell, live, context.id).await }
                });
                // On its way down, the daemon leaves it to the next one.
                let Ok(operation) = begun else { return };
                if operation.wait().await.is_err() {
                    tokio::time::sleep(RETRY).await;
                }
            }
        });
    }

    async fn after_end(
        &self,
        cell: &Arc<Cell>,
        live: Live,
        operation: OperationId,
    ) -> Result<Outcome, EngineError> {
        let _reserved = match cell.reserve(Activity::Stopping, operation) {
            Ok(reserved) => reserved,
            // Somebody was faster and cleans up, or has deleted it.
            Err(EngineError::Busy { .. } | EngineError::NotFound { .. }) => return Ok(Outcome::Done),
            Err(error) => return Err(error),
        };
        if cell.live() == Some(live) {
            let failure = self.judge_end(cell);
            self.finish(cell, failure).await?;
        }
        Ok(Outcome::Vm(cell.id().clone()))
    }

    /// A VMM that ends with 0 was powered off from within; anything else is a failure.
    pub(crate) fn judge_end(&self, cell: &Cell) -> Option<(FailedAt, String)> {
        match start::exit_status(&cell.paths()) {
            ExitStatus::Code(0) => {
                tracing::info!(vm = %cell.name(), "powered off from within");
                None
            }
            status => {
                tracing::warn!(vm = %cell.name(), %status, "its VMM ended");
                Some((FailedAt::Run, start::died(&cell.paths()).chain()))
            }
        }
    }
}
