//! What would keep a workspace from coming into a VM, or its work from coming back, told before the VM is made.

use std::sync::Arc;

use vm_types::{OperationId, operation::OperationKind, workspace::WorkspacePlan};
use vm_workspace::{
    Cancel, Workspace,
    export::{ExportError, beforehand},
};

use super::{
    ExportTo, PlanRequest, on_host,
    plan::{Planned, absolute},
};
use crate::{Engine, EngineError};

/// What is to be done once there is a VM.
#[derive(Debug, Clone)]
pub struct CheckRequest {
    /// What is to be brought, and how; a VM in it does not count.
    pub plan: PlanRequest,
    /// As what the work is to be brought back.
    pub export: Option<ExportTo>,
}

impl Engine {
    /// Sees in an operation whether a directory of the host could be brought into a VM, and its work back, as far as the host's side
    /// tells. Nothing changes.
    ///
    /// # Errors
    /// A path that is not absolute.
    pub fn check_workspace(&self, request: CheckRequest) -> Result<OperationId, EngineError> {
        absolute(&request.plan.path)?;
        if let Some(ExportTo::Files { directory, .. }) = &request.export {
            absolute(directory)?;
        }
        let engine = self.clone();
        let subject = request.plan.path.display().to_string();
        self.operations()
            .begin(OperationKind::WorkspacePlan, subject, move |context, _| async move {
                let checked = async {
                    let cancel = Cancel::default();
                    let _ends = cancel.on_drop();
                    let CheckRequest { plan, export } = request;
                    let Planned { plan, refused, workspace } =
                        engine.planned(&plan, None, &cancel, &context).await?;
                    if let Some(refused) = refused {
                        return Err(refused.into());
                    }
                    let warnings = match export {
                        Some(to) => on_host(move || way_back(&workspace, &to)).await?,
                        None => Vec::new(),
                    };
                    Ok(WorkspacePlan { warnings, ..plan })
                };
                context.cancellable(checked).await
            })
            .map(|operation| operation.id())
    }
}

/// Whether work could be brought back so, and what people should know of that.
fn way_back(workspace: &Arc<Workspace>, to: &ExportTo) -> Result<Vec<String>, ExportError> {
    match to {
        ExportTo::Patch | ExportTo::Apply => Ok(Vec::new()),
        ExportTo::Branch { name, .. } => beforehand::branch(workspace, name),
        ExportTo::Files { directory, .. } => beforehand::directory(workspace, directory).map(|()| Vec::new()),
    }
}
