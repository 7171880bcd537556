//! What follows when a VMM ends by itself: finding out why, cleaning up, and starting again what is to be up.

use std::{sync::Arc, time::Duration};

use vm_locks::{Ctx, Unlocked};
use vm_types::{
    EventKind,
    operation::OperationKind,
    shim::GuestEnd,
    vm::{ExitStatus, FailedAt, RestartPolicy},
};

use super::{
    cell::{Activity, Admitted, Cell, Live, Reserved},
    now, start,
    state::Request,
};
use crate::{Engine, EngineError, ops::OpContext};

/// Between two attempts to watch or clean up after a VMM.
const RETRY: Duration = Duration::from_secs(1);
/// Before the first restart after a failure; doubled by each that follows soon.
const RESTART_FIRST: Duration = Duration::from_secs(1);
/// The longest pause before a restart.
const RESTART_MAX: Duration = Duration::from_secs(60);
/// A VM that was up for so long has not failed to come up: counting begins anew.
const SETTLED_SECONDS: u64 = 60;

/// Why a VMM ended that nobody had asked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The guest powered off.
    PoweredOff,
    /// The guest reset its machine and expects to come up again.
    Rebooted,
    /// It died, or the guest's kernel did; for people.
    Failed(String),
}

impl End {
    /// What the VM's state tells of it.
    pub(crate) fn failure(&self) -> Option<(FailedAt, String)> {
        match self {
            Self::PoweredOff | Self::Rebooted => None,
            Self::Failed(cause) => Some((FailedAt::Run, cause.clone())),
        }
    }

    /// Whether it is started again.
    pub(crate) fn wants_restart(&self, policy: RestartPolicy) -> bool {
        match (self, policy) {
            (Self::Rebooted, _) | (_, RestartPolicy::Always) => true,
            (Self::Failed(_), RestartPolicy::OnFailure) => true,
            (Self::Failed(_), RestartPolicy::No) => false,
            (Self::PoweredOff, RestartPolicy::OnFailure | RestartPolicy::No) => false,
        }
    }
}

