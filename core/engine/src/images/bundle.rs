//! Files to import, on this host or by their addresses, and bundles among them.
//!
//! A file by its address is downloaded into the content store, where it is verified, and goes from there when it was imported: what is
//! made of it is kept, not the file.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use vm_host::clock::unix_seconds;
use vm_image::{bundle, rootfs};
use vm_locks::{Ctx, Unlocked};
use vm_oci::{Address, Downloaded, ImageSource, OciError};
use vm_types::{
    ImageDigest, KernelId, OperationId,
    image::{ImageRecord, KernelRecord},
    operation::OperationKind,
};

use super::{
    identify, oci,
    oci::{Staged, transfer},
    require_absolute, sink,
};
use crate::{Engine, EngineError, kernels::Standing, ops::OpContext};

/// A file that somebody wants imported.
#[derive(Debug, Clone)]
pub(crate) struct WantedFile {
    place: Place,
    digest: Option<vm_oci::Digest>,
}

#[derive(Debug, Clone)]
enum Place {
    Path(PathBuf),
    Address(Address),
}

/// A file that is there.
#[derive(Debug)]
pub(crate) struct FileAtHand {
    pub(crate) path: PathBuf,
    /// Keeps it.
    downloaded: Option<Downloaded>,
}

impl fmt::Display for WantedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Path(path) => write!(f, "{}", path.display()),
            Place::Address(address) => write!(f, "{address}"),
        }
    }
}

impl Engine {
    /// What a text means, an absolute path or an address, with the digest that the file must have; one by its address must have one.
    ///
    /// # Errors
    /// A relative path, an address that may not be spoken with, or a digest that is none.
    pub(crate) fn wanted_file(&self, text: &str, sha256: Option<&str>) -> Result<WantedFile, EngineError> {
        let digest = sha256.map(digest).transpose()?;
        if !Address::is_meant(text) {
            let path = PathBuf::from(text);
            require_absolute(&path)?;
            return Ok(WantedFile { place: Place::Path(path), digest });
        }
        let address = self.inner.content.client.address(text)?;
        if digest.is_none() {
            return Err(EngineError::InvalidArgument {
                message: format!("nothing says what {address} must be"),
                hint: "give its digest, as whoever made it tells it: --sha256 DIGITS".into(),
            });
        }
        Ok(WantedFile { place: Place::Address(address), digest })
    }

    pub(super) fn wanted_at(&self, address: Address, digest: vm_oci::Digest) -> WantedFile {
        WantedFile { place: Place::Address(address), digest: Some(digest) }
    }

    /// Downloads a file, if it is not there, and verifies it.
    ///
    /// # Errors
    /// It cannot be had, or is not what its digest says.
    pub(crate) async fn at_hand(
        &self,
        wanted: &WantedFile,
        context: &OpContext,
    ) -> Result<FileAtHand, EngineError> {
        let prefix = format!("{wanted}: ");
        match (&wanted.place, wanted.digest) {
            (Place::Path(path), expected) => {
                if let Some(expected) = expected {
                    let found = vm_oci::Digest::of_file(path, &transfer(context, &prefix, "reading")).await?;
                    if found != expected {
                        return Err(OciError::Digest { what: wanted.to_string(), found, expected }.into());
                    }
                }
                Ok(FileAtHand { path: path.clone(), downloaded: None })
            }
            (Place::Address(address), Some(digest)) => {
                let content = &self.inner.content;
                let progress = transfer(context, &prefix, "downloading");
                let downloaded = content.client.download(address, digest, &content.store, &progress).await?;
                Ok(FileAtHand { path: downloaded.path.clone(), downloaded: Some(downloaded) })
            }
            (Place::Address(address), None) => {
                Err(EngineError::Panicked { detail: format!("{address} without a digest") })
            }
        }
    }

    /// Does something with a file, which goes afterwards if it was downloaded for that.
    pub(super) async fn with_file<T>(
        &self,
        ctx: &mut Ctx<Unlocked>,
        wanted: &WantedFile,
        context: &OpContext,
        work: impl AsyncFnOnce(&mut Ctx<Unlocked>, &Path) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let file = self.at_hand(wanted, context).await?;
        let done = work(ctx, &file.path).await;
        self.let_go(ctx, file).await?;
        done
    }

    /// Removes a file that was downloaded, unless it is something else's, too.
    pub(crate) async fn let_go(&self, ctx: &mut Ctx<Unlocked>, file: FileAtHand) -> Result<(), EngineError> {
        if file.downloaded.is_none() {
            return Ok(());
        }
        drop(file);
        self.let_go_of_blobs(ctx).await
    }

