//! Namespace `kernel`.

use jsonrpsee::core::{RpcResult, async_trait};
use vm_api::{Begun, ImportKernel, KernelRecord, rpc::KernelServer};
use vm_engine::KernelSource;

use super::{server::Context, vm::wire};

#[async_trait]
impl KernelServer for Context {
    async fn import(&self, params: ImportKernel) -> RpcResult<Begun> {
        let source = match params {
            ImportKernel::Debian => KernelSource::Debian,
            ImportKernel::Files { kernel, modules } => KernelSource::Files { kernel, modules },
            ImportKernel::Artifact { reference } => KernelSource::Artifact { reference },
            ImportKernel::Bundle { source, sha256 } => KernelSource::Bundle { source, sha256 },
        };
        Ok(Begun { operation: self.engine.import_kernel(source).map_err(wire)? })
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
