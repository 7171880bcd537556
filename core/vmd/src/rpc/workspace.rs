//! Namespace `workspace`.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use jsonrpsee::{
    Extensions,
    core::{RpcResult, async_trait},
};
use vm_api::{
    Begun, ErrorKind, ExportAs, ExportWorkspace, LookAtWorkspace, OperationId, PatchPiece, PrepareWorkspace,
    Problem, WorkspaceRecord, rpc::WorkspacesServer,
};
use vm_engine::workspaces::{
    Caller, CheckRequest, ExportRequest, ExportTo, PlanRequest, PrepareRequest, StatusRequest,
};

use super::{
    server::{Context, Peer},
    vm::wire,
};

/// Whose rights are used.
fn caller(extensions: &Extensions) -> RpcResult<Caller> {
    let peer = extensions.get::<Peer>();
    let unknown = || Problem::new(ErrorKind::PermissionDenied, "it is not known who asks");
    Ok(peer.map(|peer| Caller { uid: peer.uid, gid: peer.gid }).ok_or_else(unknown)?)
}

fn export_to(to: ExportAs) -> ExportTo {
    match to {
        ExportAs::Patch => ExportTo::Patch,
        ExportAs::Branch { name, message } => ExportTo::Branch { name, message },
        ExportAs::Files { directory, ignored } => ExportTo::Files { directory, ignored },
        ExportAs::Apply => ExportTo::Apply,
    }
}

#[async_trait]
impl WorkspacesServer for Context {
    async fn plan(&self, extensions: &Extensions, params: PrepareWorkspace) -> RpcResult<Begun> {
        let caller = caller(extensions)?;
        let PrepareWorkspace { path, vm, to, importer, full, user, replace: _ } = params;
        let request = PlanRequest { path, vm, to, importer, full, user, caller };
        Ok(Begun { operation: self.engine.plan_workspace(request).map_err(wire)? })
    }

    async fn check(
        &self,
        extensions: &Extensions,
        params: PrepareWorkspace,
        export: Option<ExportAs>,
    ) -> RpcResult<Begun> {
        let caller = caller(extensions)?;
        let PrepareWorkspace { path, vm: _, to, importer, full, user, replace: _ } = params;
        let plan = PlanRequest { path, vm: None, to, importer, full, user, caller };
        let request = CheckRequest { plan, export: export.map(export_to) };
        Ok(Begun { operation: self.engine.check_workspace(request).map_err(wire)? })
    }

    async fn prepare(&self, extensions: &Extensions, params: PrepareWorkspace) -> RpcResult<Begun> {
        let caller = caller(extensions)?;
        let PrepareWorkspace { path, vm, to, importer, full, user, replace } = params;
        let vm = vm.ok_or_else(|| {
            Problem::new(ErrorKind::InvalidArgument, "a workspace needs a VM to be brought to")
                .hint("name one in `vm`")
        })?;
        let request = PrepareRequest { vm, path, to, importer, full, user, replace, caller };
        Ok(Begun { operation: self.engine.prepare_workspace(request).map_err(wire)? })
    }

    async fn list(&self, vm: String) -> RpcResult<Vec<WorkspaceRecord>> {
        self.engine.workspaces_of(&*self.find(&vm)?).await.map_err(wire)
    }

    async fn status(&self, extensions: &Extensions, params: LookAtWorkspace) -> RpcResult<Begun> {
        let caller = caller(extensions)?;
        let LookAtWorkspace { vm, at, ignored } = params;
        let request = StatusRequest { vm, at, ignored, caller };
        Ok(Begun { operation: self.engine.workspace_status(request).map_err(wire)? })
    }

    async fn export(&self, extensions: &Extensions, params: ExportWorkspace) -> RpcResult<Begun> {
        let caller = caller(extensions)?;
        let ExportWorkspace { vm, at, to, dry_run } = params;
        let request = ExportRequest { vm, at, to: export_to(to), dry_run, caller };
        Ok(Begun { operation: self.engine.export_workspace(request).map_err(wire)? })
    }

    async fn read_patch(&self, operation: OperationId, offset: u64) -> RpcResult<PatchPiece> {
        let piece = self.engine.read_patch(operation, offset).await.map_err(wire)?;
        Ok(PatchPiece { base64: BASE64_STANDARD.encode(piece) })
    }
}
