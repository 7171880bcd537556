//! What a daemon that comes back finds: VMs that live are adopted, what is half done is undone.

use std::sync::Arc;

use vm_host::process;
use vm_locks::{Ctx, Unlocked};
use vm_types::{
    VmId,
    vm::{FailedAt, VmRecord},
};

use super::{
    cell::{Cell, Live},
    ended, start,
};
use crate::{Engine, EngineError, effects::Scope, journal::Phase};

/// How long a shim whose VMM has ended may take to write that down.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(5);

impl Engine {
    /// Goes through all records and all journals. A VM that cannot be recovered is shown as failed and stops no other.
    ///
    /// # Errors
    /// The store.
    pub(crate) async fn recover(&self, ctx: &mut Ctx<Unlocked>) -> Result<(), EngineError> {
        let records = self.inner.store.vms().list().await?;
        let known: Vec<VmId> = records.iter().map(|record| record.id.clone()).collect();
        for record in records {
            self.recover_vm(ctx, record).await?;
        }
        for cell in self.all().into_iter().filter(|cell| cell.awaits_restart()) {
            self.restart_later(&cell);
        }
        self.recover_network(ctx).await;
        self.sweep().await?;
        for id in self.journaled() {
            if !known.contains(&id)
                && let Err(error) = self.discard(&id).await
            {
                tracing::warn!(vm = %id, error = %error.chain(), "leftovers of a VM that is gone");
            }
        }
        Ok(())
    }

    async fn recover_vm(&self, ctx: &mut Ctx<Unlocked>, record: VmRecord) -> Result<(), EngineError> {
        let cell = self.new_cell(record)?;
        self.publish(&cell);
        if let Err(error) = self.recover_cell(ctx, &cell).await {
            tracing::warn!(vm = %cell.name(), error = %error.chain(), "could not be recovered");
            let at = if cell.record().complete { FailedAt::Stop } else { FailedAt::Delete };
            self.note_failure(ctx, &cell, at, &error).await;
        }
        self.watch_owner(&cell);
        Ok(())
    }

    async fn recover_cell(&self, ctx: &mut Ctx<Unlocked>, cell: &Arc<Cell>) -> Result<(), EngineError> {
        let record = cell.record();
        if !record.complete {
            tracing::info!(vm = %cell.name(), "removed: it was half made or half deleted");
            return self.remove_all(ctx, cell).await;
        }
        let processes = cell.scope.processes().await;
        match processes {
            // Without the wish, the former daemon died while the guest booted: nobody knows whether it ever answered.
            Some((shim, vmm)) if record.wanted_running && process::alive(shim) && process::alive(vmm) => {
                let since = vm_shim::status(&cell.paths())
                    .await
                    .map_or(record.created_at, |status| status.started_at);
                let machine = vm_shim::spec(&cell.paths()).ok().flatten().and_then(|spec| spec.machine);
                let (cpus, memory_mib) = machine
                    .map_or((record.spec.cpus, record.spec.memory_mib), |machine| {
                        (machine.cpus, machine.memory_mib)
                    });
                let live = Live { shim, vmm, since, cpus, memory_mib };
                tracing::info!(vm = %cell.name(), pid = vmm.pid, "adopted");
                let paused = match self.inner.vmm.pause() {
                    Some(pause) => pause.is_paused(&cell.paths()).await.unwrap_or(false),
                    None => false,
                };
                cell.lock(ctx).await.set_on(live, paused);
                self.watch_vmm(cell, live);
            }
            Some((shim, vmm)) if record.wanted_running => {
                // The shim may still be writing how its VMM ended.
                let _ = tokio::time::timeout(LAST_WORDS, start::ended(vmm, shim)).await;
                let end = ended::judge_end(cell);
                let again = end.wants_restart(record.spec.restart);
                self.finish(ctx, cell, end.failure(), again).await?;
            }
            Some(_) => {
                let failure = Some((FailedAt::Start, "the daemon ended while it booted".to_owned()));
                self.finish(ctx, cell, failure, false).await?;
            }
            None if record.wanted_running => {
                // The host was booted meanwhile, or the record of the start was lost with it.
                let end = ended::End::Failed("it ended with the host or its shim".to_owned());
                let again = end.wants_restart(record.spec.restart);
                self.finish(ctx, cell, end.failure(), again).await?;
            }
            None => cell.scope.unwind(Phase::Start).await?,
        }
        if cell.live().is_none() && cell.paths().exit_record().exists() {
            cell.lock(ctx).await.set_off(Some(start::exit_status(&cell.paths())));
        }
        Ok(())
    }

    /// Undoes the effects of a VM that has a journal and no record.
    async fn discard(&self, id: &VmId) -> Result<(), EngineError> {
        let scope = Scope::vm(&self.inner.host, &self.inner.layout, id, &self.inner.boot_id)?;
        scope.unwind(Phase::Start).await?;
        scope.unwind(Phase::Create).await?;
        scope.close().await
    }

    fn journaled(&self) -> Vec<VmId> {
        let Ok(entries) = std::fs::read_dir(self.inner.layout.journals()) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".jsonl")?.parse().ok())
            .collect()
    }
}