    /// Removes what was fetched into the content store and belongs to nothing.
    pub(crate) async fn let_go_of_blobs(&self, ctx: &mut Ctx<Unlocked>) -> Result<(), EngineError> {
        let _catalogue = ctx.lock(&self.inner.catalogue).await;
        self.collect_blobs(oci::PARTIAL).await.map(drop)
    }

    /// Imports a file or directory in an operation of its own: a bundle, a root filesystem's tarball, an image layout, or what
    /// `docker save` writes. `source` is an absolute path or an address, `sha256` the digest that the file must have.
    ///
    /// # Errors
    /// A path, address or name that does not fit.
    pub fn import_image(
        &self,
        source: &str,
        name: Option<String>,
        sha256: Option<&str>,
    ) -> Result<OperationId, EngineError> {
        let name = name.map(|name| self.full_name(&name)).transpose()?;
        let wanted = self.wanted_file(source, sha256)?;
        let engine = self.clone();
        let subject = name.clone().unwrap_or_else(|| wanted.to_string());
        self.operations()
            .begin(OperationKind::ImageImport, subject, move |context, mut ctx| async move {
                let work = async {
                    let import = async |ctx: &mut Ctx<Unlocked>, path: &Path| {
                        engine.import_now(ctx, path, &wanted.to_string(), name, &context).await
                    };
                    engine.with_file(&mut ctx, &wanted, &context, import).await
                };
                context.cancellable(work).await
            })
            .map(|operation| operation.id())
    }

