//! A tar stream out of a plain or compressed one: decompressed and hashed on a thread of its own, so that unpacking
//! goes on beside it.

use std::{
    io::{self, BufRead, BufReader, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use sha2::{Digest, Sha256};
use vm_types::ImageDigest;

use crate::progress::Cancel;

const CHUNK: usize = 256 << 10;
const CHUNKS_AHEAD: usize = 16;

/// The uncompressed stream.
pub(super) struct Stream {
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    position: usize,
    consumed: Arc<AtomicU64>,
    cancel: Cancel,
    worker: JoinHandle<[u8; 32]>,
}

impl Stream {
    /// Starts to read. The form is told by the first bytes.
    pub(super) fn start(input: Box<dyn Read + Send>, cancel: Cancel) -> io::Result<Self> {
        let (sender, chunks) = sync_channel(CHUNKS_AHEAD);
        let consumed = Arc::new(AtomicU64::new(0));
        let counted = Counted { input, count: Arc::clone(&consumed) };
        let worker =
            std::thread::Builder::new().name("image-read".into()).spawn(move || pump(counted, &sender))?;
        Ok(Self { chunks, chunk: Vec::new(), position: 0, consumed, cancel, worker })
    }

    /// How many bytes of the (perhaps compressed) input have been read.
    pub(super) fn consumed(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.consumed)
    }

    /// The SHA-256 of the whole uncompressed stream, once it was read to its end.
    pub(super) fn digest(self) -> io::Result<ImageDigest> {
        drop(self.chunks);
        let hash = self.worker.join().map_err(|_| io::Error::other("the reading thread panicked"))?;
        ImageDigest::try_from(format!("sha256:{}", hex(&hash))).map_err(io::Error::other)
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
                Ok(chunk) => (self.chunk, self.position) = (chunk?, 0),
                Err(RecvTimeoutError::Disconnected) => return Ok(0),
                // A sender may be silent for long; nobody may be waiting for it any more.
                Err(RecvTimeoutError::Timeout) => {
                    self.cancel.check().map_err(|_| io::Error::from(io::ErrorKind::ConnectionAborted))?;
                }
            }
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
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.count.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Sends the stream until its end, an error, or until nobody listens; answers the hash of what was sent.
fn pump(input: Counted<Box<dyn Read + Send>>, sender: &SyncSender<io::Result<Vec<u8>>>) -> [u8; 32] {
    let mut hasher = Sha256::new();
    let mut input = match decompressed(input) {
        Ok(input) => input,
        Err(error) => {
            let _ = sender.send(Err(error));
            return hasher.finalize().into();
        }
    };
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let read = (&mut input).take(CHUNK as u64).read_to_end(&mut chunk);
        hasher.update(&chunk);
        let ended = chunk.is_empty();
        if !ended && sender.send(Ok(chunk)).is_err() {
            break;
        }
        if let Err(error) = read {
            let _ = sender.send(Err(error));
            break;
        }
        if ended {
            break;
        }
    }
    hasher.finalize().into()
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
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::with_buffer(input)?),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(input)),
        _ => Box::new(input),
    })
}