impl Engine {
    /// Notices the VMM's end at once and does what follows from it.
    pub(crate) fn watch_vmm(&self, cell: &Arc<Cell>, live: Live) {
        let (engine, cell) = (self.clone(), cell.clone());
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
                if cell.end_expected() {
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
                let begun =
                    engine.operations().begin(OperationKind::VmEnded, cell.name().to_string(), {
                        let (engine, cell) = (engine.clone(), cell.clone());
                        move |context, mut ctx| async move {
                            engine.after_end(&mut ctx, &cell, live, &context).await
                        }
                    });
                // On its way down, the daemon leaves it to the next one.
                let Ok(operation) = begun else { return };
                if operation.wait().await.is_err() && cell.live() == Some(live) {
                    tokio::time::sleep(RETRY).await;
                }
            }
        });
    }

    async fn after_end(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        live: Live,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        let admitted = match self.reserve(ctx, cell, Request::Ended, Activity::Stopping, context.id).await {
            // Somebody was faster and cleans up, or has deleted it.
            Err(EngineError::Busy { .. } | EngineError::NotFound { .. }) => return Ok(()),
            admitted => admitted?,
        };
        let Admitted::Reserved(reserved) = admitted else { return Ok(()) };
        if cell.live() != Some(live) {
            return Ok(());
        }
        if now().saturating_sub(live.since) >= SETTLED_SECONDS {
            cell.forget_restarts();
        }
        let end = judge_end(cell);
        self.follow(ctx, reserved, end, context).await
    }

    /// Cleans up after a VM that has ended by itself and starts it again where its policy, or its guest, wants that.
    pub(crate) async fn follow(
        &self,
        ctx: &mut Ctx<Unlocked>,
        reserved: Reserved,
        end: End,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        let cell = reserved.cell().clone();
        if !cell.with_record(|record| record.complete) {
            // Its deletion has failed half way, and says so; the next one goes on.
            self.note_off(ctx, &cell).await;
            return Ok(());
        }
        let policy = cell.with_record(|record| record.spec.restart);
        let again = end.wants_restart(policy);
        // Nobody takes the memory of a guest that only reboots.
        let _memory = (end == End::Rebooted).then(|| self.admit_start(&cell));
        let finished = self.finish(ctx, &cell, end.failure(), again).await;
        let id = Some(context.id);
        match &end {
            End::PoweredOff => {
                self.event(EventKind::VmPoweredOff, &cell, id, "powered off from within".into());
            }
            End::Rebooted => self.event(EventKind::VmRebooted, &cell, id, "rebooted from within".into()),
            End::Failed(cause) => self.event(EventKind::VmFailed, &cell, id, cause.clone()),
        }
        if finished.is_ok() && end == End::Rebooted && cell.restarts() == 0 {
            cell.count_restart();
            if let Err(error) = self.start_reserved(ctx, &reserved, context).await {
                self.try_again(ctx, reserved, &error, context).await;
            }
        } else if again {
            // A start begins with what could not be undone.
            drop(reserved);
            self.restart_later(&cell);
        }
        finished
    }

    /// After a restart that failed: another one where the policy wants it, else the VM stays off.
    pub(super) async fn try_again(
        &self,
        ctx: &mut Ctx<Unlocked>,
        reserved: Reserved,
        error: &EngineError,
        context: &OpContext,
    ) {
        let cell = reserved.cell().clone();
        match error {
            // Whoever has taken it over, or the next daemon, does what is to be done.
            EngineError::Cancelled if context.preempted() || self.operations().closed() => return,
            EngineError::Cancelled => return self.wish(ctx, &cell, false).await,
            // Elsewhere a refusal leaves the VM as it was, and whoever asked is told. Here nobody is.
            EngineError::Admission { .. } => self.note_failure(ctx, &cell, FailedAt::Start, error).await,
            _ => {}
        }
        if cell.with_record(|record| record.spec.restart) == RestartPolicy::No {
            return self.wish(ctx, &cell, false).await;
        }
        drop(reserved);
        self.restart_later(&cell);
    }

    /// Starts a VM after a pause, which grows with each restart that does not hold, unless somebody stops, starts or deletes it meanwhile.
    pub(crate) fn restart_later(&self, cell: &Arc<Cell>) {
        let pause = RESTART_FIRST.saturating_mul(1 << cell.count_restart().min(6)).min(RESTART_MAX);
        let message = format!("started again in {} s", pause.as_secs());
        self.event(EventKind::VmRestarting, cell, None, message);
        let (engine, cell) = (self.clone(), cell.clone());
        tokio::spawn(async move {
            let gone = cell.gone();
            // Cancel-safe: both only wait.
            tokio::select! {
                () = gone.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            cell.free().await;
            let begun = engine.operations().begin(OperationKind::VmRestart, cell.name().to_string(), {
                let (engine, cell) = (engine.clone(), cell.clone());
                move |context, mut ctx| async move {
                    let ctx = &mut ctx;
                    let reserved = loop {
                        if !cell.awaits_restart() {
                            return Ok(());
                        }
                        let admitted =
                            engine.reserve(ctx, &cell, Request::Start, Activity::Starting, context.id).await;
                        match admitted {
                            Err(EngineError::Busy { .. }) => cell.free().await,
                            Ok(Admitted::Reserved(reserved)) => break reserved,
                            Ok(Admitted::Already) => return Ok(()),
                            Err(error) => return Err(error),
                        }
                    };
                    // It may have been stopped before it was ours.
                    if !cell.awaits_restart() {
                        return Ok(());
                    }
                    let started = engine.start_reserved(ctx, &reserved, &context).await;
                    if let Err(error) = &started {
                        engine.try_again(ctx, reserved, error, &context).await;
                    }
                    started
                }
            });
            if let Err(error) = begun {
                // On its way down, the daemon leaves it to the next one.
                tracing::debug!(vm = %cell.name(), %error, "not started again");
            }
        });
    }
}

/// What the shim has written down of a VMM's end.
pub(crate) fn judge_end(cell: &Cell) -> End {
    let paths = cell.paths();
    match start::exit(&paths) {
        (_, Some(GuestEnd::PowerOff)) | (ExitStatus::Code(0), None) => End::PoweredOff,
        (_, Some(GuestEnd::Reboot)) => End::Rebooted,
        (_, Some(GuestEnd::Panic)) | (_, None) => End::Failed(start::died(&paths).chain()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_decides_what_is_started_again() {
        use RestartPolicy::{Always, No, OnFailure};
        let failed = End::Failed("died".into());
        let cases = [
            (End::Rebooted, [true, true, true]),
            (End::PoweredOff, [false, false, true]),
            (failed, [false, true, true]),
        ];
        for (end, wanted) in cases {
            let got = [No, OnFailure, Always].map(|policy| end.wants_restart(policy));
            assert_eq!(got, wanted, "{end:?}");
        }
    }
}
