//! Stopping a VM, killing it, and stopping it to start it again.
//!
//! ```text
//!   agent shuts the guest down ── grace ──> power button ──> kill
//! ```

use std::{sync::Arc, time::Duration};

use nix::sys::signal::Signal;
use tokio::time::timeout;
use vm_host::process::{self, PidFd};
use vm_locks::{Ctx, Unlocked};
use vm_types::{
    EventKind, OperationId, guest::control::ShutdownKind, operation::OperationKind, vm::FailedAt,
};
use vm_vmm::Vmm;

use super::{
    cell::{Activity, Admitted, Cell, Killing, Live},
    create::check_times,
    start,
    state::Request,
};
use crate::{Engine, EngineError, ops::OpContext};

/// How long an agent may take to answer that it shuts down.
const ANSWER: Duration = Duration::from_secs(10);
/// What a guest may take beyond its grace to kill what is left, unmount and power off: killed before, its filesystem is not clean.
const UNMOUNT: Duration = Duration::from_secs(15);
/// What it may take after its power button, pressed when its agent has not brought it down.
const BUTTON: Duration = Duration::from_secs(10);

impl Engine {
    /// Shuts a VM down in an operation of its own; one that is off already is left so.
    ///
    /// # Errors
    /// [`EngineError::ShuttingDown`].
    pub fn stop(&self, cell: Arc<Cell>, grace: Option<Duration>) -> Result<OperationId, EngineError> {
        check_times([grace.map(|grace| grace.as_secs())])?;
        start::refuse(&cell, Request::Stop)?;
        let engine = self.clone();
        let operation = self.operations().begin(
            OperationKind::VmStop,
            cell.name().to_string(),
            move |context, mut ctx| async move {
                let ctx = &mut ctx;
                let admitted =
                    engine.reserve(ctx, &cell, Request::Stop, Activity::Stopping, context.id).await?;
                if let Admitted::Reserved(_reserved) = admitted {
                    engine.wish(ctx, &cell, false).await;
                    let down = engine.bring_down(ctx, &cell, grace, false, &context).await;
                    // Called off: it is to be up as before. If it is the daemon that ends, the next one goes on with it.
                    if matches!(down, Err(EngineError::Cancelled))
                        && !context.preempted()
                        && !engine.operations().closed()
                    {
                        engine.wish(ctx, &cell, cell.live().is_some()).await;
                    }
                    down?;
                }
                Ok(cell.id().clone())
            },
        )?;
        Ok(operation.id())
    }

    /// Stops a VM, if it is up, and starts it, in one operation: nobody comes in between.
    ///
    /// # Errors
    /// [`EngineError::ShuttingDown`].
    pub fn restart(&self, cell: Arc<Cell>, grace: Option<Duration>) -> Result<OperationId, EngineError> {
        check_times([grace.map(|grace| grace.as_secs())])?;
        start::refuse(&cell, Request::Restart)?;
        let engine = self.clone();
        let operation = self.operations().begin(
            OperationKind::VmRestart,
            cell.name().to_string(),
            move |context, mut ctx| async move {
                let ctx = &mut ctx;
                let admitted =
                    engine.reserve(ctx, &cell, Request::Restart, Activity::Stopping, context.id).await?;
                if let Admitted::Reserved(reserved) = admitted {
                    // Before it goes down, so that nobody takes its memory meanwhile.
                    let _memory = engine.admit_start(&cell)?;
                    // From here on it is to be up, also if it was not, and whoever may have to go on with it.
                    engine.wish(ctx, &cell, true).await;
                    if let Err(error) = engine.bring_down(ctx, &cell, grace, true, &context).await {
                        // Nobody will start it again, so it must not be said that somebody does.
                        if !engine.operations().closed() {
                            engine.wish(ctx, &cell, cell.live().is_some()).await;
                        }
                        return Err(error);
                    }
                    if let Err(error) = engine.start_reserved(ctx, &reserved, &context).await {
                        engine.try_again(ctx, reserved, &error, &context).await;
                        return Err(error);
                    }
                }
                Ok(cell.id().clone())
            },
        )?;
        Ok(operation.id())
    }

    /// Ends a VM at once, whatever is being done to it, in an operation of its own.
    ///
    /// # Errors
    /// [`EngineError::ShuttingDown`].
    pub fn kill(&self, cell: Arc<Cell>) -> Result<OperationId, EngineError> {
        let engine = self.clone();
        let operation = self.operations().begin(
            OperationKind::VmKill,
            cell.name().to_string(),
            move |context, mut ctx| async move {
                let ctx = &mut ctx;
                context.progress("killing", 0, None);
                // First of all, and needing nobody's consent: whoever works on the VM sees its end and unwinds the sooner.
                let _killing = kill_at_once(&cell);
                let admitted =
                    engine.reserve(ctx, &cell, Request::Kill, Activity::Stopping, context.id).await?;
                if let Admitted::Reserved(_reserved) = admitted {
                    engine.wish(ctx, &cell, false).await;
                    let was_up = cell.live().is_some();
                    engine.finish(ctx, &cell, kept_failure(&cell), false).await?;
                    if was_up {
                        engine.event(EventKind::VmStopped, &cell, Some(context.id), "killed".into());
                    }
                }
                Ok(cell.id().clone())
            },
        )?;
        Ok(operation.id())
    }

