//! A blob that is being written.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{Claim, STRIDE, failed};
use crate::{Digest, OciError};

/// How much is hashed at once.
const PIECE: usize = 256 << 10;
/// How many pieces of a download may wait for the disk.
const QUEUE: usize = 16;

/// The file of a blob that is not whole yet, at its end.
///
/// Dropped before it is finished, the file stays for another try.
#[derive(Debug)]
pub(crate) struct Partial {
    file: File,
    path: PathBuf,
    hasher: Sha256,
    written: u64,
    /// `None` where nobody has said it.
    size: Option<u64>,
    /// What was written since the disk was looked at, where nobody has said how much it will be.
    unchecked: u64,
    /// Whether something was there before, of which nobody knows more than that.
    resumed: bool,
    // Last: the file's own lock goes first.
    claim: Claim,
}

impl Partial {
    /// Goes on with what is there of a blob of this size, hashing that; `None` where the blob is whole.
    pub(crate) fn open(claim: Claim, size: u64) -> Result<Option<Self>, OciError> {
        Self::begin(claim, Some(size))
    }

    /// The same of one whose size may be unknown.
    pub(crate) fn begin(claim: Claim, size: Option<u64>) -> Result<Option<Self>, OciError> {
        let (store, digest) = (&claim.store, claim.digest);
        let path = store.partial_path(&digest);
        let file = loop {
            if store.has(&digest)? {
                // A crash between two steps can leave both.
                return remove(&path).map(|_| None);
            }
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(nix::libc::O_NOFOLLOW)
                .open(&path)
                .map_err(failed("open", &path))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(OciError::Locked { digest }),
                Err(error) => return Err(failed("lock", &path)(error.into())),
            }
            // Another process may have finished or removed it between the two.
            if is_at(&file, &path).map_err(failed("look at", &path))? {
                break file;
            }
        };
        let mut partial =
            Self { file, path, hasher: Sha256::new(), written: 0, size, unchecked: 0, resumed: false, claim };
        partial.catch_up()?;
        partial.room()?;
        Ok(Some(partial))
    }

    /// Looks whether there is room for the rest, or for the next pieces.
    fn room(&mut self) -> Result<(), OciError> {
        self.unchecked = 0;
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        super::room(dir, self.size.map_or(STRIDE, |size| size.saturating_sub(self.written)))
    }

    /// It will have so many bytes.
    fn expect(&mut self, size: u64) -> Result<(), OciError> {
        self.size = Some(size);
        self.room()
    }

    /// Hashes what is in the file.
    fn catch_up(&mut self) -> Result<(), OciError> {
        let there = self.file.metadata().map_err(failed("look at", &self.path))?.len();
        if self.size.is_some_and(|size| there > size) {
            return self.restart();
        }
        self.file.seek(SeekFrom::Start(0)).map_err(failed("read", &self.path))?;
        let mut piece = vec![0; PIECE];
        loop {
            match self.file.read(&mut piece).map_err(failed("read", &self.path))? {
                0 => break,
                n => {
                    self.hasher.update(&piece[..n]);
                    self.written += n as u64;
                }
            }
        }
        self.resumed = self.written > 0;
        Ok(())
    }

    /// How many bytes are there.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), OciError> {
        self.file.write_all(bytes).map_err(failed("write", &self.path))?;
        self.hasher.update(bytes);
        self.written += bytes.len() as u64;
        self.unchecked += bytes.len() as u64;
        if self.size.is_none() && self.unchecked >= STRIDE { self.room() } else { Ok(()) }
    }

    /// Throws away what is there.
    pub(crate) fn restart(&mut self) -> Result<(), OciError> {
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(failed("empty", &self.path))?;
        (self.hasher, self.written, self.resumed) = (Sha256::new(), 0, false);
        Ok(())
    }

    /// Takes all of another file, by sharing its blocks where the filesystem can; whether it could.
    pub(crate) fn clone_of(&mut self, other: &File) -> Result<bool, OciError> {
        self.restart()?;
        if rustix::fs::ioctl_ficlone(&self.file, other).is_err() {
            return Ok(false);
        }
        self.catch_up()?;
        // Whatever is wrong with it is wrong with the file that it was cloned from.
        self.resumed = false;
        Ok(true)
    }

    /// Verifies, flushes, and gives the blob its name. What is not the blob is removed; if part of it was there before, it is
    /// worth trying again.
    pub(crate) fn finish(mut self, what: &str) -> Result<(), Rejected> {
        let found = Digest::finished(std::mem::take(&mut self.hasher));
        let expected = self.claim.digest;
        if found != expected || self.size.is_some_and(|size| size != self.written) {
            let resumed = self.resumed;
            fs::remove_file(&self.path).map_err(failed("remove", &self.path))?;
            let what = what.to_owned();
            let error = match self.size {
                Some(size) if size != self.written => {
                    OciError::Size { what, found: self.written, expected: size }
                }
                _ => OciError::Digest { what, found, expected },
            };
            return Err(Rejected { error, resumed });
        }
        let whole = self.claim.store.path(&expected);
        let step = |action| failed(action, &self.path);
        self.file.set_permissions(fs::Permissions::from_mode(0o444)).map_err(step("make read-only"))?;
        self.file.sync_all().map_err(step("flush"))?;
        fs::rename(&self.path, &whole).map_err(step("rename"))?;
        let dir = &self.claim.store.inner.blobs;
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("flush", dir))?;
        Ok(())
    }
}

