//! Images and kernels: acquiring, listing, deleting. All changes of the catalogue happen under one lock.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest, Sha256};
use vm_host::clock::unix_seconds;
use vm_image::{ProgressSink, Reference, kernel, rootfs};
use vm_locks::{Ctx, Unlocked};
use vm_types::{
    KernelId, OperationId,
    image::{ImageConfig, ImageRecord, KernelRecord},
    operation::OperationKind,
};

use crate::{
    Engine, EngineError,
    ops::{OpContext, Outcome},
};

/// What acquiring kernels is called.
const KERNEL_FLIGHT: &str = "kernel";

/// Where a kernel comes from.
#[derive(Debug, Clone)]
pub enum KernelSource {
    /// Debian's cloud kernel package.
    Debian,
    /// Files of the host.
    Files {
        /// bzImage or vmlinux.
        kernel: PathBuf,
        /// Directory with `modules.dep`.
        modules: Option<PathBuf>,
    },
}

impl Engine {
    /// Acquires an image in an operation of its own, also if it is there already.
    ///
    /// # Errors
    /// A reference that is none or that nothing can be acquired by.
    pub fn pull_image(&self, reference: &str) -> Result<OperationId, EngineError> {
        let reference: Reference = reference.parse()?;
        if let Reference::Named { .. } = reference {
            return Err(not_there(&reference.to_string()));
        }
        let engine = self.clone();
        self.operations()
            .begin(OperationKind::ImagePull, reference.to_string(), move |context, mut ctx| async move {
                let work = async {
                    let _flight = engine.inner.flights.board(&mut ctx, format!("image {reference}")).await;
                    engine.pull_now(&mut ctx, &reference, &context).await
                };
                context.cancellable(work).await.map(Outcome::Image)
            })
            .map(|operation| operation.id())
    }

    /// Imports a root filesystem tarball in an operation of its own.
    ///
    /// # Errors
    /// A path or reference that does not fit.
    pub fn import_image(&self, path: PathBuf, reference: &str) -> Result<OperationId, EngineError> {
        let reference: Reference = reference.parse()?;
        require_absolute(&path)?;
        let engine = self.clone();
        self.operations()
            .begin(OperationKind::ImageImport, reference.to_string(), move |context, mut ctx| async move {
                let work = async {
                    let source = rootfs::TarSource::Path(path.clone());
                    engine
                        .add_image(
                            &mut ctx,
                            &reference,
                            source,
                            format!("import {}", path.display()),
                            &context,
                        )
                        .await
                };
                context.cancellable(work).await.map(Outcome::Image)
            })
            .map(|operation| operation.id())
    }

    /// All images.
    ///
    /// # Errors
    /// The store.
    pub async fn images(&self) -> Result<Vec<ImageRecord>, EngineError> {
        Ok(self.inner.store.images().list().await?)
    }

    /// Takes a reference away, and the image with its last one. By digest, the image with all its references.
    ///
    /// # Errors
    /// No such image, or a VM that uses it.
    pub async fn delete_image(&self, ctx: &mut Ctx<Unlocked>, name: &str) -> Result<(), EngineError> {
        let _catalogue = ctx.lock(&self.inner.catalogue).await;
        let images = self.inner.store.images();
        let image = self.find_image(name).await?.ok_or_else(|| not_there(name))?;
        let by_reference = image.references.iter().any(|known| Some(known) == normal(name).as_ref());
        if by_reference && image.references.len() > 1 {
            images.untag(&normal(name).unwrap_or_default()).await?;
            return Ok(());
        }
        images.delete(&image.digest).await?;
        let path = self.inner.layout.image_rootfs(&image.digest);
        vm_host::files::remove_if_there(&path).map_err(|source| EngineError::File {
            action: "remove",
            path,
            source,
        })
    }

