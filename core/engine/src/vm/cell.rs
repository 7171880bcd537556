//! What is known of one VM now, and who works on it.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use vm_types::{
    Layout, OperationId, ProcessRef, VmId, VmName, VmPaths,
    vm::{ExitStatus, FailedAt, VmRecord, VmState},
};

use crate::{effects::Scope, error::EngineError};

/// What an operation is doing to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// Making it.
    Creating,
    /// Starting it.
    Starting,
    /// Stopping it.
    Stopping,
    /// Deleting it.
    Deleting,
}

/// A VMM that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Live {
    /// Its shim.
    pub shim: ProcessRef,
    /// The VMM.
    pub vmm: ProcessRef,
    /// Start, seconds since the Unix epoch.
    pub since: u64,
}

#[derive(Debug)]
struct Inner {
    record: VmRecord,
    activity: Option<(Activity, OperationId)>,
    live: Option<Live>,
    last_exit: Option<ExitStatus>,
    deleted: bool,
}

/// One VM. The lock inside is held for single reads and writes only, never across an await.
#[derive(Debug)]
pub struct Cell {
    id: VmId,
    name: VmName,
    layout: Layout,
    pub(crate) scope: Scope,
    inner: Mutex<Inner>,
    released: Notify,
    gone: CancellationToken,
}

impl Cell {
    pub(crate) fn new(record: VmRecord, scope: Scope, layout: Layout) -> Self {
        Self {
            id: record.id.clone(),
            name: record.spec.name.clone(),
            layout,
            scope,
            inner: Mutex::new(Inner { record, activity: None, live: None, last_exit: None, deleted: false }),
            released: Notify::new(),
            gone: CancellationToken::new(),
        }
    }

    /// Its id.
    pub fn id(&self) -> &VmId {
        &self.id
    }

    /// Its name.
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// Its files.
    pub fn paths(&self) -> VmPaths {
        self.layout.vm(&self.id)
    }

    /// What it should be.
    pub fn record(&self) -> VmRecord {
        self.with(|inner| inner.record.clone())
    }

    /// What it is: from the work on it, else from the VMM process, else from how that ended.
    pub fn state(&self) -> VmState {
        self.with(|inner| {
            if let Some((activity, operation)) = inner.activity {
                return match activity {
                    Activity::Creating => VmState::Creating { operation },
                    Activity::Starting => VmState::Starting { operation },
                    Activity::Stopping => VmState::Stopping { operation },
                    Activity::Deleting => VmState::Deleting { operation },
                };
            }
            if let Some(live) = inner.live {
                return VmState::Running { pid: live.vmm.pid, since: live.since };
            }
            match &inner.record.failure {
                Some((at, cause)) => VmState::Failed { at: *at, cause: cause.clone() },
                None => VmState::Stopped { last_exit: inner.last_exit.clone() },
            }
        })
    }

    /// The VMM that runs.
    pub fn live(&self) -> Option<Live> {
        self.with(|inner| inner.live)
    }

    pub(crate) fn set_live(&self, live: Option<Live>) {
        self.with(|inner| inner.live = live);
    }

    pub(crate) fn set_last_exit(&self, exit: Option<ExitStatus>) {
        self.with(|inner| inner.last_exit = exit);
    }

    pub(crate) fn change_record(&self, change: impl FnOnce(&mut VmRecord)) {
        self.with(|inner| change(&mut inner.record));
    }

    pub(crate) fn set_failure(&self, failure: Option<(FailedAt, String)>) {
        self.change_record(|record| record.failure = failure);
    }

    /// Nothing can be reserved any more.
    pub(crate) fn set_deleted(&self) {
        self.with(|inner| inner.deleted = true);
        self.gone.cancel();
    }

    /// Cancelled when the VM has been deleted.
    pub(crate) fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// Reserves the VM for one operation until the result is dropped.
    ///
    /// # Errors
    /// [`EngineError::Busy`] where another one has it.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        activity: Activity,
        operation: OperationId,
    ) -> Result<Reserved, EngineError> {
        self.with(|inner| {
            if inner.deleted {
                return Err(EngineError::NotFound {
                    what: "VM",
                    name: self.name.to_string(),
                    hint: "it has just been deleted; `vm ls` lists all VMs".into(),
                });
            }
            if let Some((current, _)) = inner.activity {
                return Err(EngineError::Busy { name: self.name.clone(), state: current.word() });
            }
            inner.activity = Some((activity, operation));
            Ok(Reserved { cell: self.clone() })
        })
    }

    /// The operation that has the VM.
    pub(crate) fn operation(&self) -> Option<OperationId> {
        self.with(|inner| inner.activity.map(|(_, operation)| operation))
    }

    /// Ends when nobody has the VM, or at once. Somebody else may have it again by then.
    pub(crate) async fn free(&self) {
        loop {
            let released = self.released.notified();
            if self.operation().is_none() {
                return;
            }
            released.await;
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        // Each closure is a few assignments; a panic cannot leave it half done in a way that matters.
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Activity {
    fn word(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Starting => "starting",
            Self::Stopping => "stopping",
            Self::Deleting => "deleting",
        }
    }
}

/// A VM reserved for one operation.
#[derive(Debug)]
pub(crate) struct Reserved {
    cell: Arc<Cell>,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.cell.with(|inner| inner.activity = None);
        self.cell.released.notify_waiters();
    }
}
