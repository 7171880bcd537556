//! What a daemon that comes back finds: VMs that live are adopted, what is half done is undone.

use std::sync::Arc;

use vm_host::process;
use vm_types::{
    VmId,
    vm::{FailedAt, VmRecord},
};

use super::cell::{Cell, Live};
use crate::{Engine, EngineError, effects::Scope, journal::Phase};

impl Engine {
    /// Goes through all records and all journals. A VM that cannot be recovered is shown as failed and stops no other.
    ///
    /// # Errors
    /// The store.
    pub(crate) async fn recover(&self) -> Result<(), EngineError> {
        self.recover_network().await;
        let records = self.inner.store.vms().list().await?;
        let known: Vec<VmId> = records.iter().map(|record| record.id.clone()).collect();
        for record in records {
            self.recover_vm(record).await?;
        }
        for id in self.journaled() {
            if !known.contains(&id)
                && let Err(error) = self.discard(&id).await
            {
                tracing::warn!(vm = %id, error = %error.chain(), "leftovers of a VM that is gone");
            }
        }
        Ok(())
    }

    async fn recover_vm(&self, record: VmRecord) -> Result<(), EngineError> {
        let cell = self.open_cell(record)?;
        if let Err(error) = self.recover_cell(&cell).await {
            tracing::warn!(vm = %cell.name(), error = %error.chain(), "could not be recovered");
            let failure = Some((FailedAt::Run, error.chain()));
            cell.set_failure(failure.clone());
            self.inner.store.vms().set_failure(cell.id(), failure).await?;
        }
        Ok(())
    }

    async fn recover_cell(&self, cell: &Arc<Cell>) -> Result<(), EngineError> {
        let record = cell.record();
        if !record.complete {
            tracing::info!(vm = %cell.name(), "removed: it was half made or half deleted");
            return self.remove_all(cell).await;
        }
        match cell.scope.processes().await {
            Some((shim, vmm)) if process::alive(shim) && process::alive(vmm) => {
                let since = vm_shim::status(&cell.paths())
                    .await
                    .map_or(record.created_at, |status| status.started_at);
                let live = Live { shim, vmm, since };
                tracing::info!(vm = %cell.name(), pid = vmm.pid, "adopted");
                if !record.wanted_running {
                    self.inner.store.vms().set_wanted_running(cell.id(), true).await?;
                    cell.change_record(|record| record.wanted_running = true);
                }
                cell.set_live(Some(live));
                self.watch_vmm(cell.clone(), live);
            }
            ran => {
                if ran.is_some() || record.wanted_running {
                    let failure = if record.wanted_running { self.judge_end(cell) } else { None };
                    if failure.is_some() {
                        cell.set_failure(failure.clone());
                        self.inner.store.vms().set_failure(cell.id(), failure).await?;
                    }
                    self.inner.store.vms().set_wanted_running(cell.id(), false).await?;
                    cell.change_record(|record| record.wanted_running = false);
                }
                cell.scope.unwind(Phase::Start).await?;
            }
        }
        self.watch_owner(cell.clone());
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
