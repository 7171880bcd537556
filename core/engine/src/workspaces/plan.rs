//! What would be done with a workspace. No VM is needed, and nothing changes.

use std::{path::PathBuf, sync::Arc};

use vm_types::{
    OperationId,
    operation::OperationKind,
    workspace::{WorkspaceOffer, WorkspacePlan},
};
use vm_workspace::{Baseline, Cancel, Workspace};

use super::{
    Caller, WorkspacesError,
    choose::{self, Asked, Chosen},
    on_host,
    settings::{self, Settings},
};
use crate::{
    Engine, EngineError,
    ops::{OpContext, Outcome},
    ports::{ImportSource, Probed},
    vm::cell::Cell,
};

/// What to plan for.
#[derive(Debug, Clone)]
pub struct PlanRequest {
    /// The directory on the host, or one below it.
    pub path: PathBuf,
    /// A VM that may have it already.
    pub vm: Option<String>,
    /// The directory in the guest.
    pub to: Option<String>,
    /// `IMPORTER` or `IMPORTER/STRATEGY`.
    pub importer: Option<String>,
    /// All of the history.
    pub full: bool,
    /// The guest's user.
    pub user: Option<String>,
    /// Who asks.
    pub caller: Caller,
}

/// A workspace with what it says of itself.
pub(super) struct Opened {
    pub(super) workspace: Arc<Workspace>,
    pub(super) settings: Option<Settings>,
}

impl Opened {
    /// The guest's user, where one is named.
    pub(super) fn user(&self, asked: Option<&String>) -> Option<String> {
        let own = || Some(self.settings.as_ref()?.user.as_ref()?.value.clone());
        asked.cloned().or_else(own)
    }
}

/// What would be done.
pub(super) struct Planned {
    pub(super) plan: WorkspacePlan,
    /// Why no importer would be taken.
    pub(super) refused: Option<WorkspacesError>,
    pub(super) workspace: Arc<Workspace>,
}

impl From<WorkspacePlan> for Outcome {
    fn from(plan: WorkspacePlan) -> Self {
        Self::WorkspacePlan(Box::new(plan))
    }
}

impl Engine {
    /// Tells in an operation what importers offer for a directory of the host, and which one would be taken.
    ///
    /// # Errors
    /// No such VM.
    pub fn plan_workspace(&self, request: PlanRequest) -> Result<OperationId, EngineError> {
        absolute(&request.path)?;
        let cell = request.vm.as_deref().map(|vm| self.find(vm)).transpose()?;
        let engine = self.clone();
        let subject = request.path.display().to_string();
        self.operations()
            .begin(OperationKind::WorkspacePlan, subject, move |context, _| async move {
                let planned = async {
                    let cancel = Cancel::default();
                    let _ends = cancel.on_drop();
                    Ok(engine.planned(&request, cell.as_ref(), &cancel, &context).await?.plan)
                };
                context.cancellable(planned).await
            })
            .map(|operation| operation.id())
    }

    /// Looks at a workspace and asks importers; `cell` is a VM that may have it already.
    pub(super) async fn planned(
        &self,
        request: &PlanRequest,
        cell: Option<&Arc<Cell>>,
        cancel: &Cancel,
        context: &OpContext,
    ) -> Result<Planned, EngineError> {
        let opened = self.look_at(&request.path, request.caller, cancel, context).await?;
        let settings = opened.settings.as_ref();
        let facts = opened.workspace.facts().clone();
        let to = choose::destination(request.to.as_deref(), settings, &facts.name)?;
        let former = match cell {
            Some(cell) => match self.inner.store.workspaces().get(cell.id(), &to).await? {
                Some(record) => self.baseline_of(cell, &record).await?,
                None => None,
            },
            None => None,
        };
        let probed = self.offers(&opened, former, context).await;
        let asked = Asked { importer: request.importer.as_deref(), full: request.full };
        let (chosen, why, refused) = match choose::choose(asked, settings, &probed) {
            Ok(Chosen { offer, why }) => (Some(choose::shown(&offer).way()), why, None),
            Err(error) => (None, error.to_string(), Some(error)),
        };
        let offers: Vec<WorkspaceOffer> = probed.offers.iter().map(choose::shown).collect();
        let plan = WorkspacePlan {
            user: opened.user(request.user.as_ref()),
            settings: settings.map(|settings| settings.file.clone()),
            facts,
            to,
            offers,
            chosen,
            why,
            failures: probed.failures.iter().map(ToString::to_string).collect(),
            warnings: Vec::new(),
        };
        Ok(Planned { plan, refused, workspace: opened.workspace })
    }

    /// Opens a directory of the host, and reads what it says of itself.
    pub(super) async fn look_at(
        &self,
        path: &std::path::Path,
        caller: Caller,
        cancel: &Cancel,
        context: &OpContext,
    ) -> Result<Opened, EngineError> {
        context.progress(format!("looking at {}", path.display()), 0, None);
        let workspace = self.open_workspace(path, caller, cancel).await?;
        let reader = workspace.clone();
        let settings = on_host(move || settings::of(&reader)).await?;
        Ok(Opened { workspace, settings })
    }

    /// What importers offer for it.
    pub(super) async fn offers(
        &self,
        opened: &Opened,
        former: Option<Arc<Baseline>>,
        context: &OpContext,
    ) -> Probed {
        context.progress("asking importers", 0, None);
        self.inner.importers.probe(&self.import_source(opened, former)).await
    }

    pub(super) fn import_source(&self, opened: &Opened, former: Option<Arc<Baseline>>) -> ImportSource {
        ImportSource {
            workspace: opened.workspace.clone(),
            former,
            scratch: self.inner.layout.workspace_scratch(),
        }
    }
}

/// A path that means the same to the daemon as to whoever asks.
pub(super) fn absolute(path: &std::path::Path) -> Result<(), WorkspacesError> {
    if path.is_absolute() { Ok(()) } else { Err(WorkspacesError::Relative { path: path.to_owned() }) }
}
