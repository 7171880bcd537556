//! The workspaces' part.

use jsonrpsee::{
    Extensions,
    core::{RpcResult, async_trait},
};
use serde_json::json;
use vm_api::{rpc::WorkspacesServer, *};

use super::Daemon;

#[async_trait]
impl WorkspacesServer for Daemon {
    async fn plan(&self, _: &Extensions, params: PrepareWorkspace) -> RpcResult<Begun> {
        self.begin(OperationKind::WorkspacePlan, "workspace.plan", "*", params)
    }
    async fn check(
        &self,
        _: &Extensions,
        params: PrepareWorkspace,
        export: Option<ExportAs>,
    ) -> RpcResult<Begun> {
        self.begin(OperationKind::WorkspacePlan, "workspace.check", "*", json!([params, export]))
    }
    async fn prepare(&self, _: &Extensions, params: PrepareWorkspace) -> RpcResult<Begun> {
        self.begin(OperationKind::WorkspacePrepare, "workspace.prepare", "*", params)
    }
    async fn list(&self, _: String) -> RpcResult<Vec<WorkspaceRecord>> {
        Ok(Vec::new())
    }
    async fn status(&self, _: &Extensions, params: LookAtWorkspace) -> RpcResult<Begun> {
        self.begin(OperationKind::WorkspaceStatus, "workspace.status", "*", params)
    }
    async fn export(&self, _: &Extensions, params: ExportWorkspace) -> RpcResult<Begun> {
        self.begin(OperationKind::WorkspaceExport, "workspace.export", "*", params)
    }
    async fn read_patch(&self, _: OperationId, _: u64) -> RpcResult<PatchPiece> {
        Ok(PatchPiece { base64: String::new() })
    }
}