    /// Removes files that no record speaks of: a crash between the file and its record leaves them. Only while nothing else runs.
    pub(crate) async fn sweep(&self) -> Result<(), EngineError> {
        let layout = &self.inner.layout;
        let mut known: Vec<PathBuf> = Vec::new();
        known.extend(self.images().await?.iter().map(|image| layout.image_rootfs(&image.digest)));
        known.extend(self.kernels().await?.iter().map(|kernel| layout.kernel(&kernel.id)));
        for directory in [layout.images(), layout.kernels()] {
            let Ok(entries) = std::fs::read_dir(&directory) else { continue };
            for path in entries.flatten().map(|entry| entry.path()).filter(|path| !known.contains(path)) {
                tracing::info!(path = %path.display(), "removed: no image or kernel of that name is known");
                let removed =
                    if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                if let Err(error) = removed {
                    tracing::warn!(path = %path.display(), %error, "could not be removed");
                }
            }
        }
        Ok(())
    }

    /// The image, acquired first if it is not there and can be.
    pub(crate) async fn require_image(
        &self,
        ctx: &mut Ctx<Unlocked>,
        name: &str,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        if let Some(image) = self.find_image(name).await? {
            return Ok(image);
        }
        match name.parse::<Reference>() {
            Ok(reference @ Reference::Debian { .. }) => {
                let _flight = self.inner.flights.board(ctx, format!("image {reference}")).await;
                // Somebody else may have acquired it meanwhile.
                match self.find_image(name).await? {
                    Some(image) => Ok(image),
                    None => self.pull_now(ctx, &reference, context).await,
                }
            }
            Ok(Reference::Named { .. }) => Err(not_there(name)),
            // A digest that is not there reads like a bad reference.
            Err(_) if is_digest(name) => Err(not_there(name)),
            Err(error) => Err(error.into()),
        }
    }

    /// The image, if it is there.
    pub(crate) async fn image_at_hand(&self, name: &str) -> Result<ImageRecord, EngineError> {
        self.find_image(name).await?.ok_or_else(|| EngineError::NotFound {
            what: "image",
            name: name.to_owned(),
            hint: format!("acquire it first: vm image pull {name}"),
        })
    }

    /// The kernel, if it is there.
    pub(crate) async fn kernel_at_hand(&self, name: Option<&str>) -> Result<KernelRecord, EngineError> {
        let kernels = self.inner.store.kernels();
        match name {
            Some(name) => kernels.get(name).await?.ok_or_else(|| no_kernel(name)),
            None => kernels.default().await?.ok_or_else(|| EngineError::NotFound {
                what: "kernel",
                name: "(default)".into(),
                hint: "acquire it first: vm kernel import".into(),
            }),
        }
    }

    async fn find_image(&self, name: &str) -> Result<Option<ImageRecord>, EngineError> {
        let images = self.inner.store.images();
        if let Some(reference) = normal(name)
            && let Some(image) = images.by_reference(&reference).await?
        {
            return Ok(Some(image));
        }
        if is_digest(name) { Ok(images.by_digest(name).await?) } else { Ok(None) }
    }

