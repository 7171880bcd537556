//! Blobs by their digests, shared between images.
//!
//! ```text
//!   <dir>/blobs/sha256/<hex>    whole, verified, read-only
//!   <dir>/ingest/<hex>          what is there so far of one that is being fetched
//! ```
//!
//! A blob comes to be in one way: its bytes go to the file in `ingest`, are hashed on the way, and only when all of them are there
//! and the digest is right is the file flushed to disk and renamed. So a blob that has its name is whole, whenever the power goes.
//! What is left in `ingest` by a crash is taken up where it ends, and hashed anew, or swept.
//!
//! # Who may remove what
//! [`Store::collect`] removes blobs that its caller does not list as live. The caller holds whatever lock guards its own records;
//! downloads need not hold it: a blob that a transfer uses is kept by its [`Lease`] until the caller has recorded the image and drops
//! it. Leases are in memory, so one process owns a store; a second one is kept from writing the same blob by a lock on its file.

mod partial;

use std::{
    collections::{HashMap, HashSet},
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

pub(crate) use self::partial::{Ingest, Partial, Rejected};
#[cfg(test)]
use crate::Descriptor;
use crate::{Digest, OciError};

/// A directory of blobs. Clones share it, and the leases on it.
///
/// Its functions that are not `async` read or write directories and small files: call them where that may block.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    blobs: PathBuf,
    ingest: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many leases there are on each blob.
    leases: HashMap<Digest, usize>,
    /// Who writes a blob holds its lock; others wait for it.
    writers: HashMap<Digest, Weak<tokio::sync::Mutex<()>>>,
}

impl State {
    /// Whether somebody writes the blob, or wants to.
    fn at_work(&self, digest: &Digest) -> bool {
        let written = self.writers.get(digest).is_some_and(|lock| lock.strong_count() > 0);
        written || self.leases.contains_key(digest)
    }
}

/// Keeps blobs from being removed as long as it lives.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    digests: Mutex<HashSet<Digest>>,
}

/// What [`Store::collect`] has removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Blobs.
    pub blobs: u64,
    /// Unfinished ones.
    pub partials: u64,
    /// Bytes of both.
    pub bytes: u64,
}

/// What is in a store, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of all blobs.
    pub blobs: u64,
    /// Of unfinished ones.
    pub partials: u64,
}

/// The right to write one blob, within this process.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(super) store: Store,
    pub(super) digest: Digest,
    _lock: tokio::sync::OwnedMutexGuard<()>,
}

/// How much is written of what nobody knows the size of, before the disk is looked at again, in bytes.
pub(crate) const STRIDE: u64 = 64 << 20;

