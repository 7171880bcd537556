//! Deleting VMs that are off, many at once.
//!
//! ```text
//!   request ──> which VMs fit (looked at once, when it begins) ──> each through the usual deletion ──> Pruned
//! ```
//!
//! A VM that somebody starts meanwhile is refused by its own deletion and shown among those that could not be deleted.

use std::{collections::BTreeMap, os::unix::fs::MetadataExt, sync::Arc};

use vm_locks::{Ctx, Unlocked};
use vm_types::{
    OperationId, VmName,
    operation::OperationKind,
    vm::{VmRecord, VmState},
};

use super::{cell::Cell, now};
use crate::{
    Engine, EngineError,
    ops::{OpContext, Operation, Pruned},
};

/// Which VMs to delete: those that are off and fit all that is said here.
#[derive(Debug, Clone, Default)]
pub struct PruneRequest {
    /// Only those that have been off, or there, for this many seconds.
    pub older_than_seconds: Option<u64>,
    /// Only those with all these labels.
    pub labels: BTreeMap<String, String>,
    /// Only those that failed.
    pub failed: bool,
    /// Say which, delete none.
    pub dry_run: bool,
}

impl PruneRequest {
    /// Whether a VM is to be deleted. `off_since` is asked only where all else fits.
    fn takes(&self, state: &VmState, record: &VmRecord, now: u64, off_since: impl FnOnce() -> u64) -> bool {
        let off = match state {
            VmState::Failed { .. } => true,
            // Half made or half deleted, and nobody works on it.
            VmState::Stopped { .. } | VmState::Defined => !self.failed,
            VmState::Creating { .. }
            | VmState::Starting { .. }
            | VmState::Running { .. }
            | VmState::Paused { .. }
            | VmState::Stopping { .. }
            | VmState::Deleting { .. } => false,
        };
        // One that its policy is about to start again is not off for good.
        off && !record.wanted_running
            && self.labels.iter().all(|(label, value)| record.spec.labels.get(label) == Some(value))
            && self.older_than_seconds.is_none_or(|least| now.saturating_sub(off_since()) >= least)
    }
}

impl Engine {
    /// Deletes VMs that are off in an operation of its own; its result tells of each. One that cannot be deleted stops no other.
    ///
    /// # Errors
    /// [`EngineError::ShuttingDown`].
    pub fn prune(&self, request: PruneRequest) -> Result<Operation<Pruned>, EngineError> {
        let engine = self.clone();
        let subject = if request.dry_run { "VMs that are off (dry run)" } else { "VMs that are off" };
        self.operations().begin(OperationKind::VmPrune, subject, move |context, mut ctx| async move {
            engine.prune_now(&mut ctx, &request, &context).await
        })
    }

    async fn prune_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        request: &PruneRequest,
        context: &OpContext,
    ) -> Result<Pruned, EngineError> {
        let now = now();
        let mut chosen = self.all();
        chosen.retain(|cell| {
            let record = cell.record();
            // An activity that does not show in the state, such as a change of labels.
            let busy = cell.live().is_some() || cell.operation().is_some();
            !busy && request.takes(&cell.state(), &record, now, || off_since(cell, &record))
        });
        let mut pruned = Pruned::default();
        let total = chosen.len() as u64;
        for (done, cell) in (0..).zip(&chosen) {
            context.progress("deleting", done, Some(total));
            let bytes = disk_used(cell);
            let deleted = if request.dry_run {
                Ok(true)
            } else {
                // Between two deletions it can be cancelled; those that are done stay done.
                context.cancellable(std::future::ready(Ok(()))).await?;
                self.prune_one(ctx, cell, request, context.id).await
            };
            pruned.note(cell.name(), bytes, deleted);
        }
        Ok(pruned)
    }

    /// Deletes one VM if it still is what was asked for; whether it did.
    async fn prune_one(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        request: &PruneRequest,
        operation: OperationId,
    ) -> Result<bool, EngineError> {
        // It may have been used and stopped again since it was chosen. One that is up or busy is refused below.
        let record = cell.record();
        let free = cell.live().is_none() && cell.operation().is_none();
        if free && !request.takes(&cell.state(), &record, now(), || off_since(cell, &record)) {
            return Ok(false);
        }
        match self.delete_now(ctx, cell, false, operation).await {
            // Somebody else was faster.
            Err(EngineError::NotFound { .. }) => Ok(false),
            deleted => deleted.map(|()| true),
        }
    }
}