/// A blob that was not what it should be.
#[derive(Debug)]
pub(crate) struct Rejected {
    pub(crate) error: OciError,
    /// Whether part of it was there before this process looked.
    pub(crate) resumed: bool,
}

impl From<OciError> for Rejected {
    fn from(error: OciError) -> Self {
        Self { error, resumed: false }
    }
}

impl From<Rejected> for OciError {
    fn from(rejected: Rejected) -> Self {
        rejected.error
    }
}

/// Whether an open file is the one that has this name.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((open.dev(), open.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes a partial that no process writes; whether it did.
pub(super) fn remove(path: &Path) -> Result<bool, OciError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed("open", path)(error)),
    };
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(false);
    }
    if !is_at(&file, path).map_err(failed("look at", path))? {
        return Ok(false);
    }
    fs::remove_file(path).map_err(failed("remove", path))?;
    Ok(true)
}

/// What the thread of an [`Ingest`] does.
#[derive(Debug)]
enum Step {
    Expect(u64),
    Write(Bytes),
    Restart,
}

/// A [`Partial`] that is written from asynchronous code: a thread of its own hashes and writes.
///
/// Dropped, the thread ends after what it was given, and the file stays for another try; until then others wait for it.
#[derive(Debug)]
pub(crate) struct Ingest {
    /// Bytes that are there or on their way.
    offset: u64,
    queue: mpsc::Sender<Step>,
    writer: JoinHandle<Result<Partial, OciError>>,
}

impl Ingest {
    pub(super) fn of(mut partial: Partial) -> Self {
        let offset = partial.written();
        let (queue, mut steps) = mpsc::channel(QUEUE);
        let writer = tokio::task::spawn_blocking(move || {
            while let Some(step) = steps.blocking_recv() {
                match step {
                    Step::Expect(size) => partial.expect(size)?,
                    Step::Write(piece) => partial.write(&piece)?,
                    Step::Restart => partial.restart()?,
                }
            }
            Ok(partial)
        });
        Self { offset, queue, writer }
    }

    /// Where the next byte belongs.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// # Errors
    /// What the writer met; nothing more can be written then.
    pub(crate) async fn write(&mut self, piece: Bytes) -> Result<(), OciError> {
        self.offset += piece.len() as u64;
        self.step(Step::Write(piece)).await
    }

    /// It will have so many bytes.
    ///
    /// # Errors
    /// As [`Ingest::write`].
    pub(crate) async fn expect(&mut self, size: u64) -> Result<(), OciError> {
        self.step(Step::Expect(size)).await
    }

    /// Begins anew.
    ///
    /// # Errors
    /// As [`Ingest::write`].
    pub(crate) async fn restart(&mut self) -> Result<(), OciError> {
        self.offset = 0;
        self.step(Step::Restart).await
    }

    async fn step(&mut self, step: Step) -> Result<(), OciError> {
        if self.queue.send(step).await.is_ok() {
            return Ok(());
        }
        // It ends before the queue only with an error.
        (&mut self.writer).await.map_err(|source| OciError::Broken { source })?.map(drop)
    }

    async fn partial(self) -> Result<Partial, OciError> {
        drop(self.queue);
        self.writer.await.map_err(|source| OciError::Broken { source })?
    }

    /// See [`Partial::finish`].
    pub(crate) async fn finish(self, what: String) -> Result<(), Rejected> {
        let partial = self.partial().await?;
        match tokio::task::spawn_blocking(move || partial.finish(&what)).await {
            Ok(finished) => finished,
            Err(source) => Err(OciError::Broken { source }.into()),
        }
    }
}
