//! Kernels: importing, listing, deleting, and the initramfs that goes with each.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use vm_host::clock::unix_seconds;
use vm_image::kernel;
use vm_locks::{Ctx, Unlocked};
use vm_types::{KernelId, OperationId, image::KernelRecord, operation::OperationKind};

use crate::{
    Engine, EngineError,
    images::{require_absolute, sink},
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
                let work = engine.acquire_kernel(&mut ctx, source, &context);
                context.cancellable(work).await.map(Outcome::Kernel)
            })
            .map(|operation| operation.id())
    }

    /// Puts a kernel into the catalogue.
    ///
    /// # Errors
    /// Files that are no kernel, or a package that cannot be had.
    pub(crate) async fn acquire_kernel(
        &self,
        ctx: &mut Ctx<Unlocked>,
        source: KernelSource,
        context: &OpContext,
    ) -> Result<KernelRecord, EngineError> {
        let _flight = self.inner.flights.board(ctx, KERNEL_FLIGHT).await;
        self.add_kernel(ctx, source, context).await
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
        let images = self.inner.store.images().list().await?;
        if let Some(image) = images.iter().find(|image| image.kernel.as_ref() == Some(&kernel.id)) {
            let name = image.references.first().cloned().unwrap_or_else(|| image.digest.to_string());
            return Err(EngineError::KernelOfImage { kernel: kernel.id, image: name });
        }
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

fn no_kernel(name: &str) -> EngineError {
    EngineError::NotFound {
        what: "kernel",
        name: name.to_owned(),
        hint: "`vm kernel ls` lists those that are there; `vm kernel import debian` acquires one".into(),
    }
}