    async fn pull_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        reference: &Reference,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        let Reference::Debian { suite } = reference else { return Err(not_there(&reference.to_string())) };
        let scratch = self.inner.layout.scratch();
        let sink = sink(context, &format!("{reference}: "));
        let tarball = vm_image::debian::pull(self.inner.runner.as_ref(), suite, &scratch, sink).await?;
        let source = rootfs::TarSource::Path(tarball.path().to_owned());
        let added = self.add_image(ctx, reference, source, format!("mmdebstrap {suite}"), context).await;
        drop(tarball);
        added
    }

    async fn add_image(
        &self,
        ctx: &mut Ctx<Unlocked>,
        reference: &Reference,
        tar: rootfs::TarSource,
        source: String,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        let layout = &self.inner.layout;
        let staged = layout.scratch().join(format!("image-{}.ext4", context.id));
        let sink = sink(context, &format!("{reference}: "));
        let built = rootfs::build(self.inner.runner.as_ref(), tar, &staged, &layout.scratch(), sink).await?;
        let path = layout.image_rootfs(&built.digest);
        let _catalogue = ctx.lock(&self.inner.catalogue).await;
        let known = self.inner.store.images().by_digest(built.digest.hex()).await?;
        if known.is_some() && path.exists() {
            // VMs may be using the file that is there; the same content need not replace it.
            let _ = std::fs::remove_file(&staged);
        } else {
            std::fs::rename(&staged, &path).map_err(|source| EngineError::File {
                action: "move into place",
                path: path.clone(),
                source,
            })?;
        }
        let record = ImageRecord {
            digest: built.digest,
            references: vec![reference.to_string()],
            size_bytes: built.size_bytes,
            used_bytes: built.used_bytes,
            created_at: unix_seconds(),
            source,
            config: ImageConfig::default(),
            origin: None,
            registered: None,
            kernel: None,
        };
        self.inner.store.images().put(record.clone()).await?;
        Ok(self.inner.store.images().by_digest(record.digest.hex()).await?.unwrap_or(record))
    }

    /// Imports a kernel in an operation of its own. The first one becomes the default.
    ///
    /// # Errors
    /// A path that does not fit.
    pub fn import_kernel(&self, source: KernelSource) -> Result<OperationId, EngineError> {
        if let KernelSource::Files { kernel, modules } = &source {
            require_absolute(kernel)?;
            modules.as_deref().map_or(Ok(()), require_absolute)?;
        }
        let engine = self.clone();
        let subject = match &source {
            KernelSource::Debian => "debian".to_owned(),
            KernelSource::Files { kernel, .. } => kernel.display().to_string(),
        };
        self.operations()
            .begin(OperationKind::KernelImport, subject, move |context, mut ctx| async move {
                let work = async {
                    let _flight = engine.inner.flights.board(&mut ctx, KERNEL_FLIGHT).await;
                    engine.add_kernel(&mut ctx, source, &context).await
                };
                context.cancellable(work).await.map(Outcome::Kernel)
            })
            .map(|operation| operation.id())
    }

    /// All kernels.
    ///
    /// # Errors
    /// The store.
    pub async fn kernels(&self) -> Result<Vec<KernelRecord>, EngineError> {
        Ok(self.inner.store.kernels().list().await?)
    }

    /// Deletes a kernel.
    ///
    /// # Errors
    /// No such kernel, or a VM that uses it.
    pub async fn delete_kernel(&self, ctx: &mut Ctx<Unlocked>, name: &str) -> Result<(), EngineError> {
        // One that is being imported again has its files before its record.
        let _flight = self.inner.flights.board(ctx, KERNEL_FLIGHT).await;
        let _catalogue = ctx.lock(&self.inner.catalogue).await;
        let kernels = self.inner.store.kernels();
        let kernel = kernels.get(name).await?.ok_or_else(|| no_kernel(name))?;
        // First, so that there is a default whenever there is a kernel.
        let newest = kernels.list().await?.into_iter().find(|other| other.id != kernel.id);
        if let (true, Some(newest)) = (kernel.default, &newest) {
            kernels.set_default(&newest.id).await?;
        }
        if let Err(error) = kernels.delete(&kernel.id).await {
            if kernel.default {
                kernels.set_default(&kernel.id).await?;
            }
            return Err(error.into());
        }
        let path = self.inner.layout.kernel(&kernel.id);
        match std::fs::remove_dir_all(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(EngineError::File { action: "remove", path, source })
            }
            _ => Ok(()),
        }
    }

    /// The kernel that is named, else the default one, acquired first if there is none at all.
    pub(crate) async fn require_kernel(
        &self,
        ctx: &mut Ctx<Unlocked>,
        name: Option<&str>,
        context: &OpContext,
    ) -> Result<KernelRecord, EngineError> {
        let kernels = self.inner.store.kernels();
        if let Some(name) = name {
            return kernels.get(name).await?.ok_or_else(|| no_kernel(name));
        }
        if let Some(kernel) = kernels.default().await? {
            return Ok(kernel);
        }
        let _flight = self.inner.flights.board(ctx, KERNEL_FLIGHT).await;
        match kernels.default().await? {
            Some(kernel) => Ok(kernel),
            None => self.add_kernel(ctx, KernelSource::Debian, context).await,
        }
    }

    async fn add_kernel(
        &self,
        ctx: &mut Ctx<Unlocked>,
        source: KernelSource,
        context: &OpContext,
    ) -> Result<KernelRecord, EngineError> {
        let inner = &self.inner;
        let scratch = inner.layout.scratch();
        let sink = sink(context, "kernel: ");
        let (files, source) = match source {
            KernelSource::Debian => {
                (kernel::import_debian(inner.runner.as_ref(), &scratch, sink).await?, "debian".to_owned())
            }
            KernelSource::Files { kernel, modules } => {
                let source = kernel.display().to_string();
                (kernel::import_files(&kernel, modules.as_deref(), None).await?, source)
            }
        };
        let installed = kernel::install(files, &inner.layout.kernels()).await?;
        let _catalogue = ctx.lock(&inner.catalogue).await;
        let default = inner.store.kernels().default().await?.is_none_or(|default| default.id == installed.id);
        let record = KernelRecord {
            id: installed.id,
            release: installed.release,
            source,
            created_at: unix_seconds(),
            default,
        };
        inner.store.kernels().put(record.clone()).await?;
        Ok(record)
    }

    /// The initramfs all VMs of a kernel share: the agent and the kernel's modules. It is made anew where the agent is another than
    /// last time, so that an upgraded daemon never boots an old agent.
    pub(crate) async fn initramfs_base(
        &self,
        ctx: &mut Ctx<Unlocked>,
        id: &KernelId,
    ) -> Result<PathBuf, EngineError> {
        let _one_at_a_time = ctx.lock(&self.inner.initramfs).await;
        let directory = self.inner.layout.kernel(id);
        let agent_path = self.inner.settings.agent.clone();
        let make = move || {
            let failed = |source| EngineError::Agent { path: agent_path.clone(), source };
            let about = std::fs::metadata(&agent_path).map_err(failed)?;
            // Size and time tell whether to look at the content at all: reading megabytes at each start would show.
            let stamp = format!("{}-{:?}", about.len(), about.modified().map_err(failed)?);
            let tag: String =
                Sha256::digest(stamp).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
            let path = directory.join(format!("initramfs-{tag}.cpio"));
            if path.exists() {
                return Ok(path);
            }
            let file = |path: &Path, action| {
                let path = path.to_owned();
                move |source| EngineError::File { action, path, source }
            };
            for entry in std::fs::read_dir(&directory).map_err(file(&directory, "read"))?.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.starts_with("initramfs-") && name.ends_with(".cpio") {
                    let _ = std::fs::remove_file(entry.path());
                }
            }
            let modules = directory.join("modules.cpio");
            let mut content = kernel::agent_segment(&std::fs::read(&agent_path).map_err(failed)?);
            content.extend(std::fs::read(&modules).map_err(file(&modules, "read"))?);
            vm_host::files::write_atomic(&path, 0o600, &content).map_err(file(&path, "write"))?;
            Ok(path)
        };
        tokio::task::spawn_blocking(make)
            .await
            .map_err(|error| EngineError::Panicked { detail: error.to_string() })?
    }
}

