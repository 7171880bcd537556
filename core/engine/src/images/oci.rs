//! Images of registries, layouts and archives: fetched into the content store, flattened into one filesystem, named.
//!
//! Nothing is locked while bytes come or layers are flattened; the record is written under the catalogue's lock, and what the
//! content store has of images that are no longer there is collected under it.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use vm_host::clock::unix_seconds;
use vm_image::{rootfs, rootfs::LayerSource};
use vm_locks::{Ctx, Unlocked};
use vm_oci::{Digest, ImageSource, OciError, Progress, ProgressSink, Pulled};
use vm_types::{
    ImageDigest, KernelId, Layout,
    image::{ImageConfig, ImageLayer, ImageOrigin, ImageRecord, ImageStep},
};

use super::{require_absolute, sink};
use crate::{Engine, EngineError, ops::OpContext};

/// What is left of a transfer that nobody goes on with is kept for so long.
pub(super) const PARTIAL: Duration = Duration::from_secs(24 * 3600);

/// How images are got.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    /// How registries are spoken with.
    pub settings: vm_oci::Settings,
    /// What a short name means.
    pub defaults: vm_oci::ReferenceDefaults,
    /// Catalogues, by path or address, the first one first.
    pub catalogues: Vec<String>,
}

/// The content store, and who fills it.
#[derive(Debug)]
pub(crate) struct Content {
    pub(crate) client: vm_oci::Client,
    pub(crate) store: vm_oci::Store,
    pub(crate) defaults: vm_oci::ReferenceDefaults,
    pub(crate) catalogues: Vec<String>,
}

impl Content {
    pub(crate) fn open(directory: &Path, registries: Registries) -> Result<Self, OciError> {
        let Registries { settings, defaults, catalogues } = registries;
        let (client, store) = (vm_oci::Client::new(settings)?, vm_oci::Store::open(directory)?);
        Ok(Self { client, store, defaults, catalogues })
    }
}

/// An image whose blobs are all there, and what is to be recorded of it.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) pulled: Pulled,
    /// The names it gets.
    pub(super) references: Vec<String>,
    /// Where it came from, for people.
    pub(super) source: String,
    /// What its VMs boot, unless it has one already.
    pub(super) kernel: Option<KernelId>,
}

impl Engine {
    /// What a text names that is not made on this host.
    ///
    /// # Errors
    /// A text that names nothing, or a relative path.
    pub(crate) fn source(&self, text: &str) -> Result<ImageSource, EngineError> {
        let source = ImageSource::parse(text, &self.inner.content.defaults)?;
        match &source {
            ImageSource::Layout { dir: path, .. }
            | ImageSource::LayoutArchive { file: path, .. }
            | ImageSource::DockerArchive { file: path, .. }
            | ImageSource::Tarball { file: path }
            | ImageSource::Path(path) => require_absolute(path)?,
            _ => {}
        }
        Ok(source)
    }

