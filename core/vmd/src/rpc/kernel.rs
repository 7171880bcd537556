//! Namespace `kernel`.

use jsonrpsee::core::{RpcResult, async_trait};
use vm_api::{Begun, ImportKernel, KernelRecord, rpc::KernelServer};

use super::{server::Context, vm::wire};

#[async_trait]
impl KernelServer for Context {
    async fn import(&self, params: ImportKernel) -> RpcResult<Begun> {
        Ok(Begun { operation: self.engine.import_kernel(params).map_err(wire)? })
    }

    async fn list(&self) -> RpcResult<Vec<KernelRecord>> {
        self.engine.kernels().await.map_err(wire)
    }

    async fn delete(&self, kernel: String) -> RpcResult<()> {
        let engine = self.engine.clone();
        let work = async move |mut ctx| engine.delete_kernel(&mut ctx, &kernel).await;
        self.engine.locks().root("request kernel.delete", work).await.map_err(wire)
    }
}