/// A reference as the store has it; `None` for what is none, e.g. a digest.
fn normal(name: &str) -> Option<String> {
    name.parse::<Reference>().ok().map(|reference| reference.to_string())
}

fn is_digest(name: &str) -> bool {
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    hex.len() >= 4 && hex.bytes().all(|b| b.is_ascii_hexdigit())
}

fn not_there(name: &str) -> EngineError {
    EngineError::NotFound {
        what: "image",
        name: name.to_owned(),
        hint: "`vm image ls` lists those that are there; debian:SUITE is acquired by itself; `vm image import FILE.tar NAME` makes one".into(),
    }
}

fn no_kernel(name: &str) -> EngineError {
    EngineError::NotFound {
        what: "kernel",
        name: name.to_owned(),
        hint: "`vm kernel ls` lists those that are there; `vm kernel import debian` acquires one".into(),
    }
}

fn require_absolute(path: &Path) -> Result<(), EngineError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(EngineError::InvalidArgument {
        message: format!("{} is not an absolute path", path.display()),
        hint: "the daemon has another working directory than its callers".into(),
    })
}

fn sink(context: &OpContext, prefix: &str) -> ProgressSink {
    let (context, prefix) = (context.clone(), prefix.to_owned());
    Arc::new(move |progress| {
        context.progress(format!("{prefix}{}", progress.stage), progress.done, progress.total);
    })
}