    /// Fetches an image and makes it bootable. It gets these names, else its own.
    ///
    /// # Errors
    /// It cannot be fetched, is no image, or has no name.
    pub(super) async fn fetch_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        source: &ImageSource,
        name: Option<String>,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        self.fetch_from(ctx, source, source.to_string(), name, context).await
    }

    /// The same of one that people know by another place.
    pub(super) async fn fetch_from(
        &self,
        ctx: &mut Ctx<Unlocked>,
        source: &ImageSource,
        from: String,
        name: Option<String>,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        let content = &self.inner.content;
        let prefix = format!("{from}: ");
        let pulled = content
            .client
            .fetch(source, &content.store, &transfer(context, &prefix, "downloading layers"))
            .await?;
        let references = match name {
            Some(name) => vec![name],
            None => self.own_names(&pulled, source)?,
        };
        let kernel = self.labelled_kernel(ctx, &pulled.config.labels, context).await?;
        let arrived = Arrived { pulled, references, source: from, kernel };
        self.admit(ctx, arrived, &prefix, context).await
    }

    /// Makes an image bootable whose blobs are all there, and gives it these names.
    ///
    /// # Errors
    /// Its layers cannot be unpacked, or the store.
    pub(super) async fn admit(
        &self,
        ctx: &mut Ctx<Unlocked>,
        arrived: Arrived,
        prefix: &str,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        let Arrived { pulled, references, source, kernel } = arrived;
        let digest = image_digest(&pulled.config_digest)?;
        let _flight = self.inner.flights.board(ctx, format!("image {}", digest.short())).await;
        let images = self.inner.store.images();
        let path = self.inner.layout.image_rootfs(&digest);
        let mut staged = None;
        let (_catalogue, known) = loop {
            if staged.is_none() && !self.is_whole(&digest).await? {
                staged = Some(self.flatten(&pulled, &digest, prefix, context).await?);
            }
            let catalogue = ctx.lock(&self.inner.catalogue).await;
            let known = images.by_digest(digest.hex()).await?;
            // It may have been deleted meanwhile.
            if staged.is_some() || (known.is_some() && is_own_file(&path)) {
                break (catalogue, known);
            }
        };
        self.require_still(kernel.as_ref()).await?;
        let origin = match staged {
            Some(staged) => {
                staged.settle(&path)?;
                Some(origin(&pulled))
            }
            // Only layers that were unpacked are known to be those that the configuration speaks of.
            None => known.as_ref().and_then(|known| known.origin.clone()),
        };
        let about = std::fs::metadata(&path).map_err(|source| EngineError::File {
            action: "look at",
            path,
            source,
        })?;
        let record = ImageRecord {
            digest: digest.clone(),
            references,
            size_bytes: about.len(),
            used_bytes: std::os::unix::fs::MetadataExt::blocks(&about) * 512,
            created_at: unix_seconds(),
            source,
            config: config(&pulled),
            origin,
            registered: None,
            kernel: known.and_then(|known| known.kernel).or(kernel),
        };
        images.put(record.clone()).await?;
        drop(pulled);
        Ok(images.by_digest(digest.hex()).await?.unwrap_or(record))
    }

    /// Whether the store has the image's filesystem, and its record.
    pub(super) async fn is_whole(&self, digest: &ImageDigest) -> Result<bool, EngineError> {
        let known = self.inner.store.images().by_digest(digest.hex()).await?;
        Ok(known.is_some() && is_own_file(&self.inner.layout.image_rootfs(digest)))
    }

    async fn flatten(
        &self,
        pulled: &Pulled,
        digest: &ImageDigest,
        prefix: &str,
        context: &OpContext,
    ) -> Result<Staged, EngineError> {
        let layout = &self.inner.layout;
        let staged = Staged::new(layout, context);
        let source = |layer: &vm_oci::Layer| LayerSource {
            blob: self.inner.content.store.path(&layer.digest),
            // The store has verified it when it came.
            digest: None,
            diff_id: Some(layer.diff_id.to_string()),
        };
        let layers: Vec<_> = pulled.layers.iter().map(source).collect();
        let report = sink(context, prefix);
        rootfs::flatten(layers, digest.clone(), &staged.0, &layout.scratch(), report).await?;
        Ok(staged)
    }

    /// The names that an image brings along, in full.
    fn own_names(&self, pulled: &Pulled, source: &ImageSource) -> Result<Vec<String>, EngineError> {
        if let ImageSource::Registry(reference) = source {
            return Ok(vec![reference.to_string()]);
        }
        let full = |name: &String| vm_oci::Reference::parse(name, &self.inner.content.defaults).ok();
        let names: Vec<_> = pulled
            .names
            .iter()
            // A layout's tag alone is no name.
            .filter(|name| name.contains([':', '/']))
            .filter_map(full)
            .map(|name| name.to_string())
            .collect();
        if names.is_empty() {
            let tags = pulled.names.join(", ");
            let message = match tags.as_str() {
                "" => format!("{source} does not say what the image is called"),
                tags => format!("{source} calls the image {tags} only, which is a tag and no name"),
            };
            let hint = "give it a name: vm image pull SOURCE --name NAME, vm image import FILE NAME".into();
            return Err(EngineError::InvalidArgument { message, hint });
        }
        Ok(names)
    }

    /// The image's blobs in the content store.
    ///
    /// # Errors
    /// It was not made of any, or they are gone.
    pub(super) fn blobs(&self, image: &ImageRecord) -> Result<Pulled, EngineError> {
        let manifest = image.origin.as_ref().and_then(|origin| origin.manifest.as_deref()?.parse().ok());
        let manifest: Digest = manifest.ok_or_else(|| EngineError::InvalidArgument {
            message: format!("image {} was not made of layers", image.digest.short()),
            hint: "images of registries, layouts and docker's archives are; of others make a bundle: --format bundle"
                .into(),
        })?;
        Ok(Pulled::open(&self.inner.content.store, &manifest)?)
    }

    /// Removes blobs of images that are no longer there. The catalogue's lock is held.
    ///
    /// # Errors
    /// The store, or the content store.
    pub(super) async fn collect_blobs(
        &self,
        partials_older_than: Duration,
    ) -> Result<vm_oci::Collected, EngineError> {
        let mut live = self.live_blobs(&[]).await?;
        live.extend(self.built_blobs().await?);
        let store = self.inner.content.store.clone();
        on_a_thread(move || store.collect(&live, partials_older_than)).await
    }

    /// What [`Engine::collect_blobs`] would remove if these images, and builds' layers that no other has, were no longer there.
    ///
    /// # Errors
    /// The store, or the content store.
    pub(super) async fn collectable_blobs(
        &self,
        without: &[ImageDigest],
        partials_older_than: Duration,
    ) -> Result<vm_oci::Collected, EngineError> {
        let live = self.live_blobs(without).await?;
        let store = self.inner.content.store.clone();
        on_a_thread(move || store.collectable(&live, partials_older_than)).await
    }

    /// The blobs of all images but these.
    async fn live_blobs(&self, without: &[ImageDigest]) -> Result<HashSet<Digest>, EngineError> {
        let mut live = HashSet::new();
        let images = self.inner.store.images().list().await?.into_iter();
        let images = images.filter(|image| !without.contains(&image.digest));
        for origin in images.filter_map(|image| image.origin) {
            let layers = origin.layers.into_iter().map(|layer| layer.digest);
            let digests = layers.chain(origin.manifest).chain([origin.config]);
            live.extend(digests.filter_map(|digest| digest.parse::<Digest>().ok()));
        }
        Ok(live)
    }

    /// Layers that steps of builds have made.
    async fn built_blobs(&self) -> Result<HashSet<Digest>, EngineError> {
        let steps = self.inner.store.builds().list().await?.into_iter();
        let layers = steps.filter_map(|(_, step)| step.layer);
        Ok(layers.filter_map(|layer| layer.digest.parse().ok()).collect())
    }

    /// Forgets steps of builds whose layers no image has. The catalogue's lock is held.
    ///
    /// # Errors
    /// The store.
    pub(super) async fn forget_builds(&self) -> Result<(), EngineError> {
        let live = self.live_blobs(&[]).await?;
        let builds = self.inner.store.builds();
        let unused = builds.list().await?.into_iter().filter(|(_, step)| {
            let layer = step.layer.as_ref().and_then(|layer| layer.digest.parse::<Digest>().ok());
            layer.is_none_or(|layer| !live.contains(&layer))
        });
        Ok(builds.forget(unused.map(|(key, _)| key).collect()).await?)
    }
}

