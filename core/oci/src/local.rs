//! Images on disk: layouts and archives, read in place and never written.

mod docker;
mod layout;
mod tree;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::{StreamExt, TryStreamExt, stream};

pub use self::layout::Layout;
pub(crate) use self::tree::Section;
use self::tree::Tar;
use crate::{
    Descriptor, Digest, ImageSource, Lease, OciError, Platform, ProgressSink, Pulled, Select, Store,
    document::Manifest,
    image::Parts,
    progress::{Progress, Reporter},
    store::{Partial, blocking},
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
pub(crate) fn identify(path: PathBuf) -> Result<ImageSource, OciError> {
    let select = Select::default();
    let about = std::fs::metadata(&path).map_err(|source| OciError::Read { path: path.clone(), source })?;
    if about.is_dir() {
        return match path.join("index.json").is_file() {
            true => Ok(ImageSource::Layout { dir: path, select }),
            false => Err(OciError::NoImage { path, found: "a directory without index.json" }),
        };
    }
    let scratch = std::env::temp_dir();
    let tar = match Tar::open(&path, &scratch, tree::Depth::Names) {
        Ok(tar) => tar,
        Err(OciError::Malformed { .. }) => {
            return Err(OciError::NoImage { path, found: "a file of another kind" });
        }
        Err(error) => return Err(error),
    };
    // Newer `docker save` writes both; the layout keeps the layers as they were pushed.
    if tar.has("oci-layout") && tar.has("index.json") {
        Ok(ImageSource::LayoutArchive { file: path, select })
    } else if tar.has("manifest.json") {
        Ok(ImageSource::DockerArchive { file: path, select })
    } else if tar.is_empty() {
        Err(OciError::NoImage { path, found: "an empty archive" })
    } else {
        Ok(ImageSource::Tarball { file: path })
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
    let found = blocking(move || match source.identify()? {
        ImageSource::Layout { dir, select } => Layout::open(&dir)?.image(&select, &platform),
        ImageSource::LayoutArchive { file, select } => {
            let tar = Tar::open(&file, &scratch, tree::Depth::Content)?;
            Layout::of(Box::new(tar))?.image(&select, &platform)
        }
        ImageSource::DockerArchive { file, select } => {
            docker::image(&Tar::open(&file, &scratch, tree::Depth::Content)?, &select, &platform)
        }
        ImageSource::Tarball { file } | ImageSource::Path(file) => {
            Err(OciError::NoImage { path: file, found: "a tar archive without an image in it" })
        }
        ImageSource::Registry(reference) => {
            Err(OciError::Source { text: reference.to_string(), rule: "it is in a registry" })
        }
    })
    .await?;
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

/// Tells the thread that copies that nobody waits any more.
struct Cancel(Arc<AtomicBool>);

impl Drop for Cancel {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
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
    let cancel = Cancel(Arc::default());
    let cancelled = cancel.0.clone();
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
                if cancelled.load(Ordering::Relaxed) {
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
