//! Kernels: importing, listing, deleting, and the initramfs that goes with each.
//!
//! A registry has a kernel as an artifact ([`ARTIFACT`]): one layer is the boot file, another may be an archive of its modules, a third
//! its build configuration. An image of a registry names its own by the label [`LABEL`].

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use vm_host::clock::unix_seconds;
use vm_image::kernel;
use vm_locks::{Ctx, Unlocked};
use vm_oci::{ArtifactKind, ImageSource, Reference};
use vm_types::{
    KernelId, OperationId,
    image::{ImportKernel, KernelRecord},
    operation::OperationKind,
};

use crate::{
    Engine, EngineError,
    images::{bundle::WantedFile, oci::transfer, require_absolute, sink},
    ops::{OpContext, Outcome},
};

/// What acquiring kernels is called.
const KERNEL_FLIGHT: &str = "kernel";

/// The label by which an image names the kernel that its VMs boot: a registry's reference.
pub(crate) const LABEL: &str = "vm.kernel";

/// Types of an artifact that is a kernel, and of its layers.
const ARTIFACT: &str = "application/vnd.vm.kernel.v1";
const BOOT_LAYER: &str = "application/vnd.vm.kernel.image.v1";
const CONFIG_LAYER: &str = "application/vnd.vm.kernel.config.v1";
const MODULES_LAYERS: [&str; 3] = [
    "application/vnd.vm.kernel.modules.v1.tar",
    "application/vnd.vm.kernel.modules.v1.tar+gzip",
    "application/vnd.vm.kernel.modules.v1.tar+zstd",
];
/// In bytes.
const BOOT_MAX: u64 = 512 << 20;
const MODULES_MAX: u64 = 4 << 30;
const CONFIG_MAX: u64 = 4 << 20;

const KIND: ArtifactKind = ArtifactKind {
    name: "kernel",
    media_type: ARTIFACT,
    layers: &[
        (BOOT_LAYER, BOOT_MAX),
        (MODULES_LAYERS[0], MODULES_MAX),
        (MODULES_LAYERS[1], MODULES_MAX),
        (MODULES_LAYERS[2], MODULES_MAX),
        (CONFIG_LAYER, CONFIG_MAX),
    ],
};

/// What a kernel is to VMs that name none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The first one is what they boot.
    Usual,
    /// Brought by an image, for that image's VMs: never what others boot.
    OfImages,
}

/// The same as [`ImportKernel`], looked at.
#[derive(Debug)]
enum Wanted {
    Debian,
    Files { kernel: PathBuf, modules: Option<PathBuf> },
    Artifact(ImageSource),
    Bundle(WantedFile),
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
    pub fn import_kernel(&self, source: ImportKernel) -> Result<OperationId, EngineError> {
        let wanted = self.wanted_kernel(source)?;
        let engine = self.clone();
        let subject = match &wanted {
            Wanted::Debian => "debian".to_owned(),
            Wanted::Files { kernel, .. } => kernel.display().to_string(),
            Wanted::Artifact(source) => source.to_string(),
            Wanted::Bundle(file) => file.to_string(),
        };
        self.operations()
            .begin(OperationKind::KernelImport, subject, move |context, mut ctx| async move {
                let work = engine.acquire(&mut ctx, wanted, &context);
                context.cancellable(work).await.map(Outcome::Kernel)
            })
            .map(|operation| operation.id())
    }

    fn wanted_kernel(&self, source: ImportKernel) -> Result<Wanted, EngineError> {
        Ok(match source {
            ImportKernel::Debian => Wanted::Debian,
            ImportKernel::Files { kernel, modules } => {
                require_absolute(&kernel)?;
                modules.as_deref().map_or(Ok(()), require_absolute)?;
                Wanted::Files { kernel, modules }
            }
            ImportKernel::Artifact { reference } => Wanted::Artifact(self.source(&reference)?),
            ImportKernel::Bundle { source, sha256 } => {
                Wanted::Bundle(self.wanted_file(&source, sha256.as_deref())?)
            }
        })
    }

    /// Puts a kernel into the catalogue.
    ///
    /// # Errors
    /// Files that are no kernel, or a package that cannot be had.
    pub(crate) async fn acquire_kernel(
        &self,
        ctx: &mut Ctx<Unlocked>,
        source: ImportKernel,
        context: &OpContext,
    ) -> Result<KernelRecord, EngineError> {
        let wanted = self.wanted_kernel(source)?;
        self.acquire(ctx, wanted, context).await
    }

    async fn acquire(
        &self,
        ctx: &mut Ctx<Unlocked>,
        wanted: Wanted,
        context: &OpContext,
    ) -> Result<KernelRecord, EngineError> {
        match wanted {
            Wanted::Debian => {
                let _flight = self.inner.flights.board(ctx, KERNEL_FLIGHT).await;
                self.add_debian(ctx, context).await
            }
            Wanted::Files { kernel, modules } => {
                let source = kernel.display().to_string();
                let files = kernel::import_files(&kernel, modules.as_deref(), None).await?;
                self.keep_kernel(ctx, (files, source), Standing::Usual).await
            }
            Wanted::Artifact(source) => self.pull_kernel(ctx, &source, Standing::Usual, context).await,
            Wanted::Bundle(file) => self.kernel_of_bundle(ctx, &file, context).await,
        }
    }

