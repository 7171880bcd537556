//! The running guest, as far as a hook may act in it: over the SSH server of its agent, connected to when it is first asked for
//! something.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use jsonrpsee::core::async_trait;
use ssh_key::PrivateKey;
use tokio::{
    io::{AsyncRead, AsyncWriteExt, ReadBuf},
    sync::OnceCell,
};
use vm_guest::{Command, Guest, GuestError};
use vm_plugin::{
    PluginError,
    ports::{Blob, FileMode, GuestCommand, GuestOutput, Sandbox, Stream},
};
use vm_types::{
    VmPaths,
    guest::files::{Account, Seen, SeenKind},
};

use super::package::digest;

/// The most of a guest's file that is kept in the host, in bytes.
const FETCH_MAX: usize = 64 << 20;
/// The most that one call of a plugin fetches, in bytes.
const FETCH_ALL: u64 = 1 << 30;
/// How long a guest may take until it lets us in. Whoever waits for it may hold locks.
const LOGIN_DEADLINE: Duration = Duration::from_secs(60);
/// Bytes of a blob that are on their way at once.
const PIECE: usize = 256 << 10;

/// What the host itself does with files of a guest, on behalf of an importer.
#[async_trait]
pub(super) trait GuestFiles: Sandbox {
    /// All that is below a directory, sorted.
    async fn survey(&self, directory: &str) -> Result<Vec<Seen>, PluginError>;
    /// SHA-256 digests of files below a directory.
    async fn digests(&self, directory: &str, paths: &[Vec<u8>])
    -> Result<Vec<Option<[u8; 32]>>, PluginError>;
    /// Removes what is below a directory, in this order; directories only if they are empty by then.
    async fn remove_below(&self, directory: &str, paths: &[Vec<u8>]) -> Result<(), PluginError>;
    /// A user of the guest.
    async fn account(&self, user: &str) -> Result<Account, PluginError>;
}

/// A guest that is connected to when it is first needed.
struct Lazy {
    paths: VmPaths,
    client_key: PathBuf,
    guest: OnceCell<Guest>,
    /// Where files that were fetched are kept.
    scratch: PathBuf,
    /// Bytes that were.
    fetched: AtomicU64,
}

/// The guest of a VM. What is fetched from it is kept in files without names in `scratch`.
pub(super) fn lazily(paths: VmPaths, client_key: &Path, scratch: &Path) -> Arc<dyn GuestFiles> {
    Arc::new(Lazy {
        paths,
        client_key: client_key.to_owned(),
        guest: OnceCell::new(),
        scratch: scratch.to_owned(),
        fetched: AtomicU64::new(0),
    })
}

/// An answer that a guest must not be waited for without end.
async fn in_time<T>(answer: impl Future<Output = Result<T, PluginError>>) -> Result<T, PluginError> {
    tokio::time::timeout(LOGIN_DEADLINE, answer).await.unwrap_or_else(|_| {
        let message = format!("the guest did not answer within {} s", LOGIN_DEADLINE.as_secs());
        Err(PluginError::new("guest.unresponsive", message).hint("look at the guest's console: vm logs"))
    })
}

fn failed(error: GuestError) -> PluginError {
    // What was to be sent could not be made: whoever makes it says why.
    if let GuestError::Source { source } = &error
        && let Some(cause) = source.get_ref().and_then(|cause| cause.downcast_ref::<PluginError>())
    {
        return cause.clone();
    }
    let (code, hint) = (error.code().to_owned(), error.hint());
    let mut failed = PluginError::new(&code, vm_types::report::chain(&error));
    failed.hint = hint.map(ToString::to_string);
    failed
}

impl Lazy {
    async fn guest(&self) -> Result<&Guest, PluginError> {
        self.guest
            .get_or_try_init(|| async {
                let path = self.paths.host_key();
                let key = tokio::fs::read_to_string(&path).await.map_err(std::io::Error::other);
                let public = key.and_then(|text| {
                    let key = PrivateKey::from_openssh(text).map_err(std::io::Error::other)?;
                    key.public_key().to_openssh().map_err(std::io::Error::other)
                });
                let public = public.map_err(|error| {
                    PluginError::new("guest.host-key", format!("could not read {}: {error}", path.display()))
                })?;
                let socket = self.paths.ssh_sock();
                let guest = in_time(async {
                    Guest::connect(&socket, &self.client_key, &public).await.map_err(failed)
                });
                guest.await
            })
            .await
    }
}

/// What `work` reads of a blob.
struct Bytes(Stream);

impl AsyncRead for Bytes {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        self.0.as_mut().poll_read(context, to)
    }
}

