//! Images given to others, who we are at registries, and what is thrown away.

use std::{os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

use vm_locks::{Ctx, Unlocked};
use vm_oci::{Form, ImageSource};
use vm_store::StoreError;
use vm_types::{
    OperationId,
    image::{DiskUsage, ImageRecord, PrunedImages},
    operation::OperationKind,
};

use super::{oci::transfer, require_absolute};
use crate::{Engine, EngineError};

impl Engine {
    /// Sends an image to a registry in an operation of its own: under the name it has, or another one.
    ///
    /// # Errors
    /// A name that is none of a registry's.
    pub fn push_image(&self, name: &str, to: Option<String>) -> Result<OperationId, EngineError> {
        let target = to.unwrap_or_else(|| name.to_owned());
        let reference = match ImageSource::parse(&target, &self.inner.content.defaults)? {
            ImageSource::Registry(reference) => reference,
            other => {
                return Err(EngineError::InvalidArgument {
                    message: format!("{other} is no registry's image"),
                    hint: "push to REGISTRY/NAME:TAG; `vm image export` writes files".into(),
                });
            }
        };
        let (engine, name) = (self.clone(), name.to_owned());
        self.operations()
            .begin(OperationKind::ImagePush, reference.to_string(), move |context, _| async move {
                let work = async {
                    let image = engine.image(&name).await?;
                    let blobs = engine.blobs(&image)?;
                    let content = &engine.inner.content;
                    let progress = transfer(&context, &format!("{reference}: "), "uploading layers");
                    content.client.push(&blobs, &content.store, &reference, &progress).await?;
                    Ok(image)
                };
                context.cancellable(work).await
            })
            .map(|operation| operation.id())
    }

    /// Writes an image to `path`, where nothing may be, in an operation of its own.
    ///
    /// # Errors
    /// A relative path.
    pub fn export_image(&self, name: &str, path: PathBuf, form: Form) -> Result<OperationId, EngineError> {
        require_absolute(&path)?;
        let (engine, name) = (self.clone(), name.to_owned());
        self.operations()
            .begin(OperationKind::ImageExport, name.clone(), move |context, _| async move {
                let work = async {
                    let image = engine.image(&name).await?;
                    let blobs = engine.blobs(&image)?;
                    context.progress(format!("{name}: writing {}", path.display()), 0, None);
                    // By the name it was asked for, where it has one.
                    let known =
                        engine.names_of(&name).into_iter().find(|name| image.references.contains(name));
                    let called = known.or_else(|| image.references.first().cloned());
                    vm_oci::export(&blobs, &engine.inner.content.store, form, &path, called.as_deref())
                        .await?;
                    Ok(image)
                };
                context.cancellable(work).await
            })
            .map(|operation| operation.id())
    }

    /// Asks a registry whether name and password are right, and keeps them if so.
    ///
    /// # Errors
    /// They are not, or the registry cannot be asked.
    pub async fn login(&self, registry: &str, user: &str, password: &str) -> Result<(), EngineError> {
        let file = self.inner.layout.registry_logins();
        Ok(self.inner.content.client.login(registry, user, password, &file).await?)
    }

    /// Forgets name and password at a registry.
    ///
    /// # Errors
    /// None were kept here, or the file cannot be written.
    pub fn logout(&self, registry: &str) -> Result<(), EngineError> {
        if vm_oci::forget(&self.inner.layout.registry_logins(), registry)? {
            return Ok(());
        }
        Err(EngineError::NotFound {
            what: "login at",
            name: registry.to_owned(),
            hint: "`vm image login` makes one; those of docker's own config.json are docker's to forget"
                .into(),
        })
    }

    /// Removes images that no VM uses: those without a name, or all. The default image stays unless it is among `all`.
    ///
    /// # Errors
    /// The store, or a file that cannot be removed.
    pub async fn prune_images(
        &self,
        ctx: &mut Ctx<Unlocked>,
        all: bool,
        dry_run: bool,
    ) -> Result<PrunedImages, EngineError> {
        let _catalogue = ctx.lock(&self.inner.catalogue).await;
        let mut pruned = PrunedImages::default();
        let mut goes = Vec::new();
        for image in self.unused().await?.into_iter().filter(|image| all || image.references.is_empty()) {
            if !dry_run {
                match self.remove_image(&image).await {
                    // A VM was made of it just now.
                    Err(EngineError::Store(error)) if matches!(*error, StoreError::ImageInUse { .. }) => {
                        continue;
                    }
                    other => other?,
                }
            }
            pruned.bytes += if image.registered.is_none() { image.used_bytes } else { 0 };
            goes.push(image.digest.clone());
            pruned.images.push(image);
        }
        pruned.bytes += match dry_run {
            true => self.collectable_blobs(&goes, Duration::ZERO).await?,
            false => {
                self.forget_builds().await?;
                self.collect_blobs(Duration::ZERO).await?
            }
        }
        .bytes;
        Ok(pruned)
    }

    /// Images that no VM uses.
    async fn unused(&self) -> Result<Vec<ImageRecord>, EngineError> {
        let mut images = self.images().await?;
        let vms = self.inner.store.vms().list().await?;
        images.retain(|image| !vms.iter().any(|vm| vm.spec.image == image.digest));
        Ok(images)
    }

    /// What is where on the disk.
    ///
    /// # Errors
    /// The store.
    pub async fn disk_usage(&self) -> Result<DiskUsage, EngineError> {
        let own = |images: &[ImageRecord]| {
            images.iter().filter(|image| image.registered.is_none()).map(|image| image.used_bytes).sum()
        };
        let layers = self.inner.content.store.usage()?;
        let layout = self.inner.layout.clone();
        let measure = move || (taken(&layout.kernels()), taken(&layout.state.join("vms")));
        let (kernels, vms) = tokio::task::spawn_blocking(measure)
            .await
            .map_err(|error| EngineError::Panicked { detail: error.to_string() })?;
        Ok(DiskUsage {
            images: own(&self.images().await?),
            images_unused: own(&self.unused().await?),
            layers: layers.blobs + layers.partials,
            kernels,
            vms,
        })
    }
}

/// What is below a directory, in bytes on the disk. What vanishes meanwhile does not count.
fn taken(directory: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let about = entry.metadata().ok()?;
            Some(if about.is_dir() { taken(&entry.path()) } else { about.blocks() * 512 })
        })
        .sum()
}