    /// Gets a kernel from a registry or layout; nothing of the artifact is kept but what is made of it.
    async fn pull_kernel(
        &self,
        ctx: &mut Ctx<Unlocked>,
        source: &ImageSource,
        standing: Standing,
        context: &OpContext,
    ) -> Result<KernelRecord, EngineError> {
        let content = &self.inner.content;
        let progress = transfer(context, &format!("{source}: "), "downloading");
        let artifact = content.client.artifact(source, KIND, &content.store, &progress).await?;
        let boot = artifact.layer(&[BOOT_LAYER])?.ok_or_else(|| EngineError::InvalidArgument {
            message: format!("{source} has no layer of type {BOOT_LAYER}"),
            hint: "that is where a kernel's artifact has the kernel; docs/images.md says how to push one"
                .into(),
        })?;
        let (modules, config) = (artifact.layer(&MODULES_LAYERS)?, artifact.layer(&[CONFIG_LAYER])?);
        let origin = match source {
            // By which it is known again.
            ImageSource::Registry(reference) => {
                pinned(reference, &reference.digest().unwrap_or(artifact.digest))
            }
            other => other.to_string(),
        };
        let scratch = self.inner.layout.scratch();
        let progress = sink(context, "kernel: ");
        let (modules, config) = (modules.as_deref(), config.as_deref());
        let files =
            kernel::import_archived(&boot, modules, config, origin.clone(), &scratch, progress).await?;
        let kept = self.keep_kernel(ctx, (files, origin), standing).await?;
        drop(artifact);
        self.let_go_of_blobs(ctx).await?;
        Ok(kept)
    }

    /// The kernel that an image's labels name, acquired if it is not there.
    ///
    /// # Errors
    /// A label that names none of a registry's, or the kernel cannot be had.
    pub(crate) async fn labelled_kernel(
        &self,
        ctx: &mut Ctx<Unlocked>,
        labels: &BTreeMap<String, String>,
        context: &OpContext,
    ) -> Result<Option<KernelId>, EngineError> {
        let Some(text) = labels.get(LABEL) else { return Ok(None) };
        let reference = Reference::parse(text, &self.inner.content.defaults)?;
        if let Some(digest) = reference.digest() {
            let known = pinned(&reference, &digest);
            if let Some(kernel) = self.kernels().await?.into_iter().find(|kernel| kernel.source == known) {
                return Ok(Some(kernel.id));
            }
        }
        let source = ImageSource::Registry(reference);
        Ok(Some(self.pull_kernel(ctx, &source, Standing::OfImages, context).await?.id))
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
        // First, so that there is a default whenever there is a kernel that can be one.
        let newest = kernels.list().await?.into_iter().find(|other| other.id != kernel.id && !other.of_image);
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
            None => self.add_debian(ctx, context).await,
        }
    }

    /// The flight is boarded.
    async fn add_debian(
        &self,
        ctx: &mut Ctx<Unlocked>,
        context: &OpContext,
    ) -> Result<KernelRecord, EngineError> {
        let scratch = self.inner.layout.scratch();
        let files =
            kernel::import_debian(self.inner.runner.as_ref(), &scratch, sink(context, "kernel: ")).await?;
        self.install(ctx, (files, "debian".to_owned()), Standing::Usual).await
    }

    /// Puts a kernel into the catalogue, with where it is from.
    pub(crate) async fn keep_kernel(
        &self,
        ctx: &mut Ctx<Unlocked>,
        files: (kernel::KernelSource, String),
        standing: Standing,
    ) -> Result<KernelRecord, EngineError> {
        let _flight = self.inner.flights.board(ctx, KERNEL_FLIGHT).await;
        self.install(ctx, files, standing).await
    }

    /// The same; the flight is boarded.
    async fn install(
        &self,
        ctx: &mut Ctx<Unlocked>,
        (files, source): (kernel::KernelSource, String),
        standing: Standing,
    ) -> Result<KernelRecord, EngineError> {
        let inner = &self.inner;
        let installed = kernel::install(files, &inner.layout.kernels()).await?;
        let _catalogue = ctx.lock(&inner.catalogue).await;
        let default = inner.store.kernels().default().await?;
        let record = KernelRecord {
            default: match &default {
                Some(default) => default.id == installed.id,
                None => standing == Standing::Usual,
            },
            id: installed.id,
            release: installed.release,
            source,
            created_at: unix_seconds(),
            of_image: standing == Standing::OfImages,
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

/// A reference that cannot mean anything else later.
fn pinned(reference: &Reference, digest: &vm_oci::Digest) -> String {
    format!("{}/{}@{digest}", reference.registry(), reference.repository())
}

fn no_kernel(name: &str) -> EngineError {
    EngineError::NotFound {
        what: "kernel",
        name: name.to_owned(),
        hint: "`vm kernel ls` lists those that are there; `vm kernel import` and `vm kernel pull` acquire others".into(),
    }
}
