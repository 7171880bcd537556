//! What has changed since a workspace was brought, on either side.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use vm_locks::{Ctx, Unlocked};
use vm_types::{
    OperationId,
    operation::OperationKind,
    workspace::{WorkspaceChange, WorkspaceChangeKind, WorkspaceRecord, WorkspaceState, WorkspaceStatus},
};
use vm_workspace::{
    Baseline, Cancel, Difference,
    export::{Change, ChangeKind, ExportError, Wish},
};

use super::{Caller, WorkspacesError, fetch::Reached, on_host, up};
use crate::{
    Engine, EngineError,
    ops::{OpContext, Outcome},
    vm::cell::{Cell, Live},
};

const DOING: &str = "looking at the workspace";

/// Which workspace to look at.
#[derive(Debug, Clone)]
pub struct StatusRequest {
    /// Name or id.
    pub vm: String,
    /// Its directory in the guest, or that one's name; not needed where there is only one.
    pub at: Option<String>,
    /// Also what git ignores in the guest.
    pub ignored: bool,
    /// Who asks.
    pub caller: Caller,
}

impl From<WorkspaceStatus> for Outcome {
    fn from(status: WorkspaceStatus) -> Self {
        Self::WorkspaceStatus(Box::new(status))
    }
}

impl Engine {
    /// Tells in an operation what has changed in a guest, and on the host, since a workspace was brought.
    ///
    /// # Errors
    /// No such VM, or one that is not running.
    pub fn workspace_status(&self, request: StatusRequest) -> Result<OperationId, EngineError> {
        let cell = self.find(&request.vm)?;
        up(&cell, DOING)?;
        let engine = self.clone();
        let subject = cell.name().to_string();
        self.operations()
            .begin(OperationKind::WorkspaceStatus, subject, move |context, mut ctx| async move {
                Box::pin(engine.status_now(&mut ctx, &cell, request, &context)).await
            })
            .map(|operation| operation.id())
    }

    async fn status_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        request: StatusRequest,
        context: &OpContext,
    ) -> Result<WorkspaceStatus, EngineError> {
        let (live, _entered) = self.enter(ctx, cell, DOING, context).await?;
        let cancel = Cancel::default();
        let _ends = cancel.on_drop();
        let looked = async {
            let record = self.workspace_meant(cell, request.at.as_deref()).await?;
            let baseline = self.whole(cell, &record).await?;
            context.progress(format!("looking at {}", record.source.display()), 0, None);
            let workspace = self.reopen(&record, request.caller, &cancel).await?;
            let reached = Reached::new(self, cell, &record).await?;
            let wish = Wish::Files { ignored: request.ignored };
            let survey = reached.survey(context).await?;
            let mut export = reached.export(&workspace, &baseline, survey.clone(), wish, context).await?;
            let (changes, warnings) =
                on_host(move || Ok::<_, ExportError>((export.changes()?, export.warnings()))).await?;

            context.progress("looking at the host's files", 0, None);
            // The guest is not asked any more when nobody waits for the answer.
            let given_up = CancellationToken::new();
            let _guard = given_up.clone().drop_guard();
            let runtime = tokio::runtime::Handle::current();
            let (guest, directory) = (reached.guest.clone(), reached.directory.clone());
            let known = baseline.clone();
            let difference = on_host(move || {
                let mut ask = |paths: &[Vec<u8>]| {
                    let answer = given_up.run_until_cancelled(guest.digests(&directory, paths));
                    let answer = runtime.block_on(answer).ok_or("nobody waits for it any more")?;
                    answer.map_err(Into::into)
                };
                known.difference(&workspace, &survey, &mut ask)
            })
            .await?;
            reached.close().await;
            self.remember(cell, live, &record, &baseline, &difference).await;
            Ok(WorkspaceStatus {
                guest: changes.into_iter().map(shown).collect(),
                host: texts(difference.send),
                host_removed: texts(difference.remove),
                host_commits: difference.history,
                both: texts(difference.guest_changed),
                workspace: record,
                warnings,
            })
        };
        Box::pin(self.while_up(cell, live, DOING, context, looked)).await
    }

    /// Writes down the times of files that have others on the host and are the same all the same, so that the next one who looks need
    /// not read them: those that were sent right after they had been made, or that somebody has only touched.
    async fn remember(
        &self,
        cell: &Arc<Cell>,
        live: Live,
        record: &WorkspaceRecord,
        baseline: &Baseline,
        difference: &Difference,
    ) {
        if !difference.touched.entries.values().any(|entry| entry.stat.inode != 0) {
            return;
        }
        let mut baseline = baseline.clone();
        baseline.sent.extend(difference.touched.clone());
        // It is as right as it was if that fails.
        if let Err(error) = self.save_baseline(cell, live, &record.path, baseline, DOING).await {
            tracing::debug!(vm = %cell.name(), error = %error.chain(), "the times of files could not be written down");
        }
    }

    /// What was sent of a workspace that has to be whole.
    pub(super) async fn whole(
        &self,
        cell: &Cell,
        record: &WorkspaceRecord,
    ) -> Result<Arc<Baseline>, EngineError> {
        self.baseline_of(cell, record).await?.ok_or_else(|| {
            let cause = match &record.state {
                WorkspaceState::Unfinished { cause } => cause.clone(),
                WorkspaceState::Prepared { .. } => Some("what was sent of it is not known any more".into()),
            };
            WorkspacesError::Unfinished { vm: cell.name().clone(), path: record.path.clone(), cause }.into()
        })
    }
}

/// Paths for people.
pub(super) fn texts(paths: Vec<Vec<u8>>) -> Vec<String> {
    paths.iter().map(|path| text(path)).collect()
}

pub(super) fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

fn shown(change: Change) -> WorkspaceChange {
    let kind = match change.kind {
        ChangeKind::Added => WorkspaceChangeKind::Added,
        ChangeKind::Modified => WorkspaceChangeKind::Modified,
        ChangeKind::Deleted => WorkspaceChangeKind::Deleted,
        ChangeKind::TypeChanged => WorkspaceChangeKind::TypeChanged,
        ChangeKind::ModeChanged => WorkspaceChangeKind::ModeChanged,
    };
    WorkspaceChange { path: text(&change.path), kind }
}
