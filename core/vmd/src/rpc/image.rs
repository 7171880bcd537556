//! Namespace `image`.

use jsonrpsee::core::{RpcResult, async_trait};
use vm_api::{Begun, ImageRecord, ImportImage, rpc::ImageServer};

use super::{server::Context, vm::wire};

#[async_trait]
impl ImageServer for Context {
    async fn pull(&self, reference: String) -> RpcResult<Begun> {
        Ok(Begun { operation: self.engine.pull_image(&reference).map_err(wire)? })
    }

    async fn import(&self, params: ImportImage) -> RpcResult<Begun> {
        Ok(Begun { operation: self.engine.import_image(params.path, &params.reference).map_err(wire)? })
    }

    async fn list(&self) -> RpcResult<Vec<ImageRecord>> {
        self.engine.images().await.map_err(wire)
    }

    async fn delete(&self, image: String) -> RpcResult<()> {
        let engine = self.engine.clone();
        let work = async move |mut ctx| engine.delete_image(&mut ctx, &image).await;
        self.engine.locks().root("request image.delete", work).await.map_err(wire)
    }
}