    /// Shuts a reserved VM down if it is up, and undoes what a former run has left.
    async fn bring_down(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        grace: Option<Duration>,
        wanted: bool,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        let Some(live) = cell.live() else {
            return self.finish(ctx, cell, kept_failure(cell), wanted).await;
        };
        let grace = grace.unwrap_or(self.inner.settings.stop_grace);
        context.progress("shutting down", 0, None);
        context.cancellable(self.shut_guest_down(ctx, cell, live, grace)).await?;
        self.finish(ctx, cell, None, wanted).await?;
        self.event(EventKind::VmStopped, cell, Some(context.id), "stopped".into());
        Ok(())
    }

    /// Asks the guest, then the machine. The VMM may still run afterwards; undoing the shim kills it.
    pub(super) async fn shut_guest_down(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        live: Live,
        grace: Duration,
    ) -> Result<(), EngineError> {
        let paths = cell.paths();
        if cell.paused() {
            // A halted guest hears nothing. One that cannot be let run is killed in the end.
            if let Err(error) = self.let_run(ctx, cell).await {
                tracing::warn!(vm = %cell.name(), error = %error.chain(), "a paused VM could not be let run");
            }
        }
        let asked = async {
            let (mut control, _) = vm_shim::connect_control(&paths, ANSWER).await?;
            control.shutdown(ShutdownKind::PowerOff, grace, ANSWER).await
        };
        let mut ended = std::pin::pin!(start::ended(live.vmm, live.shim));
        let mut left = grace;
        match asked.await {
            Ok(()) => match timeout(grace + UNMOUNT, &mut ended).await {
                Ok(result) => return result,
                Err(_) => {
                    tracing::warn!(vm = %cell.name(), ?grace, "not down within its grace; pressing the power button");
                    left = BUTTON;
                }
            },
            Err(error) => {
                tracing::warn!(vm = %cell.name(), %error, "the guest's agent does not shut down; pressing the power button");
            }
        }
        match self.inner.vmm.get(live.driver).ok().and_then(Vmm::power_button) {
            Some(button) => {
                if let Err(error) = button.press(&paths).await {
                    tracing::warn!(vm = %cell.name(), error = %EngineError::from(error).chain(), "no power button");
                }
            }
            None => left = Duration::ZERO,
        }
        match timeout(left, &mut ended).await {
            Ok(result) => result,
            Err(_) => {
                tracing::warn!(vm = %cell.name(), "not down after all; killed");
                Ok(())
            }
        }
    }

    /// Writes down whether a VM is to be up. First of all, so that a daemon that dies on the way knows where it was to go. Where it
    /// cannot be written (a full disk), what is asked for is done all the same.
    pub(super) async fn wish(&self, ctx: &mut Ctx<Unlocked>, cell: &Cell, wanted: bool) {
        let failure = cell.with_record(|record| record.failure.clone());
        self.note_end(ctx, cell, failure, wanted).await;
    }

    async fn note_end(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        failure: Option<(FailedAt, String)>,
        wanted: bool,
    ) {
        let mut writer = cell.lock(ctx).await;
        let known = cell.with_record(|record| record.wanted_running == wanted && record.failure == failure);
        // One that could not be written before is tried again, whatever is known here.
        if cell.written(true) && known {
            return;
        }
        writer.change_record(|record| {
            record.wanted_running = wanted;
            record.failure = failure.clone();
        });
        if let Err(error) = self.inner.store.vms().set_ended(cell.id(), wanted, failure).await {
            cell.written(false);
            tracing::warn!(vm = %cell.name(), %error, "what is to become of it could not be written down");
        }
    }

    /// Undoes all that a run needed; kills what still runs. `wanted` says whether it is to be up again.
    ///
    /// # Errors
    /// What could not be undone; it is tried again by the next start, stop or deletion.
    pub(crate) async fn finish(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        failure: Option<(FailedAt, String)>,
        wanted: bool,
    ) -> Result<(), EngineError> {
        self.note_end(ctx, cell, failure, wanted).await;
        let unwound = self.unwind_run(ctx, cell).await;
        self.note_off(ctx, cell).await;
        self.clean_up(ctx, cell, "stopped").await;
        if let Err(error) = &unwound {
            self.note_end(ctx, cell, Some((FailedAt::Stop, error.chain())), wanted).await;
        }
        unwound
    }

    /// Takes notice of a VM's being off, if neither shim nor VMM runs.
    pub(super) async fn note_off(&self, ctx: &mut Ctx<Unlocked>, cell: &Cell) {
        if let Some(live) = cell.live()
            && !process::alive(live.vmm)
            && !process::alive(live.shim)
        {
            cell.lock(ctx).await.set_off(Some(start::exit_status(&cell.paths())));
        }
    }
}

/// What failed before and has nothing to do with this request stays to be seen.
fn kept_failure(cell: &Cell) -> Option<(FailedAt, String)> {
    match cell.live() {
        Some(_) => None,
        None => cell.with_record(|record| record.failure.clone()),
    }
}

/// Ends a VMM that runs, whoever has the VM. The shim does not outlive it; undoing the shim's effect waits for both.
#[must_use = "its end is no failure as long as this is held"]
pub(super) fn kill_at_once(cell: &Arc<Cell>) -> Option<Killing> {
    let live = cell.live()?;
    let killing = cell.expect_end();
    let killed =
        PidFd::open(live.vmm).and_then(|held| held.map_or(Ok(()), |held| held.kill(Signal::SIGKILL)));
    if let Err(error) = killed {
        tracing::warn!(vm = %cell.name(), %error, "its VMM could not be killed at once");
    }
    Some(killing)
}
