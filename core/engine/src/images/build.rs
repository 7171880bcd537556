//! Building images by a Dockerfile.
//!
//! ```text
//!   file ── parsed ──> stages ──> steps ─┬─ of the configuration: done here           (stage)
//!   directory ── context ──> items ──────┼─ done before: its layer is in the store    (steps)
//!                                        └─ RUN, COPY, WORKDIR: in a VM               (workshop)
//!                                             └─ files before and after ── difference ──> layer
//! ```
//!
//! A step's layer is kept by a key: all that it depends on, which is the layers below and what it does. A stage whose steps
//! are all known needs no VM; otherwise it has one, made of the layers so far, from the first step that is not. VMs and what was
//! made to boot them go when the build ends, however it does.

mod context;
mod difference;
mod documents;
pub(crate) mod file;
mod ignore;
mod sections;
pub(crate) mod stage;
mod steps;
mod words;
mod workshop;

use std::{
    collections::BTreeMap,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::Poll,
};

use vm_locks::{Ctx, Unlocked};
use vm_oci::{Digest, ImageConfig, Layer, Lease, Pulled};
use vm_store::StoreError;
use vm_types::{ImageDigest, OperationId, image::ImageRecord, operation::OperationKind};

pub use self::context::ContextError;
use self::{
    context::Context,
    file::{File, Step},
    sections::{Base, Section, needed, wanted},
    stage::{Given, Globals, Stage},
    workshop::{Machine, Workshop},
};
use super::{commit::config_of, oci::Arrived, require_absolute};
use crate::{
    Engine, EngineError,
    kernels::LABEL,
    ops::{Made, OpContext},
};

/// The longest Dockerfile, in bytes.
const FILE_MAX: u64 = 4 << 20;
/// Where an image came from that is there only to be booted by a build.
const OF_A_STEP: &str = "a step of a build";

/// What an image is to be built of, and how.
#[derive(Debug, Clone, Default)]
pub struct BuildRequest {
    /// Where files are copied from; absolute.
    pub directory: PathBuf,
    /// The Dockerfile; absolute.
    pub file: PathBuf,
    /// The names that the image gets.
    pub references: Vec<String>,
    /// Values for its `ARG`s.
    pub arguments: BTreeMap<String, String>,
    /// The stage to build; the last one if absent.
    pub target: Option<String>,
    /// Do each step anew.
    pub no_cache: bool,
    /// Of the VM that commands run in.
    pub cpus: Option<u32>,
    /// Of the VM, in MiB.
    pub memory_mib: Option<u64>,
}

/// A stage at work.
#[derive(Debug)]
struct Bench {
    stage: Stage,
    /// What it begins with, where that is an image, and nothing is upon it yet.
    image: Option<ImageRecord>,
    /// The kernel of that image's VMs, and the label that names it.
    kernel: Option<vm_types::KernelId>,
    label: Option<String>,
    workshop: Option<Workshop>,
}

/// A build under way.
struct Build<'a> {
    engine: &'a Engine,
    operation: &'a OpContext,
    context: Arc<Context>,
    given: Given,
    globals: Globals,
    no_cache: bool,
    machine: Machine,
    /// By the stage's number, as far as they were begun.
    benches: BTreeMap<usize, Bench>,
    /// Keeps the layers of all stages.
    lease: Lease,
    /// Of the images that stages begin with, likewise.
    bases: Vec<Pulled>,
    /// Images that were only made to boot.
    helpers: Vec<ImageDigest>,
    warnings: Vec<String>,
    done: usize,
    total: usize,
}

impl Engine {
    /// Builds an image in an operation of its own, which says what its commands write.
    ///
    /// # Errors
    /// Paths and names that do not fit. What is wrong with the file is told by the operation.
    pub fn build_image(&self, mut request: BuildRequest) -> Result<OperationId, EngineError> {
        require_absolute(&request.directory)?;
        require_absolute(&request.file)?;
        let names: Result<Vec<_>, _> = request.references.iter().map(|name| self.full_name(name)).collect();
        request.references = names?;
        let subject =
            request.references.first().cloned().unwrap_or_else(|| request.directory.display().to_string());
        let engine = self.clone();
        self.operations()
            .begin(OperationKind::ImageBuild, subject, move |context, mut ctx| async move {
                Box::pin(engine.build_now(&mut ctx, request, &context)).await
            })
            .map(|operation| operation.id())
    }