/// Hands a blob's bytes to `work`. If they cannot all be read, `work` is dropped before it sees an end of them.
async fn fed<T>(
    blob: &Arc<dyn Blob>,
    work: impl AsyncFnOnce(Bytes) -> Result<T, PluginError>,
) -> Result<T, PluginError> {
    if let Some(stream) = blob.stream() {
        return work(Bytes(stream)).await;
    }
    let size = blob.size().await?;
    let (mut to, from) = tokio::io::duplex(PIECE);
    let feed = async {
        let mut offset = 0;
        while offset < size {
            let piece = blob.read(offset, PIECE).await?;
            if piece.is_empty() {
                return Err(PluginError::new("blob.short", "the file became shorter while it was read"));
            }
            offset += piece.len() as u64;
            // Whoever reads it says why it has ended early.
            if to.write_all(&piece).await.is_err() {
                return Ok(to);
            }
        }
        let _ = to.shutdown().await;
        Ok(to)
    };
    let (_to, done) = tokio::try_join!(feed, work(Bytes(Box::pin(from))))?;
    Ok(done)
}

async fn run<I: AsyncRead + Send>(
    guest: &Guest,
    command: Command<I>,
    limit: usize,
) -> Result<GuestOutput, PluginError> {
    let output = guest.run(command, limit).await.map_err(failed)?;
    Ok(GuestOutput {
        code: output.code,
        signal: output.signal,
        stdout: output.stdout,
        stderr: output.stderr,
        truncated: output.truncated,
    })
}

/// A file that was fetched: on disk, for a plugin may hold many.
struct Fetched {
    file: Arc<File>,
    size: u64,
    digest: String,
}

impl Fetched {
    async fn keep(content: Vec<u8>, scratch: PathBuf) -> Result<Self, PluginError> {
        let at = scratch.clone();
        let kept = tokio::task::spawn_blocking(move || {
            let file = tempfile::tempfile_in(at)?;
            file.write_all_at(&content, 0)?;
            Ok(Self { file: Arc::new(file), size: content.len() as u64, digest: digest(&content) })
        });
        kept.await.map_err(io::Error::other).flatten().map_err(|error| {
            let message = format!("nothing can be kept in {}: {error}", scratch.display());
            PluginError::new("guest.scratch", message).hint("free space on that disk")
        })
    }
}

#[async_trait]
impl Blob for Fetched {
    async fn size(&self) -> Result<u64, PluginError> {
        Ok(self.size)
    }

    async fn digest(&self) -> Result<String, PluginError> {
        Ok(self.digest.clone())
    }

    async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, PluginError> {
        read_part(self.file.clone(), self.size, offset, length).await
    }
}

/// A part of a blob that is kept in a file of `size` bytes: `length` bytes from `offset` on, fewer where it ends.
pub(super) async fn read_part(
    file: Arc<File>,
    size: u64,
    offset: u64,
    length: usize,
) -> Result<Vec<u8>, PluginError> {
    let rest = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0; length.min(rest)];
        file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    });
    let failed = |error: io::Error| PluginError::new("blob.unreadable", error.to_string());
    read.await.map_err(io::Error::other).flatten().map_err(failed)
}

#[async_trait]
impl Sandbox for Lazy {
    async fn run(&self, wanted: GuestCommand, output_limit: usize) -> Result<GuestOutput, PluginError> {
        let guest = self.guest().await?;
        let mut command = Command::new(wanted.command);
        command.env = wanted.environment;
        command.cwd = wanted.directory;
        command.user = wanted.user;
        command.time_limit = wanted.time_limit.map(Duration::from_millis);
        match wanted.input {
            None => run(guest, command, output_limit).await,
            Some(input) => {
                fed(&input, async move |from| run(guest, command.with_stdin(from), output_limit).await).await
            }
        }
    }

    async fn write_file(
        &self,
        path: &str,
        content: Arc<dyn Blob>,
        FileMode { mode, uid, gid }: FileMode,
    ) -> Result<(), PluginError> {
        let guest = self.guest().await?;
        fed(&content, async move |from| guest.write_file(path, from, mode, uid, gid).await.map_err(failed))
            .await
    }

    async fn read_file(&self, path: &str, limit: usize) -> Result<Vec<u8>, PluginError> {
        let content = self.guest().await?.read_file(path, limit).await.map_err(failed)?;
        Ok(content.bytes)
    }

    async fn fetch_file(&self, path: &str) -> Result<Arc<dyn Blob>, PluginError> {
        let content = self.guest().await?.read_file(path, FETCH_MAX).await.map_err(failed)?;
        if content.more {
            let message = format!("{path} has more than {} MiB", FETCH_MAX >> 20);
            return Err(PluginError::new("guest.file-too-large", message));
        }
        let size = content.bytes.len() as u64;
        if self.fetched.fetch_add(size, Ordering::Relaxed).saturating_add(size) > FETCH_ALL {
            let message = format!("more than {} MiB were fetched from the guest", FETCH_ALL >> 20);
            return Err(PluginError::new("guest.fetched-too-much", message).hint(
                "for the author: fetch less in one call, or have the guest work with its files itself",
            ));
        }
        Ok(Arc::new(Fetched::keep(content.bytes, self.scratch.clone()).await?))
    }