impl Pruned {
    fn note(&mut self, name: &VmName, bytes: u64, deleted: Result<bool, EngineError>) {
        match deleted {
            Ok(true) => {
                self.freed_bytes += bytes;
                self.deleted.push(name.clone());
            }
            Ok(false) => {}
            Err(error) => {
                self.failed.insert(name.clone(), Arc::new(error));
            }
        }
    }
}

/// When a VM went off, as the record of its last end tells; else when it was made.
fn off_since(cell: &Cell, record: &VmRecord) -> u64 {
    match vm_shim::exit_record(&cell.paths()) {
        Ok(Some(end)) => end.at.max(record.created_at),
        // Unreadable is as good as none: age decides.
        Ok(None) | Err(_) => record.created_at,
    }
}

/// Bytes the root disk takes on the host.
fn disk_used(cell: &Cell) -> u64 {
    let files = cell.paths().disk_files();
    files.iter().filter_map(|file| std::fs::metadata(file).ok()).map(|about| about.blocks() * 512).sum()
}

#[cfg(test)]
mod tests {
    use vm_types::vm::{ExitStatus, FailedAt, NetworkMode, RestartPolicy, VmSpec};

    use super::*;

    const NOW: u64 = 1_000_000;

    fn record(labels: &[(&str, &str)]) -> VmRecord {
        let spec = VmSpec {
            name: "web".parse().unwrap(),
            image_reference: "debian:bookworm".into(),
            image: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
            kernel: "00112233aabb".parse().unwrap(),
            cpus: 1,
            memory_mib: 512,
            disk_bytes: 1 << 30,
            disk_limits: Default::default(),
            network: NetworkMode::None,
            labels: labels.iter().map(|(label, value)| ((*label).into(), (*value).into())).collect(),
            owner: None,
            restart: RestartPolicy::No,
            idle_stop_seconds: None,
            expires_at: None,
            vmm: None,
        };
        VmRecord {
            id: "00112233aabb".parse().unwrap(),
            spec,
            address: None,
            created_at: NOW - 1000,
            complete: true,
            wanted_running: false,
            failure: None,
        }
    }

    fn stopped() -> VmState {
        VmState::Stopped { last_exit: Some(ExitStatus::Code(0)) }
    }

    fn failed() -> VmState {
        VmState::Failed { at: FailedAt::Run, cause: "gone".into() }
    }

    fn takes(request: &PruneRequest, state: &VmState, record: &VmRecord) -> bool {
        request.takes(state, record, NOW, || record.created_at)
    }

    #[test]
    fn only_what_is_off_is_deleted() {
        let all = PruneRequest::default();
        let operation = OperationId(1);
        assert!(takes(&all, &stopped(), &record(&[])) && takes(&all, &failed(), &record(&[])));
        for state in [
            VmState::Running { pid: 1, since: 0 },
            VmState::Paused { pid: 1, since: 0 },
            VmState::Starting { operation },
            VmState::Creating { operation },
            VmState::Stopping { operation },
            VmState::Deleting { operation },
        ] {
            assert!(!takes(&all, &state, &record(&[])), "{state:?}");
        }
        let coming = VmRecord { wanted_running: true, ..record(&[]) };
        assert!(!takes(&all, &failed(), &coming), "its policy starts it again");
    }

    #[test]
    fn all_that_is_said_must_fit() {
        let request = PruneRequest {
            older_than_seconds: Some(100),
            labels: BTreeMap::from([("ci".into(), "yes".into())]),
            failed: true,
            dry_run: false,
        };
        let labelled = record(&[("ci", "yes"), ("job", "7")]);
        assert!(takes(&request, &failed(), &labelled));
        assert!(!takes(&request, &stopped(), &labelled));
        assert!(!takes(&request, &failed(), &record(&[("ci", "no")])));
        assert!(!request.takes(&failed(), &labelled, NOW, || NOW - 99));
        assert!(request.takes(&failed(), &labelled, NOW, || NOW - 100));
        // A clock that was put back makes nothing older.
        assert!(!request.takes(&failed(), &labelled, NOW, || NOW + 5000));
    }

    #[test]
    fn each_failure_is_kept_and_stops_no_other() {
        let mut pruned = Pruned::default();
        let name = |text: &str| text.parse::<VmName>().unwrap();
        pruned.note(&name("a"), 10, Ok(true));
        pruned.note(&name("b"), 20, Err(EngineError::Cancelled));
        pruned.note(&name("c"), 40, Ok(false));
        pruned.note(&name("d"), 80, Ok(true));
        assert_eq!((pruned.deleted, pruned.freed_bytes), (vec![name("a"), name("d")], 90));
        assert_eq!(pruned.failed.keys().collect::<Vec<_>>(), [&name("b")]);
    }
}