    async fn build_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        request: BuildRequest,
        operation: &OpContext,
    ) -> Result<Made, EngineError> {
        operation.progress("reading the build's file", 0, None);
        let (path, directory) = (request.file.clone(), request.directory.clone());
        let read = tokio::task::spawn_blocking(move || {
            let text = context::text(&path, FILE_MAX)
                .map_err(|source| ContextError::Read { path: path.clone(), source })?;
            let context = Context::open(&directory, &path)?;
            Ok::<_, EngineError>((File::parse(&text)?, context))
        });
        let (file, context) =
            read.await.map_err(|error| EngineError::Panicked { detail: error.to_string() })??;
        let mut build = Build {
            engine: self,
            operation,
            context: Arc::new(context),
            given: Given::new(request.arguments.clone()),
            globals: Globals::default(),
            no_cache: request.no_cache,
            machine: Machine { cpus: request.cpus, memory_mib: request.memory_mib },
            benches: BTreeMap::new(),
            lease: self.inner.content.store.lease(),
            bases: Vec::new(),
            helpers: Vec::new(),
            warnings: Vec::new(),
            done: 0,
            total: 0,
        };
        let built = caught(Box::pin(build.all(ctx, file, &request))).await;
        build.close(ctx).await;
        built.unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl Build<'_> {
    /// All stages that the wanted one needs, then the image.
    async fn all(
        &mut self,
        ctx: &mut Ctx<Unlocked>,
        file: File,
        request: &BuildRequest,
    ) -> Result<Made, EngineError> {
        let escape = file.escape;
        let sections = Section::all(file, &mut self.globals, &mut self.given)?;
        let target = wanted(&sections, request.target.as_deref())?;
        let needed = needed(&sections, target);
        self.total = needed.iter().map(|number| sections[*number].steps.len() + 1).sum();
        // Images that are only copied from come first: a name that is mistaken for one is told before anything is run.
        let (sources, stages): (Vec<_>, Vec<_>) =
            sections.iter().enumerate().partition(|(_, section)| section.is_source);
        for (number, section) in sources.into_iter().chain(stages) {
            if needed.contains(&number) {
                Box::pin(self.stage(ctx, &sections, number, section, escape)).await?;
            }
        }
        for name in self.given.unused() {
            self.warnings.push(format!("no ARG asks for {name}"));
        }
        let bench = self.benches.remove(&target).ok_or_else(nothing)?;
        let (stage, mut kernel) = (bench.stage, bench.kernel);
        if let Some(workshop) = bench.workshop {
            workshop.close(self.engine, ctx, self.operation).await;
        }
        let labels = &stage.config.labels;
        if labels.get(LABEL) != bench.label.as_ref() {
            let labelled = Box::pin(self.engine.labelled_kernel(ctx, labels, self.operation));
            kernel = self.operation.cancellable(labelled).await?.or(kernel);
        }
        let source = format!("build {}", request.directory.display());
        let pulled = self.composed(&stage.config, &stage.layers).await?;
        let arrived = Arrived { pulled, references: request.references.clone(), source, kernel };
        let image = Box::pin(self.engine.admit(ctx, arrived, "", self.operation));
        let image = self.operation.cancellable(image).await?;
        Ok(Made { image, warnings: std::mem::take(&mut self.warnings) })
    }

    async fn stage(
        &mut self,
        ctx: &mut Ctx<Unlocked>,
        sections: &[Section],
        number: usize,
        section: &Section,
        escape: char,
    ) -> Result<(), EngineError> {
        self.heading(&section.from);
        let bench =
            Box::pin(self.begin(ctx, section, escape)).await.map_err(|error| at(&section.from, error))?;
        self.benches.insert(number, bench);
        for step in &section.steps {
            self.heading(step);
            Box::pin(self.step(ctx, sections, number, step)).await.map_err(|error| at(step, error))?;
        }
        // Later stages may copy from it; its VM is only in the way of theirs.
        if let Some(workshop) = self.benches.get_mut(&number).and_then(|bench| bench.workshop.take()) {
            workshop.close(self.engine, ctx, self.operation).await;
        }
        Ok(())
    }

    fn heading(&mut self, step: &Step) {
        self.done += 1;
        let text = format!("[{}/{}] {}", self.done, self.total, step.text);
        self.operation.progress(text.clone(), self.done as u64, Some(self.total as u64));
        self.operation.say(format!("{text}\n").as_bytes());
    }

    /// What a stage begins with.
    async fn begin(
        &mut self,
        ctx: &mut Ctx<Unlocked>,
        section: &Section,
        escape: char,
    ) -> Result<Bench, EngineError> {
        match &section.base {
            Base::Nothing => {
                let stage = Stage::new(ImageConfig::default(), Vec::new(), escape);
                Ok(Bench { stage, image: None, kernel: None, label: None, workshop: None })
            }
            Base::Stage(base) => {
                let base = self.benches.get(base).ok_or_else(nothing)?;
                Ok(Bench {
                    stage: base.stage.child(),
                    image: base.image.clone(),
                    kernel: base.kernel.clone(),
                    label: base.label.clone(),
                    workshop: None,
                })
            }
            Base::Image(image) => Box::pin(self.image(ctx, image, escape)).await,
        }
    }

    /// A stage that begins with an image; one that was not made of layers gets one of all its files.
    async fn image(
        &mut self,
        ctx: &mut Ctx<Unlocked>,
        image: &str,
        escape: char,
    ) -> Result<Bench, EngineError> {
        let record = Box::pin(self.engine.require_image(ctx, image, self.operation));
        let record = self.operation.cancellable(record).await?;
        let layered = record.origin.as_ref().is_some_and(|origin| origin.manifest.is_some());
        let (kernel, label) = (record.kernel.clone(), record.config.labels.get(LABEL).cloned());
        if layered {
            let pulled = self.engine.blobs(&record)?;
            let stage = Stage::new(pulled.config.clone(), pulled.layers.clone(), escape);
            self.bases.push(pulled);
            return Ok(Bench { stage, image: Some(record), kernel, label, workshop: None });
        }
        let stage = Stage::new(config_of(&record), Vec::new(), escape);
        let mut bench = Bench { stage, image: Some(record), kernel, label, workshop: None };
        Box::pin(self.whole(ctx, &mut bench, image)).await?;
        Ok(bench)
    }

    /// The image that a VM of a stage boots, made if it is not there.
    async fn bootable(&mut self, ctx: &mut Ctx<Unlocked>, number: usize) -> Result<ImageRecord, EngineError> {
        let bench = self.benches.get(&number).ok_or_else(nothing)?;
        if let Some(image) = &bench.image {
            return Ok(image.clone());
        }
        let (config, layers, kernel) =
            (bench.stage.config.clone(), bench.stage.layers.clone(), bench.kernel.clone());
        let pulled = self.composed(&config, &layers).await?;
        let known = self.engine.inner.store.images().by_digest(&pulled.config_digest.to_string()).await?;
        let image = match known {
            // As it is: it may be somebody's, or another build's.
            Some(known) if self.engine.is_whole(&known.digest).await? => known,
            _ => {
                let (references, source) = (Vec::new(), OF_A_STEP.to_owned());
                let arrived = Arrived { pulled, references, source, kernel };
                let image = Box::pin(self.engine.admit(ctx, arrived, "", self.operation));
                self.operation.cancellable(image).await?
            }
        };
        // Of several builds that use it, the last one to end removes it.
        if is_of_a_step(&image) {
            self.helpers.push(image.digest.clone());
        }
        Ok(image)
    }

    /// An image of layers that are here.
    async fn composed(&self, config: &ImageConfig, layers: &[Layer]) -> Result<Pulled, EngineError> {
        let store = &self.engine.inner.content.store;
        let lease = store.lease();
        layers.iter().for_each(|layer| lease.add(layer.digest));
        Ok(vm_oci::compose(store, lease, config, layers).await?)
    }

    /// Deletes the VMs, and the images that only they needed.
    async fn close(self, ctx: &mut Ctx<Unlocked>) {
        for workshop in self.benches.into_values().filter_map(|bench| bench.workshop) {
            workshop.close(self.engine, ctx, self.operation).await;
        }
        if self.helpers.is_empty() {
            return;
        }
        let _catalogue = ctx.lock(&self.engine.inner.catalogue).await;
        for digest in self.helpers {
            if let Err(error) = self.engine.remove_helper(&digest).await {
                tracing::warn!(%digest, error = %error.chain(), "an image of a build's step could not be removed");
            }
        }
    }
}