    /// Makes an image of what is at a path. `from` is where it came from, for people.
    pub(super) async fn import_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        path: &Path,
        from: &str,
        name: Option<String>,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        if let Some(told) = bundle::describe(path).await? {
            return self.import_bundle(ctx, path, told, from, name, context).await;
        }
        match (identify(path.to_owned()).await?, name) {
            (ImageSource::Tarball { file }, Some(name)) => {
                let source = rootfs::TarSource::Path(file);
                self.add_image(ctx, &name, source, format!("import {from}"), context).await
            }
            (ImageSource::Tarball { .. }, None) => Err(EngineError::InvalidArgument {
                message: format!("{from} is a root filesystem, which has no name"),
                hint: "give it one: vm image import FILE NAME".into(),
            }),
            (source, name) => self.fetch_from(ctx, &source, from.to_owned(), name, context).await,
        }
    }

    async fn import_bundle(
        &self,
        ctx: &mut Ctx<Unlocked>,
        path: &Path,
        (metadata, digest): (bundle::Metadata, ImageDigest),
        from: &str,
        name: Option<String>,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        let refused = |message: String, hint: &str| {
            Err(EngineError::InvalidArgument { message, hint: hint.to_owned() })
        };
        if !metadata.has_rootfs() {
            let hint = "`vm kernel import --bundle` imports its kernel";
            return refused(format!("{from} has no root filesystem in it"), hint);
        }
        let reference = match (name, &metadata.name) {
            (Some(name), _) => name,
            (None, Some(own)) => self.full_name(own)?,
            (None, None) => {
                let hint = "give it a name: vm image import FILE NAME";
                return refused(format!("{from} does not say what the image is called"), hint);
            }
        };
        let layout = &self.inner.layout;
        let place = layout.image_rootfs(&digest);
        let prefix = format!("{reference}: ");
        let _flight = self.inner.flights.board(ctx, format!("image {}", digest.short())).await;
        let (mut staged, mut kernel) = (None, None);
        let _catalogue = loop {
            if staged.is_none() && (kernel.is_none() || !self.is_whole(&digest).await?) {
                let (rootfs, want) = match self.is_whole(&digest).await? {
                    true => (None, bundle::Want::Kernel),
                    false => {
                        let rootfs = Staged::new(layout, context);
                        let want = bundle::Want::Image(rootfs.0.clone());
                        (Some(rootfs), want)
                    }
                };
                let progress = sink(context, &prefix);
                let unpacked = bundle::unpack(path, &digest, want, &layout.scratch(), progress).await?;
                kernel = Some(match unpacked.kernel {
                    Some(source) => {
                        let source = (source, format!("bundle {}", digest.short()));
                        Some(self.keep_kernel(ctx, source, Standing::OfImages).await?.id)
                    }
                    None => None,
                });
                staged = rootfs;
            }
            let catalogue = ctx.lock(&self.inner.catalogue).await;
            // It may have been deleted meanwhile.
            if staged.is_some() || self.is_whole(&digest).await? {
                break catalogue;
            }
        };
        let kernel = kernel.flatten();
        self.require_still(kernel.as_ref()).await?;
        if let Some(staged) = staged {
            staged.settle(&place)?;
        }
        let about = std::fs::metadata(&place).map_err(|source| EngineError::File {
            action: "look at",
            path: place.clone(),
            source,
        })?;
        let record = ImageRecord {
            digest: digest.clone(),
            references: vec![reference],
            size_bytes: about.len(),
            used_bytes: std::os::unix::fs::MetadataExt::blocks(&about) * 512,
            created_at: unix_seconds(),
            source: from.to_owned(),
            config: metadata.config,
            origin: None,
            registered: None,
            kernel,
        };
        let images = self.inner.store.images();
        images.put(record.clone()).await?;
        Ok(images.by_digest(digest.hex()).await?.unwrap_or(record))
    }

    /// Refuses a kernel that was deleted while an image that has it was made. The catalogue's lock is held.
    pub(super) async fn require_still(&self, kernel: Option<&KernelId>) -> Result<(), EngineError> {
        match kernel {
            Some(id) => self.kernel_at_hand(Some(id.as_str())).await.map(drop),
            None => Ok(()),
        }
    }

    /// Takes the kernel out of a bundle.
    ///
    /// # Errors
    /// It cannot be had, or has no kernel.
    pub(crate) async fn kernel_of_bundle(
        &self,
        ctx: &mut Ctx<Unlocked>,
        wanted: &WantedFile,
        context: &OpContext,
    ) -> Result<KernelRecord, EngineError> {
        let unpack = async |ctx: &mut Ctx<Unlocked>, path: &Path| {
            let refused = |message: String| {
                Err(EngineError::InvalidArgument {
                    message,
                    hint: "a bundle is what `vm image export --format bundle` writes; `vm kernel import --kernel` takes a kernel's file".into(),
                })
            };
            let Some((_, digest)) = bundle::describe(path).await? else {
                return refused(format!("{wanted} is no bundle"));
            };
            let (progress, scratch) = (sink(context, "kernel: "), self.inner.layout.scratch());
            let unpacked = bundle::unpack(path, &digest, bundle::Want::Kernel, &scratch, progress).await?;
            match unpacked.kernel {
                Some(source) => self.keep_kernel(ctx, (source, wanted.to_string()), Standing::Usual).await,
                None => refused(format!("{wanted} has no kernel in it")),
            }
        };
        self.with_file(ctx, wanted, context, unpack).await
    }

    /// Writes an image to a bundle, in an operation of its own, with the kernel that it names, if it does.
    ///
    /// # Errors
    /// A relative path.
    pub fn export_bundle(&self, name: &str, path: PathBuf) -> Result<OperationId, EngineError> {
        require_absolute(&path)?;
        let (engine, name) = (self.clone(), name.to_owned());
        self.operations()
            .begin(OperationKind::ImageExport, name.clone(), move |context, _| async move {
                let work = engine.export_bundle_now(&name, &path, &context);
                context.cancellable(work).await
            })
            .map(|operation| operation.id())
    }

    async fn export_bundle_now(
        &self,
        name: &str,
        path: &Path,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        let image = self.image(name).await?;
        self.check_base(&image.digest).await?;
        let layout = &self.inner.layout;
        let known = self.names_of(name).into_iter().find(|name| image.references.contains(name));
        let contents = bundle::Contents {
            // What only this host makes, others have under their own names.
            name: known
                .or_else(|| image.references.first().cloned())
                .filter(|name| self.full_name(name).is_ok()),
            rootfs: layout.image_rootfs(&image.digest),
            kernel: image.kernel.as_ref().map(|id| layout.kernel(id)),
            config: image.config.clone(),
        };
        bundle::write(contents, path, sink(context, &format!("{name}: "))).await?;
        if let Err(error) = self.check_base(&image.digest).await {
            // It was made of something that changed on the way.
            let _ = std::fs::remove_file(path);
            return Err(error);
        }
        Ok(image)
    }
}

/// A SHA-256, with or without `sha256:` in front.
pub(super) fn digest(text: &str) -> Result<vm_oci::Digest, EngineError> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
    format!("sha256:{digits}").parse().map_err(|error: vm_oci::DigestError| EngineError::InvalidArgument {
        message: error.to_string(),
        hint: "`sha256sum FILE` prints one".into(),
    })
}
