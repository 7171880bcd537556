//! A tar stream out of a plain or compressed one: decompressed and hashed on a thread of its own, so that several are read
//! at once, and placing what is in them goes on beside it.

use std::{
    io::{self, BufRead, BufReader, Read},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use liblzma::{
    bufread::XzDecoder,
    stream::{CONCATENATED, Stream as XzStream},
};
use sha2::{Digest, Sha256};

use crate::progress::Cancel;

const CHUNK: usize = 256 << 10;
/// How far a thread reads ahead of what is wanted of it: 32 MiB.
const CHUNKS_AHEAD: usize = 128;
/// A stream that has more bytes than this …
const BOMB_MIN: u64 = 16 << 30;
/// … and more than so many for each byte of the blob is made to fill disks, not to be used.
const BOMB_RATIO: u64 = 200;

/// What a decompressor may take: xz, whose `-9` needs 65 MiB, in bytes; Zstandard's window, as a power of two, which is
/// its own default (RFC 8878 asks for 8 MiB, `--ultra -22` needs 128 MiB).
const XZ_MEMORY: u64 = 256 << 20;
const ZSTD_WINDOW_LOG: u32 = 27;

/// SHA-256 sums of a stream that was read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sums {
    /// Of the input as it came; `None` if nobody asked.
    pub(crate) blob: Option<[u8; 32]>,
    /// Of the uncompressed stream; `None` if nobody asked.
    pub(crate) stream: Option<[u8; 32]>,
}

/// Which sums are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) blob: bool,
    pub(crate) stream: bool,
}

/// The uncompressed stream.
pub(crate) struct Stream {
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    position: usize,
    produced: u64,
    consumed: Arc<AtomicU64>,
    cancel: Cancel,
    worker: JoinHandle<io::Result<Sums>>,
}

impl Stream {
    /// Starts to read. The form is told by the first bytes.
    pub(crate) fn start(input: Box<dyn Read + Send>, wanted: Wanted, cancel: Cancel) -> io::Result<Self> {
        let (sender, chunks) = sync_channel(CHUNKS_AHEAD);
        let consumed = Arc::new(AtomicU64::new(0));
        let counted = Counted { input, count: Arc::clone(&consumed), hasher: wanted.blob.then(Sha256::new) };
        let worker = std::thread::Builder::new()
            .name("image-read".into())
            .spawn(move || pump(counted, wanted.stream, &sender))?;
        Ok(Self { chunks, chunk: Vec::new(), position: 0, produced: 0, consumed, cancel, worker })
    }

    /// How many bytes of the (perhaps compressed) input have been read.
    pub(crate) fn consumed(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.consumed)
    }

    /// The sums, once the stream was read to its end.
    pub(crate) fn sums(self) -> io::Result<Sums> {
        drop(self.chunks);
        self.worker.join().map_err(|_| io::Error::other("the reading thread panicked"))?
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.position == self.chunk.len() {
            match self.chunks.recv_timeout(Duration::from_millis(100)) {
                Ok(chunk) => {
                    (self.chunk, self.position) = (chunk?, 0);
                    self.produced += self.chunk.len() as u64;
                    let compressed = self.consumed.load(Ordering::Relaxed);
                    if self.produced > BOMB_MIN && self.produced / BOMB_RATIO > compressed {
                        return Err(io::ErrorKind::QuotaExceeded.into());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(0),
                // A sender may be silent for long.
                Err(RecvTimeoutError::Timeout) => {}
            }
            // Nobody may be waiting for it any more.
            self.cancel.check().map_err(|_| io::Error::from(io::ErrorKind::ConnectionAborted))?;
        }
        let count = buffer.len().min(self.chunk.len() - self.position);
        buffer[..count].copy_from_slice(&self.chunk[self.position..self.position + count]);
        self.position += count;
        Ok(count)
    }
}

struct Counted<R> {
    input: R,
    count: Arc<AtomicU64>,
    hasher: Option<Sha256>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.count.fetch_add(count as u64, Ordering::Relaxed);
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..count]);
        }
        Ok(count)
    }
}

/// The input, which the decompressor reads and from which what that left is read after it.
struct Shared<R>(Arc<Mutex<Counted<R>>>);

impl<R: Read> Read for Shared<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(buffer)
    }
}

/// Sends the stream until its end, an error, or until nobody listens; answers the sums of what was sent.
fn pump(
    input: Counted<Box<dyn Read + Send>>,
    hash: bool,
    sender: &SyncSender<io::Result<Vec<u8>>>,
) -> io::Result<Sums> {
    let shared = Arc::new(Mutex::new(input));
    let mut hasher = hash.then(Sha256::new);
    match send(&shared, hasher.as_mut(), sender) {
        Err(error) => drop(sender.send(Err(error))),
        Ok(Sent::Part) => {}
        // What a decompressor does not care for belongs to the blob all the same.
        Ok(Sent::Whole) => drop(io::copy(&mut Shared(Arc::clone(&shared)), &mut io::sink())?),
    }
    let blob = shared.lock().unwrap_or_else(PoisonError::into_inner).hasher.take();
    Ok(Sums { blob: blob.map(|h| h.finalize().into()), stream: hasher.map(|h| h.finalize().into()) })
}

/// How much of a stream somebody wanted.
enum Sent {
    Whole,
    Part,
}

fn send(
    shared: &Arc<Mutex<Counted<Box<dyn Read + Send>>>>,
    mut hasher: Option<&mut Sha256>,
    sender: &SyncSender<io::Result<Vec<u8>>>,
) -> io::Result<Sent> {
    let mut input = decompressed(Shared(Arc::clone(shared)))?;
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let read = (&mut input).take(CHUNK as u64).read_to_end(&mut chunk);
        if let Some(hasher) = hasher.as_deref_mut() {
            hasher.update(&chunk);
        }
        let ended = chunk.is_empty();
        if !ended && sender.send(Ok(chunk)).is_err() {
            return Ok(Sent::Part);
        }
        read?;
        if ended {
            return Ok(Sent::Whole);
        }
    }
}

/// Magic numbers: RFC 1952 (gzip), RFC 8878 (Zstandard), the .xz file format 1.2.1.
pub(crate) fn decompressed<R: Read + Send + 'static>(input: R) -> io::Result<Box<dyn Read + Send>> {
    let mut input = BufReader::with_capacity(CHUNK, input);
    let mut magic = [0; 6];
    let mut known = 0;
    // A pipe may give less than is asked for; what was peeked at is put in front again.
    while known < magic.len() {
        let available = input.fill_buf()?;
        if available.is_empty() {
            break;
        }
        let count = available.len().min(magic.len() - known);
        magic[known..known + count].copy_from_slice(&available[..count]);
        input.consume(count);
        known += count;
    }
    let start = io::Cursor::new(magic[..known].to_vec());
    let input = BufReader::with_capacity(CHUNK, start.chain(input));
    Ok(match &magic[..known] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            let stream = XzStream::new_stream_decoder(XZ_MEMORY, CONCATENATED)?;
            Box::new(XzDecoder::new_stream(input, stream))
        }
        _ => Box::new(input),
    })
}
