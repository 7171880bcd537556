//! Namespace `image`.

use jsonrpsee::core::{RpcResult, async_trait};
use vm_api::{
    Begun, BuildImage, CatalogueImage, CommitImage, DiskUsage, ExportImage, ImageFormat, ImageRecord,
    ImportImage, Login, PruneImages, PrunedImages, RegisterImage, rpc::ImageServer,
};
use vm_engine::{BuildRequest, CommitRequest};
use vm_oci::Form;

use super::{server::Context, vm::wire};

#[async_trait]
impl ImageServer for Context {
    async fn pull(&self, reference: String, name: Option<String>) -> RpcResult<Begun> {
        Ok(Begun { operation: self.engine.pull_image(&reference, name).map_err(wire)? })
    }

    async fn commit(&self, params: CommitImage) -> RpcResult<Begun> {
        let CommitImage { vm, reference, message, changes } = params;
        let request = CommitRequest { vm, reference, message, changes };
        Ok(Begun { operation: self.engine.commit_image(request).map_err(wire)? })
    }

    async fn build(&self, params: BuildImage) -> RpcResult<Begun> {
        let BuildImage { directory, file, references, arguments, target, no_cache, cpus, memory_mib } =
            params;
        let request =
            BuildRequest { directory, file, references, arguments, target, no_cache, cpus, memory_mib };
        Ok(Begun { operation: self.engine.build_image(request).map_err(wire)? })
    }

    async fn push(&self, image: String, to: Option<String>) -> RpcResult<Begun> {
        Ok(Begun { operation: self.engine.push_image(&image, to).map_err(wire)? })
    }

    async fn export(&self, params: ExportImage) -> RpcResult<Begun> {
        let ExportImage { image, path, format } = params;
        let form = match format {
            ImageFormat::Bundle => {
                return Ok(Begun { operation: self.engine.export_bundle(&image, path).map_err(wire)? });
            }
            ImageFormat::OciArchive => Form::LayoutArchive,
            ImageFormat::Oci => Form::Layout,
            ImageFormat::DockerArchive => Form::DockerArchive,
        };
        Ok(Begun { operation: self.engine.export_image(&image, path, form).map_err(wire)? })
    }

    async fn login(&self, params: Login) -> RpcResult<()> {
        self.engine.login(&params.registry, &params.user, &params.password).await.map_err(wire)
    }

    async fn logout(&self, registry: String) -> RpcResult<()> {
        self.engine.logout(&registry).map_err(wire)
    }

    async fn prune(&self, params: PruneImages) -> RpcResult<PrunedImages> {
        let engine = self.engine.clone();
        let work = async move |mut ctx| engine.prune_images(&mut ctx, params.all, params.dry_run).await;
        self.engine.locks().root("request image.prune", work).await.map_err(wire)
    }

    async fn disk_usage(&self) -> RpcResult<DiskUsage> {
        self.engine.disk_usage().await.map_err(wire)
    }

    async fn import(&self, params: ImportImage) -> RpcResult<Begun> {
        let ImportImage { source, reference, sha256 } = params;
        let operation = self.engine.import_image(&source, reference, sha256.as_deref()).map_err(wire)?;
        Ok(Begun { operation })
    }

    async fn catalogue(&self) -> RpcResult<Vec<CatalogueImage>> {
        self.engine.catalogue().await.map_err(wire)
    }

    async fn register(&self, params: RegisterImage) -> RpcResult<Begun> {
        let RegisterImage { path, reference, kernel, modules } = params;
        Ok(Begun { operation: self.engine.register_image(path, &reference, kernel, modules).map_err(wire)? })
    }

    async fn promote(&self, image: String) -> RpcResult<Begun> {
        Ok(Begun { operation: self.engine.promote_image(&image).map_err(wire)? })
    }

    async fn tag(&self, image: String, reference: String) -> RpcResult<ImageRecord> {
        let engine = self.engine.clone();
        let work = async move |mut ctx| engine.tag_image(&mut ctx, &image, &reference).await;
        self.engine.locks().root("request image.tag", work).await.map_err(wire)
    }

    async fn show(&self, image: String) -> RpcResult<ImageRecord> {
        self.engine.image(&image).await.map_err(wire)
    }

    async fn list(&self) -> RpcResult<Vec<ImageRecord>> {
        let mut images = self.engine.images().await.map_err(wire)?;
        // Of all images at once it is too much; `image.show` tells it of one.
        images.iter_mut().filter_map(|image| image.origin.as_mut()).for_each(|origin| origin.history.clear());
        Ok(images)
    }

    async fn delete(&self, image: String) -> RpcResult<()> {
        let engine = self.engine.clone();
        let work = async move |mut ctx| engine.delete_image(&mut ctx, &image).await;
        self.engine.locks().root("request image.delete", work).await.map_err(wire)
    }
}
