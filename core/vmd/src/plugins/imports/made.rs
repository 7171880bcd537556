//! Blobs that are made while they are read: archives of a workspace, which need not fit anywhere but in the guest.

use std::{
    fs::File,
    io::{self, Seek, Write},
    os::unix::fs::FileExt,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes, BytesMut};
use jsonrpsee::core::async_trait;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncRead, ReadBuf},
    sync::{OnceCell, mpsc},
};
use vm_plugin::{
    PluginError,
    ports::{Blob, Stream},
};

use super::{super::sandbox::read_part, meter::Meter};

/// Bytes that are handed on at once.
const PIECE: usize = 256 << 10;
/// Pieces that are on their way.
const PIECES: usize = 4;

/// Writes the blob. The same each time.
type Make = dyn Fn(&mut (dyn Write + Send)) -> Result<(), PluginError> + Send + Sync;

/// Hears that the blob was unpacked in a directory of the guest.
type Heard = dyn Fn(&str) + Send + Sync;

/// A blob that is made while it is read; beforehand, where somebody asks for its size, its digest or a part of it.
pub(super) struct Made {
    make: Arc<Make>,
    heard: Option<Box<Heard>>,
    meter: Arc<Meter>,
    /// About how many bytes it will have.
    estimate: Option<u64>,
    scratch: PathBuf,
    whole: OnceCell<Whole>,
}

/// The blob in a file without a name.
#[derive(Clone)]
struct Whole {
    file: Arc<File>,
    size: u64,
    digest: String,
}

impl Made {
    pub(super) fn new(
        scratch: PathBuf,
        meter: Arc<Meter>,
        estimate: Option<u64>,
        make: impl Fn(&mut (dyn Write + Send)) -> Result<(), PluginError> + Send + Sync + 'static,
    ) -> Self {
        Self { make: Arc::new(make), heard: None, meter, estimate, scratch, whole: OnceCell::new() }
    }

    /// The same, of which `heard` is told the directories it was unpacked in.
    pub(super) fn heard(self, heard: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self { heard: Some(Box::new(heard)), ..self }
    }

    async fn whole(&self) -> Result<&Whole, PluginError> {
        let (make, scratch) = (self.make.clone(), self.scratch.clone());
        self.whole
            .get_or_try_init(|| async {
                let made = tokio::task::spawn_blocking(move || beforehand(&*make, scratch)).await;
                made.unwrap_or_else(|_| Err(broke_off()))
            })
            .await
    }
}

fn beforehand(make: &Make, scratch: PathBuf) -> Result<Whole, PluginError> {
    let failed = |error: io::Error| {
        let message = format!("nothing can be kept in {}: {error}", scratch.display());
        PluginError::new("workspace.scratch", message).hint("free space on that disk")
    };
    let mut to =
        Summed { file: tempfile::tempfile_in(&scratch).map_err(failed)?, sum: Sha256::new(), size: 0 };
    make(&mut to)?;
    to.file.rewind().map_err(failed)?;
    let digest = to.sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    Ok(Whole { file: Arc::new(to.file), size: to.size, digest: format!("sha256:{digest}") })
}

struct Summed {
    file: File,
    sum: Sha256,
    size: u64,
}

impl Write for Summed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.sum.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn broke_off() -> PluginError {
    PluginError::new("workspace.broke-off", "reading the workspace broke off")
        .hint("this is a fault of vmd: look at its log, and report it")
}

#[async_trait]
impl Blob for Made {
    async fn size(&self) -> Result<u64, PluginError> {
        Ok(self.whole().await?.size)
    }

    async fn digest(&self) -> Result<String, PluginError> {
        Ok(self.whole().await?.digest.clone())
    }

    async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, PluginError> {
        let Whole { file, size, .. } = self.whole().await?.clone();
        read_part(file, size, offset, length).await
    }

    fn stream(&self) -> Option<Stream> {
        let (give, pieces) = mpsc::channel(PIECES);
        let make = self.make.clone();
        let meter = self.meter.clone();
        let whole = self.whole.get().cloned();
        meter.begin(whole.as_ref().map(|whole| whole.size).or(self.estimate));
        // Ends by itself when nobody reads any more: then there is nothing to write to.
        tokio::task::spawn_blocking(move || {
            let mut writer = Writer { give, buffer: BytesMut::with_capacity(PIECE) };
            let made = match whole {
                Some(whole) => again(&whole, &mut writer),
                None => make(&mut writer),
            };
            let made = made.and_then(|()| {
                writer.flush().map_err(|error| PluginError::new("blob.unread", error.to_string()))
            });
            let _ = writer.give.blocking_send(match made {
                Ok(()) => Piece::End,
                Err(error) => Piece::Failed(error),
            });
        });
        Some(Box::pin(Reader { pieces, piece: Bytes::new(), ended: false, meter }))
    }

    fn unpacked(&self, directory: &str) {
        if let Some(heard) = &self.heard {
            heard(directory);
        }
    }
}

