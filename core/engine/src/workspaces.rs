//! Workspaces: a directory of the host into a VM, the guest's work back.
//!
//! ```text
//!   prepare:  vm[id] ── is it up? ── released ──> workspaces[id] ─┬─ look at it, as the caller (vm-workspace)
//!                                                                 ├─ importers' offers, one of them   (choose)
//!                                                                 ├─ it runs; record: unfinished      (ports::Importers)
//!                                                                 └─ baseline, record: prepared
//!   status, export:  the same way in; survey, what changed comes over (fetch); then only the host is worked on
//! ```
//!
//! Who brings something in or back holds the VM's workspace lock for as long as that takes, and nothing else: whoever ends the
//! VM just does, and whoever holds the lock sees it ([`Cell::down`]) and gives up. What blocks (git, files) has threads and a
//! [`Cancel`] that goes with its operation.

mod check;
mod choose;
mod error;
mod export;
mod fetch;
mod patches;
mod plan;
mod prepare;
mod settings;
mod status;

use std::{path::Path, sync::Arc};

use vm_locks::{Ctx, Held, Unlocked, Workspace as Level};
use vm_types::{
    vm::VmState,
    workspace::{WorkspaceRecord, WorkspaceState},
};
use vm_workspace::{Baseline, Cancel, Identity, Workspace, WorkspaceError, export::ExportError};

pub(crate) use self::patches::Patches;
pub use self::{
    check::CheckRequest,
    error::{ImportError, WorkspacesError},
    export::{ExportRequest, ExportTo},
    plan::PlanRequest,
    prepare::PrepareRequest,
    status::StatusRequest,
};
use crate::{
    Engine, EngineError,
    ops::OpContext,
    vm::cell::{Cell, Live},
};

/// Who asks: the user whose rights are used on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Engine {
    /// Waits for the right to work on a VM's workspaces, for as long as the VM is up.
    async fn enter<'c>(
        &self,
        ctx: &'c mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        doing: &'static str,
        context: &OpContext,
    ) -> Result<(Live, Held<'c, Level, ()>), EngineError> {
        let live = {
            // Whoever is about to end it has this lock first, or finds us later.
            let _writer = cell.lock(ctx).await;
            up(cell, doing)?
        };
        context.progress("waiting for another import or export", 0, None);
        let entered = async {
            // Cancel-safe: a lock that is not waited for any more goes to the next one.
            tokio::select! {
                biased;
                () = cell.down(live.vmm) => Err(WorkspacesError::down(cell, doing).into()),
                held = cell.lock_workspaces(ctx) => Ok(held),
            }
        };
        let held = context.cancellable(entered).await?;
        Ok((live, held))
    }

    /// Does `work` in the guest until the VM goes down or nobody wants it any more.
    async fn while_up<T>(
        &self,
        cell: &Cell,
        live: Live,
        doing: &'static str,
        context: &OpContext,
        work: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        let watched = async {
            // Cancel-safe: work that is dropped was on a guest that goes down, or says itself what it leaves.
            tokio::select! {
                biased;
                () = cell.down(live.vmm) => Err(WorkspacesError::down(cell, doing).into()),
                done = work => match done {
                    // A guest that is gone is noticed by who speaks with it before the engine is.
                    Err(error) if !matches!(error, EngineError::Cancelled) && !vm_host::process::alive(live.vmm) => {
                        tracing::debug!(vm = %cell.name(), error = %error.chain(), "its VMM has ended");
                        Err(WorkspacesError::down(cell, doing).into())
                    }
                    done => done,
                },
            }
        };
        context.cancellable(watched).await
    }

    /// Opens a directory of the host as the caller, or as its owner where the caller is root.
    async fn open_workspace(
        &self,
        path: &Path,
        caller: Caller,
        cancel: &Cancel,
    ) -> Result<Arc<Workspace>, EngineError> {
        let (path, scratch, cancel) =
            (path.to_owned(), self.inner.layout.workspace_scratch(), cancel.clone());
        on_host(move || {
            let identity = Identity::for_caller(caller.uid, caller.gid, &path)?;
            Workspace::open(&path, identity, &scratch, cancel).map(Arc::new)
        })
        .await
    }

    /// The workspaces of a VM, by their directories.
    ///
    /// # Errors
    /// The store.
    pub async fn workspaces_of(&self, cell: &Cell) -> Result<Vec<WorkspaceRecord>, EngineError> {
        Ok(self.inner.store.workspaces().of(cell.id()).await?)
    }

    /// The workspace that is meant: the one in this directory, or with this name, or the only one.
    async fn workspace_meant(&self, cell: &Cell, at: Option<&str>) -> Result<WorkspaceRecord, EngineError> {
        let mut all = self.workspaces_of(cell).await?;
        let vm = cell.name().clone();
        if let Some(at) = at {
            let named =
                |record: &WorkspaceRecord| record.path == at || record.path.rsplit('/').next() == Some(at);
            all.retain(named);
        }
        match (all.len(), at) {
            (1, _) => Ok(all.remove(0)),
            (0, at) => Err(WorkspacesError::NotPrepared { vm, at: at.map(ToOwned::to_owned) }.into()),
            (_, _) => {
                let paths = all.into_iter().map(|record| record.path).collect();
                Err(WorkspacesError::Several { vm, paths }.into())
            }
        }
    }

    /// What was sent to a workspace that is there as a whole.
    async fn baseline_of(
        &self,
        cell: &Cell,
        record: &WorkspaceRecord,
    ) -> Result<Option<Arc<Baseline>>, EngineError> {
        if !matches!(record.state, WorkspaceState::Prepared { .. }) {
            return Ok(None);
        }
        let file = baseline_file(cell, &record.path);
        Ok(on_host(move || Baseline::load(&file)).await?.map(Arc::new))
    }
}

/// What runs a VM that is up.
fn up(cell: &Cell, doing: &'static str) -> Result<Live, EngineError> {
    match (cell.state(), cell.live()) {
        (VmState::Running { .. }, Some(live)) => Ok(live),
        (state, _) => {
            Err(WorkspacesError::NotUp { vm: cell.name().clone(), state: state.word(), doing }.into())
        }
    }
}

/// Where it is kept what was sent to a directory of a VM.
fn baseline_file(cell: &Cell, path: &str) -> std::path::PathBuf {
    use sha2::{Digest, Sha256};
    // Any path is a name this way, and no two are one.
    let name: String = Sha256::digest(path)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    cell.paths().workspaces().join(format!("{name}.json"))
}

/// Work on the host that blocks.
async fn on_host<T: Send + 'static, E: Into<WorkspacesError> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, EngineError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| match error.into() {
            WorkspacesError::Host(WorkspaceError::Cancelled)
            | WorkspacesError::Export(ExportError::Workspace(WorkspaceError::Cancelled)) => {
                EngineError::Cancelled
            }
            error => error.into(),
        }),
        Err(error) => Err(EngineError::Panicked { detail: error.to_string() }),
    }
}