/// Refuses to write so many bytes more to a directory where they would fill the disk.
pub(crate) fn room(dir: &Path, bytes: u64) -> Result<(), OciError> {
    vm_host::files::room(dir, bytes).map_err(failed("write to", dir))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OciError {
    move |source| OciError::Store { action, path: path.to_owned(), source }
}

impl Store {
    /// Opens the store in a directory, which is made if it is not there.
    ///
    /// # Errors
    /// [`OciError::Store`].
    pub fn open(dir: &Path) -> Result<Self, OciError> {
        let (blobs, ingest) = (dir.join("blobs/sha256"), dir.join("ingest"));
        for dir in [&blobs, &ingest] {
            DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("make", dir))?;
        }
        Ok(Self { inner: Arc::new(Inner { blobs, ingest, state: Mutex::default() }) })
    }

    /// The file that a blob is in, if it is there. It is never written again.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.inner.blobs.join(digest.hex())
    }

    fn partial_path(&self, digest: &Digest) -> PathBuf {
        self.inner.ingest.join(digest.hex())
    }

    /// How large a blob is; `None` where it is not there.
    ///
    /// # Errors
    /// [`OciError::Store`].
    pub fn size(&self, digest: &Digest) -> Result<Option<u64>, OciError> {
        let path = self.path(digest);
        match fs::symlink_metadata(&path) {
            Ok(about) => Ok(Some(about.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("look at", &path)(error)),
        }
    }

    /// Whether a blob is there.
    ///
    /// # Errors
    /// [`OciError::Store`].
    pub fn has(&self, digest: &Digest) -> Result<bool, OciError> {
        Ok(self.size(digest)?.is_some())
    }

    /// Opens a blob for reading; `what` is told where it is not there.
    ///
    /// # Errors
    /// [`OciError::Gone`] or [`OciError::Store`].
    pub fn open_blob(&self, what: &'static str, digest: &Digest) -> Result<File, OciError> {
        let path = self.path(digest);
        File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => OciError::Gone { what, digest: *digest },
            _ => failed("open", &path)(error),
        })
    }

    /// A small blob, verified again.
    ///
    /// # Errors
    /// [`OciError::Gone`], [`OciError::Large`], [`OciError::Digest`] or [`OciError::Store`].
    pub fn read(&self, what: &'static str, digest: &Digest, most: u64) -> Result<Vec<u8>, OciError> {
        let Some(size) = self.size(digest)? else {
            return Err(OciError::Gone { what, digest: *digest });
        };
        if size > most {
            return Err(OciError::Large { what: what.to_owned(), bytes: size, most });
        }
        let path = self.path(digest);
        let bytes = fs::read(&path).map_err(failed("read", &path))?;
        match Digest::of(&bytes) {
            found if found == *digest => Ok(bytes),
            found => Err(OciError::Digest { what: what.to_owned(), found, expected: *digest }),
        }
    }

    /// All blobs with their sizes in bytes, in no order.
    ///
    /// # Errors
    /// [`OciError::Store`].
    pub fn list(&self) -> Result<Vec<(Digest, u64)>, OciError> {
        let all = files(&self.inner.blobs)?;
        Ok(all.into_iter().map(|(digest, about)| (digest, about.len())).collect())
    }

    /// What the store takes.
    ///
    /// # Errors
    /// [`OciError::Store`].
    pub fn usage(&self) -> Result<Usage, OciError> {
        let sum = |dir| files(dir).map(|files| files.iter().map(|(_, about)| about.len()).sum());
        Ok(Usage { blobs: sum(&self.inner.blobs)?, partials: sum(&self.inner.ingest)? })
    }

    /// Removes one blob; whether it was there.
    ///
    /// # Errors
    /// [`OciError::InUse`] while there is a lease on it, or [`OciError::Store`].
    pub fn remove(&self, digest: &Digest) -> Result<bool, OciError> {
        let state = self.state();
        if state.leases.contains_key(digest) {
            return Err(OciError::InUse { digest: *digest });
        }
        let path = self.path(digest);
        // Under the lock, so that no lease comes in between.
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed("remove", &path)(error)),
        }
    }

    /// Removes all blobs that are neither live nor leased, and what is left of transfers that nobody has touched for this long.
    /// What is being written now is left alone.
    ///
    /// The caller keeps its records from changing meanwhile, so that `live` stays true; transfers may go on.
    ///
    /// # Errors
    /// [`OciError::Store`]; what was removed so far stays removed, and another call goes on.
    pub fn collect(
        &self,
        live: &HashSet<Digest>,
        partials_older_than: Duration,
    ) -> Result<Collected, OciError> {
        let mut collected = Collected::default();
        for (digest, about) in files(&self.inner.blobs)? {
            if live.contains(&digest) {
                continue;
            }
            match self.remove(&digest) {
                Ok(true) => {
                    collected.blobs += 1;
                    collected.bytes += about.len();
                }
                Ok(false) | Err(OciError::InUse { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        for (digest, about) in files(&self.inner.ingest)? {
            if age(&about) >= partials_older_than && self.sweep(&digest)? {
                collected.partials += 1;
                collected.bytes += about.len();
            }
        }
        Ok(collected)
    }

    /// What [`Store::collect`] would remove now.
    ///
    /// # Errors
    /// [`OciError::Store`].
    pub fn collectable(
        &self,
        live: &HashSet<Digest>,
        partials_older_than: Duration,
    ) -> Result<Collected, OciError> {
        let mut found = Collected::default();
        for (digest, about) in files(&self.inner.blobs)? {
            if !live.contains(&digest) && !self.state().leases.contains_key(&digest) {
                found.blobs += 1;
                found.bytes += about.len();
            }
        }
        for (digest, about) in files(&self.inner.ingest)? {
            if age(&about) >= partials_older_than && !self.state().at_work(&digest) {
                found.partials += 1;
                found.bytes += about.len();
            }
        }
        Ok(found)
    }

    /// Removes what is left of one transfer, if nobody goes on with it.
    fn sweep(&self, digest: &Digest) -> Result<bool, OciError> {
        let state = self.state();
        if state.at_work(digest) {
            return Ok(false);
        }
        partial::remove(&self.partial_path(digest))
    }

    /// A lease without blobs.
    pub fn lease(&self) -> Lease {
        Lease { store: self.clone(), digests: Mutex::default() }
    }

    /// Waits until nobody else in this process writes the blob.
    pub(crate) async fn claim(&self, digest: Digest) -> Claim {
        let lock = {
            let mut state = self.state();
            state.writers.retain(|_, lock| lock.strong_count() > 0);
            let lock = state.writers.get(&digest).and_then(Weak::upgrade);
            lock.unwrap_or_else(|| {
                let lock = Arc::<tokio::sync::Mutex<()>>::default();
                state.writers.insert(digest, Arc::downgrade(&lock));
                lock
            })
        };
        Claim { store: self.clone(), digest, _lock: lock.lock_owned().await }
    }

    /// Keeps a small blob that is in memory and verified; its digest.
    ///
    /// # Errors
    /// [`OciError::Store`] or [`OciError::Locked`].
    pub async fn put(&self, lease: &Lease, bytes: Vec<u8>) -> Result<Digest, OciError> {
        let digest = Digest::of(&bytes);
        lease.add(digest);
        let claim = self.claim(digest).await;
        blocking(move || {
            if let Some(mut partial) = Partial::open(claim, bytes.len() as u64)? {
                partial.restart()?;
                partial.write(&bytes)?;
                partial.finish("document")?;
            }
            Ok(digest)
        })
        .await
    }

    /// Begins or goes on with a large one; `None` where it is there.
    #[cfg(test)]
    pub(crate) async fn ingest(&self, lease: &Lease, blob: &Descriptor) -> Result<Option<Ingest>, OciError> {
        self.ingest_of(lease, blob.digest, Some(blob.size)).await
    }

    /// Begins or goes on with a large one, whose size may be unknown; `None` where it is there.
    pub(crate) async fn ingest_of(
        &self,
        lease: &Lease,
        digest: Digest,
        size: Option<u64>,
    ) -> Result<Option<Ingest>, OciError> {
        lease.add(digest);
        let claim = self.claim(digest).await;
        Ok(blocking(move || Partial::begin(claim, size)).await?.map(Ingest::of))
    }

    /// Where unnamed temporary files belong: on the same disk.
    pub(crate) fn scratch(&self) -> &Path {
        &self.inner.ingest
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in it is ever half done.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// Keeps this one, too, there or not yet.
    pub fn add(&self, digest: Digest) {
        let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        if digests.insert(digest) {
            *self.store.state().leases.entry(digest).or_default() += 1;
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let digests = std::mem::take(self.digests.get_mut().unwrap_or_else(PoisonError::into_inner));
        let mut state = self.store.state();
        for digest in digests {
            match state.leases.get_mut(&digest) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(state.leases.remove(&digest)),
            }
        }
    }
}

/// The files of a directory that are named by digests; others are not ours.
fn files(dir: &Path) -> Result<Vec<(Digest, fs::Metadata)>, OciError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed("list", dir))? {
        let entry = entry.map_err(failed("list", dir))?;
        let Some(digest) = entry.file_name().to_str().and_then(Digest::from_hex) else { continue };
        match entry.metadata() {
            Ok(about) => files.push((digest, about)),
            // Renamed or removed since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at", &entry.path())(error)),
        }
    }
    Ok(files)
}

/// How long ago it was written.
fn age(about: &fs::Metadata) -> Duration {
    about.modified().ok().and_then(|then| SystemTime::now().duration_since(then).ok()).unwrap_or_default()
}

/// Tells a thread that works, when it is dropped, that nobody waits any more.
#[derive(Debug, Default)]
pub(crate) struct Cancel(Arc<AtomicBool>);

/// What the thread is told by.
#[derive(Debug, Clone)]
pub(crate) struct Cancelled(Arc<AtomicBool>);

impl Cancel {
    pub(crate) fn told(&self) -> Cancelled {
        Cancelled(self.0.clone())
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Cancelled {
    pub(crate) fn is(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Runs what blocks on a thread for that. It goes on when nobody waits any more.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, OciError> + Send + 'static,
) -> Result<T, OciError> {
    tokio::task::spawn_blocking(work).await.map_err(|source| OciError::Broken { source })?
}

#[cfg(test)]
mod tests;
