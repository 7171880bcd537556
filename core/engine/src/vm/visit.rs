//! Booting a VM that is off for something that needs its files, and shutting it down again.

use std::sync::Arc;

use vm_locks::{Ctx, Unlocked};
use vm_types::vm::VmState;

use super::{
    cell::{Activity, Admitted, Cell},
    start::{self, Boot},
    state::Request,
};
use crate::{Engine, EngineError, ops::OpContext};

impl Engine {
    /// Boots a VM that is off without its network, its plugins and the image's own init, does `work`, which may reach the guest by its
    /// socket, and shuts it down cleanly. Nobody else gets the VM meanwhile, and whether it is to be up stays as it was. Where
    /// it is cancelled or fails, the machine is just ended, which its filesystem's journal is for.
    ///
    /// `None`, and nothing done, if it is up.
    ///
    /// # Errors
    /// The VM's state, its start, the work, or what could not be undone.
    pub(crate) async fn visit<T>(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        work: impl Future<Output = Result<T, EngineError>>,
        context: &OpContext,
    ) -> Result<Option<T>, EngineError> {
        let admitted = self.reserve(ctx, cell, Request::Start, Activity::Starting, context.id).await?;
        let Admitted::Reserved(_reserved) = admitted else { return Ok(None) };
        if !cell.with_record(|record| record.complete) {
            return Err(Request::Start.refused(cell.name(), &VmState::Defined));
        }
        let _memory = self.admit_start(cell)?;
        self.unwind_run(ctx, cell).await?;
        let visited = async {
            let live = self.bring_up(ctx, cell, None, Boot::Alone, context).await?;
            // Cancel-safe: one arm only waits, and work that is dropped was in a guest that has ended.
            let done = tokio::select! {
                biased;
                ended = start::ended(live.vmm, live.shim) => {
                    ended?;
                    return Err(start::died(&cell.paths()));
                }
                done = work => done?,
            };
            context.progress("shutting down", 0, None);
            self.shut_guest_down(ctx, cell, live, self.inner.settings.stop_grace).await?;
            Ok(done)
        };
        let visited = context.cancellable(visited).await;
        let undone = self.unwind_run(ctx, cell).await;
        cell.scope.settle(ctx).await;
        if let (Err(error), Err(undo)) = (&visited, &undone) {
            // The next start, or the deletion, tries again.
            tracing::warn!(vm = %cell.name(), error = %undo.chain(), after = %error.chain(), "its end could not be undone");
        }
        let done = visited?;
        undone?;
        Ok(Some(done))
    }
}