impl Engine {
    /// Removes an image of a build's step, unless it has become somebody's since, or a VM uses it. The catalogue's lock is held.
    async fn remove_helper(&self, digest: &ImageDigest) -> Result<(), EngineError> {
        let image = self.inner.store.images().by_digest(digest.hex()).await?.filter(is_of_a_step);
        let Some(image) = image else { return Ok(()) };
        match self.remove_image(&image).await {
            Err(EngineError::Store(error)) if matches!(*error, StoreError::ImageInUse { .. }) => Ok(()),
            removed => removed,
        }
    }

    /// Removes images of builds' steps that a daemon which was killed has left. Only while nothing else runs.
    ///
    /// # Errors
    /// The store.
    pub(super) async fn sweep_builds(&self) -> Result<(), EngineError> {
        for image in self.images().await?.into_iter().filter(is_of_a_step) {
            self.remove_helper(&image.digest).await?;
        }
        Ok(())
    }
}

/// Whether a build has made an image for its own VMs, and nobody has named it.
fn is_of_a_step(image: &ImageRecord) -> bool {
    image.references.is_empty() && image.source == OF_A_STEP
}

/// What a future comes to, or the panic that ended it.
async fn caught<T>(mut work: Pin<Box<impl Future<Output = T>>>) -> std::thread::Result<T> {
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
        Ok(poll) => poll.map(Ok),
        Err(panic) => Poll::Ready(Err(panic)),
    })
    .await
}

