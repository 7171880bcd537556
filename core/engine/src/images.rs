//! Images: acquiring, naming, listing, deleting. All changes of the catalogue happen under one lock.

pub(crate) mod build;
pub(crate) mod bundle;
pub(crate) mod catalogue;
pub(crate) mod commit;
pub(crate) mod give;
pub(crate) mod oci;
mod registered;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use vm_host::clock::unix_seconds;
use vm_image::{ProgressSink, Reference, reference::Suite, rootfs};
use vm_locks::{Ctx, Unlocked};
use vm_oci::ImageSource;
use vm_types::{
    OperationId,
    image::{ImageConfig, ImageRecord},
    operation::OperationKind,
};

use crate::{Engine, EngineError, ops::OpContext};

/// Digits of a digest as it is shown.
const SHORT: usize = 12;

impl Engine {
    /// Acquires an image in an operation of its own, also if it is there already. It gets `name`, else the name that it has where it
    /// comes from.
    ///
    /// # Errors
    /// A text that nothing can be acquired by.
    pub fn pull_image(&self, text: &str, name: Option<String>) -> Result<OperationId, EngineError> {
        let wanted = self.meant(text)?;
        let name = name.map(|name| self.full_name(&name)).transpose()?;
        let engine = self.clone();
        self.operations()
            .begin(OperationKind::ImagePull, text.to_owned(), move |context, mut ctx| async move {
                let work = async {
                    let _flight = engine.inner.flights.board(&mut ctx, wanted.to_string()).await;
                    engine.pull_now(&mut ctx, &wanted, name, &context).await
                };
                context.cancellable(work).await
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

    /// The image of a reference or a digest.
    ///
    /// # Errors
    /// No such image.
    pub async fn image(&self, name: &str) -> Result<ImageRecord, EngineError> {
        self.find_image(name).await?.ok_or_else(|| not_there(name))
    }

    /// Gives an image one more reference; one that another image had moves here.
    ///
    /// # Errors
    /// No such image, or a reference that is none or that something else is acquired by.
    pub async fn tag_image(
        &self,
        ctx: &mut Ctx<Unlocked>,
        name: &str,
        reference: &str,
    ) -> Result<ImageRecord, EngineError> {
        let reference = self.full_name(reference)?;
        let _catalogue = ctx.lock(&self.inner.catalogue).await;
        let image = self.image(name).await?;
        let images = self.inner.store.images();
        images.put(ImageRecord { references: vec![reference], ..image.clone() }).await?;
        Ok(images.by_digest(image.digest.hex()).await?.unwrap_or(image))
    }

    /// Takes a reference away, and the image with its last one. By digest, the image with all its references.
    ///
    /// # Errors
    /// No such image, or a VM that uses it.
    pub async fn delete_image(&self, ctx: &mut Ctx<Unlocked>, name: &str) -> Result<(), EngineError> {
        let _catalogue = ctx.lock(&self.inner.catalogue).await;
        let images = self.inner.store.images();
        let image = self.find_image(name).await?.ok_or_else(|| not_there(name))?;
        let meant = self.names_of(name).into_iter().find(|name| image.references.contains(name));
        if let Some(reference) = meant.filter(|_| image.references.len() > 1) {
            images.untag(&reference).await?;
            return Ok(());
        }
        self.remove_image(&image).await?;
        self.collect_blobs(oci::PARTIAL).await.map(drop)
    }

    /// Removes record and filesystem. The catalogue's lock is held.
    pub(crate) async fn remove_image(&self, image: &ImageRecord) -> Result<(), EngineError> {
        self.inner.store.images().delete(&image.digest).await?;
        let path = self.inner.layout.image_rootfs(&image.digest);
        vm_host::files::remove_if_there(&path).map_err(|source| EngineError::File {
            action: "remove",
            path,
            source,
        })
    }

    /// Removes files that no record speaks of: a crash between the file and its record leaves them. Only while nothing else runs.
    pub(crate) async fn sweep(&self) -> Result<(), EngineError> {
        self.sweep_builds().await?;
        let layout = &self.inner.layout;
        let mut known: Vec<PathBuf> = Vec::new();
        known.extend(self.images().await?.iter().map(|image| layout.image_rootfs(&image.digest)));
        known.extend(self.kernels().await?.iter().map(|kernel| layout.kernel(&kernel.id)));
        let collected = self.collect_blobs(oci::PARTIAL).await?;
        if collected.bytes > 0 {
            tracing::info!(bytes = collected.bytes, "removed: layers of no image");
        }
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
        // Nobody calls an image what `vm image ls` shows as a digest: that one is not there any more.
        if name.starts_with("sha256:") || (name.len() >= SHORT && is_digest(name)) {
            return Err(not_there(name));
        }
        let wanted = self.meant(name)?;
        let _flight = self.inner.flights.board(ctx, wanted.to_string()).await;
        // Somebody else may have acquired it meanwhile.
        if let Some(image) = self.find_image(name).await? {
            return Ok(image);
        }
        match self.pull_now(ctx, &wanted, None, context).await {
            Err(EngineError::Oci(source)) if matches!(wanted, Wanted::Source(ImageSource::Registry(_))) => {
                Err(EngineError::NotPulled { name: name.to_owned(), source })
            }
            other => other,
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

    async fn find_image(&self, name: &str) -> Result<Option<ImageRecord>, EngineError> {
        let images = self.inner.store.images();
        for reference in self.names_of(name) {
            if let Some(image) = images.by_reference(&reference).await? {
                return Ok(Some(image));
            }
        }
        if is_digest(name) { Ok(images.by_digest(name).await?) } else { Ok(None) }
    }

    /// The names that the store may have what is called so by: one that was given here, then a registry's.
    fn names_of(&self, name: &str) -> Vec<String> {
        if let Some(suite) = made_here(name) {
            return vec![format!("debian:{suite}")];
        }
        let own = name.parse::<Reference>().ok().map(|reference| reference.to_string());
        let defaults = &self.inner.content.defaults;
        let registrys = vm_oci::Reference::parse(name, defaults).ok().map(|reference| reference.to_string());
        let mut names: Vec<_> = own.into_iter().chain(registrys).collect();
        names.dedup();
        names
    }

    /// A name that an image is to get, with its tag; one with a registry's address in full, ready to be pushed.
    ///
    /// # Errors
    /// What is no name, or one that `vm image pull` makes an image for.
    pub(crate) fn full_name(&self, name: &str) -> Result<String, EngineError> {
        if let Some(suite) = made_here(name) {
            return Err(EngineError::InvalidArgument {
                message: format!("debian:{suite} is what `vm image pull` makes"),
                hint: "give the image another name".into(),
            });
        }
        if name.starts_with(catalogue::PREFIX) {
            return Err(EngineError::InvalidArgument {
                message: format!("{name} is what a catalogue has"),
                hint: "give the image another name".into(),
            });
        }
        match name.parse::<Reference>() {
            Ok(reference) => Ok(reference.to_string()),
            // With a port.
            Err(error) => match vm_oci::Reference::parse(name, &self.inner.content.defaults) {
                Ok(reference) if reference.digest().is_none() => Ok(reference.to_string()),
                _ => Err(error.into()),
            },
        }
    }

    fn meant(&self, text: &str) -> Result<Wanted, EngineError> {
        match (made_here(text), text.strip_prefix(catalogue::PREFIX)) {
            (Some(suite), _) => Ok(Wanted::Debian(suite)),
            (None, Some(name)) if catalogue::is_name(name) => Ok(Wanted::Catalogue(name.to_owned())),
            (None, _) => self.source(text).map(Wanted::Source),
        }
    }

    async fn pull_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        wanted: &Wanted,
        name: Option<String>,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        let suite = match wanted {
            Wanted::Source(source) => return self.fetch_now(ctx, source, name, context).await,
            Wanted::Catalogue(wanted) => {
                return self.pull_of_catalogue(ctx, wanted, name, context).await;
            }
            Wanted::Debian(suite) => suite,
        };
        let name = name.unwrap_or_else(|| wanted.to_string());
        let scratch = self.inner.layout.scratch();
        let sink = sink(context, &format!("{wanted}: "));
        let tarball = vm_image::debian::pull(self.inner.runner.as_ref(), suite, &scratch, sink).await?;
        let source = rootfs::TarSource::Path(tarball.path().to_owned());
        let added = self.add_image(ctx, &name, source, format!("mmdebstrap {suite}"), context).await;
        drop(tarball);
        added
    }

    async fn add_image(
        &self,
        ctx: &mut Ctx<Unlocked>,
        reference: &str,
        tar: rootfs::TarSource,
        source: String,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        let layout = &self.inner.layout;
        let staged = oci::Staged::new(layout, context);
        let sink = sink(context, &format!("{reference}: "));
        let built = rootfs::build(tar, &staged.0, &layout.scratch(), sink).await?;
        let path = layout.image_rootfs(&built.digest);
        let _catalogue = ctx.lock(&self.inner.catalogue).await;
        let known = self.inner.store.images().by_digest(built.digest.hex()).await?;
        // VMs may be using the file that is there; the same content need not replace it.
        if known.is_none() || !oci::is_own_file(&path) {
            staged.settle(&path)?;
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
            kernel: known.and_then(|known| known.kernel),
        };
        self.inner.store.images().put(record.clone()).await?;
        Ok(self.inner.store.images().by_digest(record.digest.hex()).await?.unwrap_or(record))
    }
}

/// The suite of an image that is made on this host. Other tags of that name are a registry's, which has `bookworm-slim` and `latest`.
fn made_here(name: &str) -> Option<Suite> {
    match name.parse::<Reference>() {
        Ok(Reference::Debian { suite }) if !suite.as_str().contains('-') && suite.as_str() != "latest" => {
            Some(suite)
        }
        _ => None,
    }
}

/// What a file or directory holds. An archive that is none of images is a root filesystem's, or whoever unpacks it says what is
/// wrong with it.
async fn identify(path: PathBuf) -> Result<ImageSource, vm_oci::OciError> {
    match ImageSource::Path(path.clone()).identify().await {
        Err(vm_oci::OciError::NoImage { .. }) if path.is_file() => Ok(ImageSource::Tarball { file: path }),
        other => other,
    }
}

/// What is to be acquired.
enum Wanted {
    /// A distribution, made on this host.
    Debian(Suite),
    /// An image of a catalogue, by its name there.
    Catalogue(String),
    /// What others have made.
    Source(ImageSource),
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Debian(suite) => write!(f, "debian:{suite}"),
            Self::Catalogue(name) => write!(f, "{}{name}", catalogue::PREFIX),
            Self::Source(source) => source.fmt(f),
        }
    }
}

fn is_digest(name: &str) -> bool {
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    hex.len() >= 4 && hex.bytes().all(|b| b.is_ascii_hexdigit())
}

fn not_there(name: &str) -> EngineError {
    EngineError::NotFound {
        what: "image",
        name: name.to_owned(),
        hint: "`vm image ls` lists those that are there; `vm image pull` and `vm image import FILE.tar NAME` acquire others".into(),
    }
}

pub(crate) fn require_absolute(path: &Path) -> Result<(), EngineError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(EngineError::InvalidArgument {
        message: format!("{} is not an absolute path", path.display()),
        hint: "the daemon has another working directory than its callers".into(),
    })
}

pub(crate) fn sink(context: &OpContext, prefix: &str) -> ProgressSink {
    let (context, prefix) = (context.clone(), prefix.to_owned());
    Arc::new(move |progress| {
        context.progress(format!("{prefix}{}", progress.stage), progress.done, progress.total);
    })
}
