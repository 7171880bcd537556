//! Images that are files of the host's: registered, used where they are, and promoted to the store's own.
//!
//! In the store's directory such an image is a symbolic link, so that whoever makes disks knows of one place only. The file is
//! looked at before each use: what has changed since is not what VMs were promised.

use std::{os::unix::fs::MetadataExt, path::PathBuf};

use vm_host::clock::unix_seconds;
use vm_image::registered;
use vm_locks::{Ctx, Unlocked};
use vm_types::{
    ImageDigest, OperationId,
    image::{ImageRecord, ImportKernel, RegisteredFile},
    operation::OperationKind,
};

use super::{
    not_there,
    oci::{Staged, is_own_file},
    require_absolute, sink,
};
use crate::{Engine, EngineError, ops::OpContext};

/// What VMs of a registered image boot.
#[derive(Debug)]
enum OwnKernel {
    Named(String),
    File(ImportKernel),
}

impl Engine {
    /// Makes a file of the host's an image, in an operation of its own. `kernel` is one of the catalogue, or the path of one that is
    /// put into it, with the directory of its modules; VMs of the image boot it if they name none.
    ///
    /// # Errors
    /// A path or reference that does not fit.
    pub fn register_image(
        &self,
        path: PathBuf,
        reference: &str,
        kernel: Option<String>,
        modules: Option<PathBuf>,
    ) -> Result<OperationId, EngineError> {
        let reference = self.full_name(reference)?;
        require_absolute(&path)?;
        let kernel = match (kernel, modules) {
            (Some(file), modules) if file.starts_with('/') => {
                modules.as_deref().map_or(Ok(()), require_absolute)?;
                Some(OwnKernel::File(ImportKernel::Files { kernel: file.into(), modules }))
            }
            (_, Some(_)) => {
                return Err(EngineError::InvalidArgument {
                    message: "modules belong to a kernel that is given as a file".into(),
                    hint: "a kernel of the catalogue has its modules already; see `vm kernel ls`".into(),
                });
            }
            (name, None) => name.map(OwnKernel::Named),
        };
        let engine = self.clone();
        self.operations()
            .begin(OperationKind::ImageRegister, reference.clone(), move |context, mut ctx| async move {
                let work = engine.register_now(&mut ctx, path, &reference, kernel, &context);
                context.cancellable(work).await
            })
            .map(|operation| operation.id())
    }

    async fn register_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        path: PathBuf,
        reference: &str,
        kernel: Option<OwnKernel>,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        let kernel = match kernel {
            None => None,
            Some(OwnKernel::File(source)) => Some(self.acquire_kernel(ctx, source, context).await?.id),
            Some(OwnKernel::Named(name)) => Some(self.kernel_at_hand(Some(&name)).await?.id),
        };
        let (digest, file) = registered::inspect(&path, sink(context, &format!("{reference}: "))).await?;
        let link = self.inner.layout.image_rootfs(&digest);
        let _catalogue = ctx.lock(&self.inner.catalogue).await;
        self.require_still(kernel.as_ref()).await?;
        let images = self.inner.store.images();
        let known = images.by_digest(digest.hex()).await?;
        // The store has the same content already, which nobody can change.
        let own = known.as_ref().is_some_and(|known| known.registered.is_none()) && link.exists();
        if !own {
            point(&link, &file)?;
        }
        let (config, kept) = known.map(|known| (known.config, known.kernel)).unwrap_or_default();
        let used = std::fs::metadata(&file.path).map_or(file.size_bytes, |about| about.blocks() * 512);
        let record = ImageRecord {
            digest: digest.clone(),
            references: vec![reference.to_string()],
            size_bytes: file.size_bytes,
            used_bytes: used,
            created_at: unix_seconds(),
            source: format!("registered {}", file.path.display()),
            config,
            origin: None,
            registered: (!own).then_some(file),
            kernel: kernel.or(kept),
        };
        images.put(record.clone()).await?;
        Ok(images.by_digest(digest.hex()).await?.unwrap_or(record))
    }

    /// Copies a registered image into the store, in an operation of its own. VMs that use it, use the copy from their next start on.
    /// One that is the store's own already stays as it is.
    ///
    /// # Errors
    /// Another operation that cannot be begun.
    pub fn promote_image(&self, name: &str) -> Result<OperationId, EngineError> {
        let (engine, name) = (self.clone(), name.to_owned());
        self.operations()
            .begin(OperationKind::ImagePromote, name.clone(), move |context, mut ctx| async move {
                let work = async {
                    let image = engine.find_image(&name).await?.ok_or_else(|| not_there(&name))?;
                    let digest = image.digest.clone();
                    let _flight =
                        engine.inner.flights.board(&mut ctx, format!("image {}", digest.short())).await;
                    engine.promote_now(&mut ctx, &name, &digest, &context).await
                };
                context.cancellable(work).await
            })
            .map(|operation| operation.id())
    }

    async fn promote_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        name: &str,
        digest: &ImageDigest,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        let images = self.inner.store.images();
        let image = images.by_digest(digest.hex()).await?.ok_or_else(|| not_there(name))?;
        let Some(file) = image.registered else { return Ok(image) };
        let layout = &self.inner.layout;
        let staged = Staged::new(layout, context);
        let path = layout.image_rootfs(digest);
        // A crash may have come between the copy and its record.
        if !is_own_file(&path) {
            registered::copy(&file, digest, &staged.0, sink(context, &format!("{name}: "))).await?;
        }
        let _catalogue = ctx.lock(&self.inner.catalogue).await;
        // It may have been deleted meanwhile.
        let image = images.by_digest(digest.hex()).await?.ok_or_else(|| not_there(name))?;
        if !is_own_file(&path) {
            staged.settle(&path)?;
        }
        let used_bytes = std::fs::metadata(&path).map_or(image.used_bytes, |about| about.blocks() * 512);
        let promoted = ImageRecord { registered: None, used_bytes, references: Vec::new(), ..image };
        images.put(promoted).await?;
        images.by_digest(digest.hex()).await?.ok_or_else(|| not_there(name))
    }

    /// Refuses the base of a disk that has changed since it was registered. To be asked before the base is used, and after it was
    /// read at length.
    ///
    /// # Errors
    /// [`vm_image::ImageError::RegisteredChanged`], or the file is gone.
    pub(crate) async fn check_base(&self, digest: &ImageDigest) -> Result<(), EngineError> {
        // Of nearly all images the base is a file of the store's.
        if !self.inner.layout.image_rootfs(digest).is_symlink() {
            return Ok(());
        }
        match self.inner.store.images().by_digest(digest.hex()).await?.and_then(|image| image.registered) {
            Some(file) => Ok(registered::check(&file)?),
            None => Ok(()),
        }
    }
}

/// Makes `link` lead to the file, also where it led to another.
fn point(link: &std::path::Path, file: &RegisteredFile) -> Result<(), EngineError> {
    let set = || {
        let staged = link.with_extension("new");
        vm_host::files::remove_if_there(&staged)?;
        std::os::unix::fs::symlink(&file.path, &staged)?;
        std::fs::rename(&staged, link)
    };
    set().map_err(|source| EngineError::File { action: "make", path: link.to_owned(), source })
}