/// What to do about arguments of a step that are wrong.
fn hint_of(message: &str) -> String {
    match message.contains("port") && !message.contains('$') {
        true => "write a number, or a range, with or without a protocol: 80, 53/udp, 8000-8010".to_owned(),
        false => "variables are $NAME, ${NAME} and ${NAME:-OTHER}, quotes come in pairs".to_owned(),
    }
}

/// Where an error was met.
fn at(step: &Step, error: EngineError) -> EngineError {
    match error {
        // These say it, or have nothing to do with it.
        error @ (EngineError::BuildFile(_) | EngineError::BuildCommand { .. } | EngineError::Cancelled) => {
            error
        }
        source => {
            EngineError::BuildStep { line: step.line, text: step.text.clone(), source: Box::new(source) }
        }
    }
}

fn nothing() -> EngineError {
    EngineError::Panicked { detail: "a stage of a build is not there".into() }
}

/// A layer as the store's records have it.
fn recorded(layer: &Layer) -> vm_types::image::ImageLayer {
    vm_types::image::ImageLayer {
        digest: layer.digest.to_string(),
        diff_id: layer.diff_id.to_string(),
        size_bytes: layer.size,
        media_type: layer.media_type.clone(),
    }
}

/// Back again; nothing if it is none.
fn layer_of(record: &vm_types::image::ImageLayer) -> Option<Layer> {
    Some(Layer {
        digest: record.digest.parse::<Digest>().ok()?,
        diff_id: record.diff_id.parse().ok()?,
        size: record.size_bytes,
        media_type: record.media_type.clone(),
        // As all that are made here.
        compression: vm_oci::Compression::Zstd,
    })
}