    async fn unpack(
        &self,
        archive: Arc<dyn Blob>,
        directory: &str,
        uid: u32,
        gid: u32,
    ) -> Result<(), PluginError> {
        let guest = self.guest().await?;
        fed(&archive, async move |from| guest.unpack(from, directory, uid, gid).await.map_err(failed))
            .await?;
        archive.unpacked(directory);
        Ok(())
    }

    async fn is_empty(&self, directory: &str) -> Result<bool, PluginError> {
        Ok(self.survey(directory).await?.is_empty())
    }

    async fn clear(&self, directory: &str) -> Result<(), PluginError> {
        let seen = self.survey(directory).await?;
        // What is in a directory stands behind it.
        let paths: Vec<_> = seen.into_iter().rev().map(|seen| seen.path).collect();
        if paths.is_empty() { Ok(()) } else { self.remove_below(directory, &paths).await }
    }

    async fn remove(&self, path: &str) -> Result<(), PluginError> {
        let Some((directory, name)) = path.rsplit_once('/') else { return Ok(()) };
        let directory = if directory.is_empty() { "/" } else { directory };
        let found = self.guest().await?.find(path, false).await.map_err(failed)?;
        match found.map(|found| found.kind) {
            None => return Ok(()),
            Some(SeenKind::Directory) => self.clear(path).await?,
            Some(SeenKind::File | SeenKind::Symlink | SeenKind::Other) => {}
        }
        self.remove_below(directory, &[name.as_bytes().to_vec()]).await
    }
}

#[async_trait]
impl GuestFiles for Lazy {
    async fn survey(&self, directory: &str) -> Result<Vec<Seen>, PluginError> {
        self.guest().await?.survey(directory).await.map_err(failed)
    }

    async fn digests(
        &self,
        directory: &str,
        paths: &[Vec<u8>],
    ) -> Result<Vec<Option<[u8; 32]>>, PluginError> {
        self.guest().await?.digests(directory, paths).await.map_err(failed)
    }

    async fn remove_below(&self, directory: &str, paths: &[Vec<u8>]) -> Result<(), PluginError> {
        self.guest().await?.remove(directory, paths).await.map_err(failed)
    }

    async fn account(&self, user: &str) -> Result<Account, PluginError> {
        let guest = self.guest().await?;
        in_time(async { guest.account(user).await.map_err(failed) }).await
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use vm_plugin::ports::MemoryBlob;

    use super::*;

    struct Breaks;

    #[async_trait]
    impl Blob for Breaks {
        async fn size(&self) -> Result<u64, PluginError> {
            Ok(3 * PIECE as u64)
        }

        async fn digest(&self) -> Result<String, PluginError> {
            Ok(String::new())
        }

        async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, PluginError> {
            if offset == 0 { Ok(vec![1; length]) } else { Err(PluginError::new("blob.unreadable", "gone")) }
        }
    }

    #[tokio::test]
    async fn a_blob_arrives_whole_or_the_work_never_sees_its_end() {
        let content: Vec<u8> = (0..3 * PIECE + 5).map(|number| (number % 251) as u8).collect();
        let whole: Arc<dyn Blob> = Arc::new(MemoryBlob(content.clone().into()));
        let read = async |mut from: Bytes| {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).await.unwrap();
            Ok(bytes)
        };
        assert_eq!(fed(&whole, read).await.unwrap(), content);

        let broken: Arc<dyn Blob> = Arc::new(Breaks);
        let ended = std::sync::atomic::AtomicBool::new(false);
        let work = async |mut from: Bytes| {
            let _ = from.read_to_end(&mut Vec::new()).await;
            ended.store(true, std::sync::atomic::Ordering::SeqCst);
            Ok(())
        };
        assert_eq!(fed(&broken, work).await.unwrap_err().code, "blob.unreadable");
        assert!(
            !ended.load(std::sync::atomic::Ordering::SeqCst),
            "half of it would have been taken for the whole"
        );
    }

    #[tokio::test]
    async fn what_was_fetched_is_read_in_parts_and_has_no_name_on_disk() {
        let scratch = tempfile::tempdir().unwrap();
        let fetched = Fetched::keep(b"0123456789".to_vec(), scratch.path().to_owned()).await.unwrap();
        assert_eq!((fetched.size().await, fetched.digest().await), (Ok(10), Ok(digest(b"0123456789"))));
        assert_eq!(fetched.read(8, 100).await.unwrap(), b"89");
        assert_eq!(fetched.read(11, 1).await.unwrap(), b"");
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
        let nowhere = Fetched::keep(vec![1], scratch.path().join("nowhere")).await;
        assert!(nowhere.is_err_and(|error| error.code == "guest.scratch" && error.hint.is_some()));
    }

    #[tokio::test]
    async fn one_who_needs_no_more_says_so_himself() {
        let blob: Arc<dyn Blob> = Arc::new(MemoryBlob(vec![1; 2 * PIECE + 1].into()));
        let error = fed::<()>(&blob, async |from| {
            drop(from);
            Err(PluginError::new("guest.ended", "it has ended"))
        });
        assert_eq!(error.await.unwrap_err().code, "guest.ended");
    }
}