pub(super) async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, OciError> + Send + 'static,
) -> Result<T, EngineError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| EngineError::Panicked { detail: error.to_string() })??)
}

/// A filesystem that is not in its place yet; removed unless it gets there.
pub(super) struct Staged(pub(super) PathBuf);

impl Staged {
    pub(super) fn new(layout: &Layout, context: &OpContext) -> Self {
        Self(layout.scratch().join(format!("image-{}.ext4", context.id)))
    }

    /// Puts it where it belongs.
    pub(super) fn settle(self, path: &Path) -> Result<(), EngineError> {
        std::fs::rename(&self.0, path).map_err(|source| EngineError::File {
            action: "move into place",
            path: path.to_owned(),
            source,
        })
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // It is not there where it was moved.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Whether an image's filesystem is there as a file of the store's own, and not as a link to a registered one.
pub(super) fn is_own_file(rootfs: &Path) -> bool {
    rootfs.exists() && !rootfs.is_symlink()
}

fn image_digest(digest: &Digest) -> Result<ImageDigest, EngineError> {
    ImageDigest::try_from(digest.to_string())
        .map_err(|error| EngineError::Panicked { detail: error.to_string() })
}

fn config(pulled: &Pulled) -> ImageConfig {
    let given = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    let config = &pulled.config;
    ImageConfig {
        env: config.env.clone(),
        working_dir: given(&config.working_dir),
        user: given(&config.user),
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        labels: config.labels.clone(),
        exposed_ports: config.exposed_ports.clone(),
    }
}

fn origin(pulled: &Pulled) -> ImageOrigin {
    let layer = |layer: &vm_oci::Layer| ImageLayer {
        digest: layer.digest.to_string(),
        diff_id: layer.diff_id.to_string(),
        size_bytes: layer.size,
        media_type: layer.media_type.clone(),
    };
    let step = |step: &vm_oci::History| ImageStep {
        created: step.created.clone(),
        created_by: step.created_by.clone(),
        comment: step.comment.clone(),
        empty_layer: step.empty_layer,
    };
    ImageOrigin {
        manifest: Some(pulled.manifest_digest.to_string()),
        config: pulled.config_digest.to_string(),
        layers: pulled.layers.iter().map(layer).collect(),
        history: pulled.config.history.iter().map(step).collect(),
    }
}

/// Tells how many bytes of all blobs are there.
pub(crate) fn transfer(context: &OpContext, prefix: &str, what: &'static str) -> ProgressSink {
    #[derive(Default)]
    struct Sum {
        total: Option<u64>,
        blobs: HashMap<Digest, u64>,
    }
    let (context, prefix, sum) = (context.clone(), prefix.to_owned(), Arc::new(Mutex::new(Sum::default())));
    Arc::new(move |progress| {
        let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stage = what.to_owned();
        match progress {
            Progress::Begun { bytes, .. } => sum.total = Some(bytes),
            Progress::Blob { digest, done, .. } => drop(sum.blobs.insert(digest, done)),
            Progress::Done { digest, size, .. } => drop(sum.blobs.insert(digest, size)),
            Progress::Retry { reason, wait } => {
                stage = format!("trying again in {:.0?}: {reason}", wait);
            }
            _ => {}
        }
        context.progress(format!("{prefix}{stage}"), sum.blobs.values().sum(), sum.total);
    })
}