/// Writes what was made before.
fn again(whole: &Whole, to: &mut Writer) -> Result<(), PluginError> {
    let failed = |error: io::Error| PluginError::new("blob.unreadable", error.to_string());
    let (mut offset, mut bytes) = (0, vec![0; PIECE]);
    loop {
        let read = whole.file.read_at(&mut bytes, offset).map_err(failed)?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&bytes[..read]).map_err(failed)?;
        offset += read as u64;
    }
}

enum Piece {
    Bytes(Bytes),
    /// The end, which a writer that breaks off never gives.
    End,
    Failed(PluginError),
}

/// The end of a stream that blocks.
struct Writer {
    give: mpsc::Sender<Piece>,
    buffer: BytesMut,
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fits = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..fits]);
        if self.buffer.len() == PIECE {
            self.flush()?;
        }
        Ok(fits)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.buffer, BytesMut::with_capacity(PIECE)).freeze();
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "nobody reads it any more");
        self.give.blocking_send(Piece::Bytes(piece)).map_err(gone)
    }
}

/// The end of a stream that does not block.
struct Reader {
    pieces: mpsc::Receiver<Piece>,
    piece: Bytes,
    ended: bool,
    meter: Arc<Meter>,
}

impl AsyncRead for Reader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.piece.is_empty() {
            if this.ended {
                return Poll::Ready(Ok(()));
            }
            match std::task::ready!(this.pieces.poll_recv(context)) {
                Some(Piece::Bytes(piece)) => {
                    this.meter.add(piece.len() as u64);
                    this.piece = piece;
                }
                Some(Piece::End) => this.ended = true,
                Some(Piece::Failed(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Err(io::Error::other(broke_off()))),
            }
        }
        let length = this.piece.len().min(to.remaining());
        to.put_slice(&this.piece[..length]);
        this.piece.advance(length);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use tokio::io::AsyncReadExt;

    use super::*;

    fn content() -> Vec<u8> {
        (0..2 * PIECE + 77).map(|number| (number % 253) as u8).collect()
    }

    fn made(
        make: impl Fn(&mut (dyn Write + Send)) -> Result<(), PluginError> + Send + Sync + 'static,
    ) -> Made {
        Made::new(std::env::temp_dir(), Arc::default(), None, make)
    }

    fn whole(to: &mut (dyn Write + Send)) -> Result<(), PluginError> {
        to.write_all(&content()).map_err(|error| PluginError::new("test.broken", error.to_string()))
    }

    async fn streamed(made: &Made) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        made.stream().unwrap().read_to_end(&mut bytes).await?;
        Ok(bytes)
    }

    #[tokio::test]
    async fn a_stream_needs_no_copy_and_parts_need_one() {
        let times = Arc::new(AtomicUsize::new(0));
        let made = made({
            let times = times.clone();
            move |to| {
                times.fetch_add(1, Ordering::SeqCst);
                whole(to)
            }
        });
        assert_eq!(streamed(&made).await.unwrap(), content());
        assert!(made.whole.get().is_none(), "it was kept");
        assert_eq!(made.size().await.unwrap(), content().len() as u64);
        assert_eq!(made.read(1, 3).await.unwrap(), content()[1..4]);
        assert_eq!(made.read(content().len() as u64 - 2, 100).await.unwrap().len(), 2);
        assert!(made.read(u64::MAX, 1).await.unwrap().is_empty());
        assert_eq!(made.digest().await.unwrap(), super::super::super::package::digest(&content()));
        assert_eq!(streamed(&made).await.unwrap(), content());
        assert_eq!(times.load(Ordering::SeqCst), 2, "what is there is not made again");
    }

    #[tokio::test]
    async fn half_of_it_never_looks_like_all_of_it() {
        let half = |end: fn() -> Result<(), PluginError>| {
            made(move |to| {
                to.write_all(&content()[..PIECE + 1]).unwrap();
                end()
            })
        };
        let fails = half(|| Err(PluginError::new("workspace.changed", "it changed").hint("wait")));
        let error = streamed(&fails).await.unwrap_err();
        let inner = error.get_ref().unwrap().downcast_ref::<PluginError>().unwrap();
        assert_eq!((inner.code.as_str(), inner.hint.as_deref()), ("workspace.changed", Some("wait")));
        assert_eq!(fails.size().await.unwrap_err().code, "workspace.changed");

        let panics = half(|| panic!("a defect"));
        let error = streamed(&panics).await.unwrap_err();
        assert!(error.to_string().contains("broke off"), "{error}");
    }

    #[tokio::test]
    async fn whoever_makes_it_ends_when_nobody_reads() {
        let (told, ended) = tokio::sync::oneshot::channel();
        let told = Mutex::new(Some(told));
        let endless = made(move |to| {
            let error = loop {
                if let Err(error) = to.write_all(&[0; 4096]) {
                    break error;
                }
            };
            let _ = told.lock().unwrap().take().unwrap().send(error.kind());
            Err(PluginError::new("test.broken", "it ended"))
        });
        drop(endless.stream());
        assert_eq!(ended.await.unwrap(), io::ErrorKind::BrokenPipe);
    }
}
