//! Images on disk: layouts and archives, read in place and never written.

mod docker;
mod entries;
mod layout;
mod tree;

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use futures::{StreamExt, TryStreamExt, stream};
use oci_distribution::manifest::OciImageManifest;

pub use self::layout::Layout;
pub(crate) use self::tree::Section;
use self::tree::{Kind, Tar};
use crate::{
    Artifact, ArtifactKind, Descriptor, Digest, ImageSource, Lease, OciError, Platform, ProgressSink, Pulled,
    Select, Store,
    document::Manifest,
    image::Parts,
    progress::{Progress, Reporter},
    store::{Cancel, Cancelled, Partial, blocking},
};

/// How much is copied at once.
const PIECE: usize = 256 << 10;

/// An image that is understood, and where its blobs are.
struct Found {
    /// The manifest's own bytes.
    document: Vec<u8>,
    manifest: Manifest,
    parts: Parts,
    index: Option<Digest>,
    blobs: HashMap<Digest, Section>,
    names: Vec<String>,
}

/// What a path leads to.
pub(crate) fn identify(path: PathBuf, cancelled: &Cancelled) -> Result<ImageSource, OciError> {
    let select = Select::default();
    let about = std::fs::metadata(&path).map_err(|source| OciError::Read { path: path.clone(), source })?;
    if about.is_dir() {
        return match path.join("index.json").is_file() {
            true => Ok(ImageSource::Layout { dir: path, select }),
            false => Err(OciError::NoImage { path, found: "a directory without index.json" }),
        };
    }
    match tree::kind(&path, cancelled) {
        Ok(Kind::Layout) => Ok(ImageSource::LayoutArchive { file: path, select }),
        Ok(Kind::Docker) => Ok(ImageSource::DockerArchive { file: path, select }),
        Ok(Kind::Other) => Ok(ImageSource::Tarball { file: path }),
        Ok(Kind::Empty) => Err(OciError::NoImage { path, found: "an empty archive" }),
        Err(OciError::Malformed { .. }) => Err(OciError::NoImage { path, found: "a file of another kind" }),
        Err(error) => Err(error),
    }
}

/// Takes an image on disk into the store.
pub(crate) async fn load(
    source: ImageSource,
    store: &Store,
    platform: &Platform,
    progress: &ProgressSink,
) -> Result<Pulled, OciError> {
    let (scratch, platform) = (store.scratch().to_owned(), platform.clone());
    let cancel = Cancel::default();
    let cancelled = cancel.told();
    let found = blocking(move || match source.known(&cancelled)? {
        ImageSource::Layout { dir, select } => Layout::open(&dir)?.image(&select, &platform),
        ImageSource::LayoutArchive { file, select } => {
            let tar = Tar::open(&file, &scratch, &cancelled)?;
            Layout::of(Box::new(tar))?.image(&select, &platform)
        }
        ImageSource::DockerArchive { file, select } => {
            docker::image(&Tar::open(&file, &scratch, &cancelled)?, &select, &platform)
        }
        ImageSource::Tarball { file } | ImageSource::Path(file) => {
            Err(OciError::NoImage { path: file, found: "a tar archive without an image in it" })
        }
        ImageSource::Registry(reference) => {
            Err(OciError::Source { text: reference.to_string(), rule: "it is in a registry" })
        }
    })
    .await?;
    drop(cancel);
    let Found { document, manifest, parts, index, mut blobs, names } = found;
    let lease = store.lease();
    let wanted: Vec<_> = manifest.blobs().into_iter().cloned().collect();
    progress(Progress::Begun { blobs: wanted.len(), bytes: manifest.total()? });
    // Hashing is what takes the time.
    let width = std::thread::available_parallelism().map_or(2, |n| n.get().min(4));
    let copies: Vec<_> = wanted
        .into_iter()
        .map(|blob| {
            let section = blobs.remove(&blob.digest);
            keep(store, &lease, blob, section, progress)
        })
        .collect();
    stream::iter(copies).buffer_unordered(width).try_collect::<()>().await?;
    let size = document.len() as u64;
    let digest = store.put(&lease, document).await?;
    Ok(parts.pulled(digest, size, index, &manifest, names, lease))
}

/// Takes an artifact of a layout into the store.
pub(crate) async fn artifact(
    source: ImageSource,
    kind: ArtifactKind,
    store: &Store,
    platform: &Platform,
    progress: &ProgressSink,
) -> Result<Artifact, OciError> {
    let (scratch, platform) = (store.scratch().to_owned(), platform.clone());
    let cancel = Cancel::default();
    let cancelled = cancel.told();
    let (digest, layers) = blocking(move || {
        let (layout, select) = match source.known(&cancelled)? {
            ImageSource::Layout { dir, select } => (Layout::open(&dir)?, select),
            ImageSource::LayoutArchive { file, select } => {
                (Layout::of(Box::new(Tar::open(&file, &scratch, &cancelled)?))?, select)
            }
            other => {
                let rule = "only registries and image layouts have others than images";
                return Err(OciError::Source { text: other.to_string(), rule });
            }
        };
        let understand = move |manifest: &OciImageManifest| kind.layers(manifest);
        let found = layout.manifest(&select, &platform, &understand)?;
        let section = |layer: &Descriptor| Ok((layer.clone(), layout.section(&layer.digest)?));
        let layers = found.manifest.iter().map(section).collect::<Result<Vec<_>, OciError>>()?;
        Ok((Digest::of(&found.document), layers))
    })
    .await?;
    drop(cancel);
    let lease = store.lease();
    let bytes = layers.iter().map(|(layer, _)| layer.size).sum();
    progress(Progress::Begun { blobs: layers.len(), bytes });
    for (layer, section) in &layers {
        keep(store, &lease, layer.clone(), Some(section.clone()), progress).await?;
    }
    let layers = layers.into_iter().map(|(layer, _)| layer).collect();
    Ok(Artifact { digest, layers, store: store.clone(), _lease: Arc::new(lease) })
}

async fn keep(
    store: &Store,
    lease: &Lease,
    blob: Descriptor,
    section: Option<Section>,
    progress: &ProgressSink,
) -> Result<(), OciError> {
    let reporter = Reporter::new(progress, blob.digest, blob.size);
    lease.add(blob.digest);
    let claim = store.claim(blob.digest).await;
    let cancel = Cancel::default();
    let cancelled = cancel.told();
    blocking(move || {
        let what = format!("blob {}", blob.digest);
        let Some(mut partial) = Partial::open(claim, blob.size)? else {
            reporter.done(true);
            return Ok(());
        };
        let section = section.ok_or_else(|| OciError::Malformed {
            what: what.clone(),
            reason: "nothing was found for it".to_owned(),
        })?;
        if section.size != blob.size {
            return Err(OciError::Size { what, found: section.size, expected: blob.size });
        }
        let cloned = match section.whole() {
            Some(file) => partial.clone_of(file)?,
            None => false,
        };
        if !cloned {
            // Reading anew costs no network, and what was there before need not be of this source.
            partial.restart()?;
            let mut piece = vec![0; PIECE];
            let mut at = 0;
            loop {
                match section.read_at(&mut piece, at)? {
                    0 => break,
                    n => {
                        partial.write(&piece[..n])?;
                        at += n as u64;
                    }
                }
                if cancelled.is() {
                    return Ok(());
                }
                reporter.at(at);
            }
        }
        partial.finish(&what)?;
        reporter.done(false);
        Ok(())
    })
    .await?;
    drop(cancel);
    Ok(())
}
