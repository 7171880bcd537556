//! Layers become one filesystem: decompressed ahead on threads of their own, placed one after the other, so that the
//! same layers give the same bytes whatever their threads did.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io,
    num::NonZero,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use vm_types::ImageDigest;

use super::{
    archive::{Archive, Entry, Kind},
    merge::Tree,
    stream::{Stream, Sums, Wanted, hex},
};
use crate::{
    ImageError,
    ext4::{self, BLOCK, DataWriter, Extent, Extents, IMAGE_MAX, Identity},
    progress::{Cancel, Reporter},
};

const UNPACKING: &str = "unpacking";
const MAKING: &str = "making the filesystem";
/// Layers that are read at once, at most; each may hold 32 MiB.
const AT_ONCE: usize = 4;
/// How many pieces of what is gone are given back to the host at once.
const DEAD_MAX: usize = 4096;

/// One layer, and what its bytes must be.
pub(crate) struct Layer {
    pub(crate) input: Input,
    /// SHA-256 of the blob.
    pub(crate) digest: Option<ImageDigest>,
    /// SHA-256 of the uncompressed archive.
    pub(crate) diff_id: Option<ImageDigest>,
}

pub(crate) enum Input {
    /// A file that is opened when its turn comes.
    Blob(PathBuf),
    Open(Box<dyn io::Read + Send>, Option<u64>),
}

impl Layer {
    /// How the user knows it.
    fn name(&self) -> String {
        match (&self.input, &self.digest) {
            (_, Some(digest)) => format!("layer {digest}"),
            (Input::Blob(path), None) => format!("layer {}", path.display()),
            (Input::Open(..), None) => "archive".into(),
        }
    }

    fn length(&self) -> Option<u64> {
        match &self.input {
            Input::Blob(path) => fs::metadata(path).map(|about| about.len()).ok(),
            Input::Open(_, length) => *length,
        }
    }

    fn start(self, sum: bool, cancel: &Cancel) -> Result<Started, ImageError> {
        let name = self.name();
        let input: Box<dyn io::Read + Send> = match self.input {
            Input::Open(reader, _) => reader,
            Input::Blob(path) => Box::new(File::open(&path).map_err(|source| ImageError::File {
                action: "open",
                path,
                source,
            })?),
        };
        let wanted = Wanted { blob: self.digest.is_some(), stream: sum || self.diff_id.is_some() };
        let stream = Stream::start(input, wanted, cancel.clone())
            .map_err(|source| ImageError::ReadArchive { source })?;
        Ok(Started { stream, name, digest: self.digest, diff_id: self.diff_id })
    }
}

struct Started {
    stream: Stream,
    name: String,
    digest: Option<ImageDigest>,
    diff_id: Option<ImageDigest>,
}

/// What identifies the result.
pub(crate) enum Identify {
    By(ImageDigest),
    /// The sum of the only layer's uncompressed archive.
    ByStream,
}

/// Writes the filesystem of layers, lowest first, to a new file. `whiteouts`: names that begin with `.wh.` hide others.
pub(crate) fn flatten(
    layers: Vec<Layer>,
    whiteouts: bool,
    identify: Identify,
    image: &Path,
    cancel: &Cancel,
    reporter: &Reporter,
) -> Result<ImageDigest, ImageError> {
    let failed = |source| ImageError::File { action: "write", path: image.to_owned(), source };
    let file = File::options().read(true).write(true).create_new(true).open(image).map_err(failed)?;
    let total = layers.iter().map(Layer::length).sum();
    let by_stream = matches!(identify, Identify::ByStream);
    let mut work = Work {
        writer: DataWriter::new(file),
        tree: Tree::new(whiteouts),
        dead: Vec::new(),
        image,
        cancel,
        watch: Watch { reporter, total, before: 0, current: Arc::default() },
    };
    work.watch.report();
    let ahead = std::thread::available_parallelism().map_or(2, NonZero::get).clamp(2, AT_ONCE);
    let mut layers = layers.into_iter();
    let mut started = VecDeque::new();
    let mut last = None;
    loop {
        while started.len() < ahead
            && let Some(layer) = layers.next()
        {
            started.push_back(layer.start(by_stream, cancel)?);
        }
        let Some(layer) = started.pop_front() else { break };
        last = Some(work.layer(layer)?);
    }
    let digest = match (identify, last.and_then(|sums| sums.stream)) {
        (Identify::By(digest), _) => digest,
        (Identify::ByStream, sum) => digest_of(&sum.unwrap_or_default())?,
    };
    let Work { writer, mut tree, dead, .. } = work;
    let identity = Identity::of(&bytes_of(&digest));
    ext4::finish(writer, &mut tree.filesystem, &identity, &dead, |done, total| {
        reporter.report(MAKING, done, Some(total));
        cancel.check().map_err(Stopped::Image)
    })
    .map_err(|stopped| match stopped {
        Stopped::Image(error) => error,
        Stopped::Write(source) => failed(source),
    })?;
    Ok(digest)
}

struct Work<'a> {
    writer: DataWriter,
    tree: Tree,
    dead: Vec<Extent>,
    image: &'a Path,
    cancel: &'a Cancel,
    watch: Watch<'a>,
}

/// How far the reading is.
struct Watch<'a> {
    reporter: &'a Reporter,
    total: Option<u64>,
    before: u64,
    current: Arc<AtomicU64>,
}

impl Watch<'_> {
    fn report(&self) {
        self.reporter.report(UNPACKING, self.before + self.current.load(Ordering::Relaxed), self.total);
    }
}

/// Why writing ended early.
enum Stopped {
    Image(ImageError),
    Write(io::Error),
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

impl Work<'_> {
    fn layer(&mut self, layer: Started) -> Result<Sums, ImageError> {
        self.tree.next_layer();
        self.watch.current = layer.stream.consumed();
        // What a digest tells to be whole may lack its end mark, as some tools' layers do, even be empty.
        let vouched = layer.digest.is_some() || layer.diff_id.is_some();
        let mut archive = Archive::new(layer.stream, vouched);
        while let Some(entry) = archive.next_entry()? {
            self.watch.report();
            let refused = |reason| ImageError::RefusedEntry { path: abridged(&entry.path), reason };
            self.tree.check(&entry).map_err(refused)?;
            let content = if entry.kind == Kind::File && !self.tree.is_instruction(&entry) {
                self.store(&mut archive, &entry)?
            } else {
                Extents::default()
            };
            self.tree.add(&entry, content).map_err(refused)?;
            if self.tree.dead_extents() >= DEAD_MAX {
                self.bury()?;
            }
        }
        self.tree.end_layer();
        self.bury()?;
        archive.drain()?;
        let sums = archive.into_inner().sums().map_err(|source| ImageError::ReadArchive { source })?;
        let pairs = [("", &layer.digest, sums.blob), ("uncompressed ", &layer.diff_id, sums.stream)];
        for (form, expected, found) in pairs {
            if let (Some(expected), Some(found)) = (expected, found)
                && bytes_of(expected) != found
            {
                return Err(ImageError::CorruptArchive {
                    last: String::new(),
                    reason: format!(
                        "{form}{} has the digest sha256:{} instead of {expected}",
                        layer.name,
                        hex(&found)
                    ),
                });
            }
        }
        self.watch.before += self.watch.current.load(Ordering::Relaxed);
        self.watch.current = Arc::default();
        self.watch.report();
        Ok(sums)
    }

    /// Takes a file's content from the archive to its place.
    fn store(&mut self, archive: &mut Archive<Stream>, entry: &Entry) -> Result<Extents, ImageError> {
        let watch = &self.watch;
        let cancel = self.cancel;
        let stored = self.writer.store(&entry.segments, |buffer| {
            watch.report();
            cancel.check().map_err(Stopped::Image)?;
            archive.read_content(buffer).map(drop).map_err(Stopped::Image)
        });
        stored.map_err(|stopped| match stopped {
            Stopped::Image(error) => error,
            Stopped::Write(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                ImageError::RefusedEntry {
                    path: abridged(&entry.path),
                    reason: format!("is beyond what an image may have, {} GiB", IMAGE_MAX >> 30),
                }
            }
            Stopped::Write(source) => {
                ImageError::Entry { action: "write", path: abridged(&entry.path), source }
            }
        })
    }

    /// Gives the room of files that are gone back to the host.
    fn bury(&mut self) -> Result<(), ImageError> {
        let mut dead = self.tree.take_dead();
        // Neighbours together: layers replace whole packages.
        dead.sort_unstable_by_key(|extent| extent.start);
        dead.dedup_by(|next, former| {
            let joins = former.start + former.length == next.start;
            if joins {
                former.length += next.length;
            }
            joins
        });
        self.writer.discard(&dead).map_err(|source| ImageError::File {
            action: "write",
            path: self.image.to_owned(),
            source,
        })?;
        self.dead.append(&mut dead);
        Ok(())
    }
}

/// A path as it is shown; a very long one's begin.
fn abridged(path: &[u8]) -> String {
    match path.get(..1024) {
        Some(start) => format!("{}…", String::from_utf8_lossy(start)),
        None => String::from_utf8_lossy(path).into_owned(),
    }
}

pub(crate) fn digest_of(sum: &[u8; 32]) -> Result<ImageDigest, ImageError> {
    ImageDigest::try_from(format!("sha256:{}", hex(sum)))
        .map_err(|error| ImageError::ReadArchive { source: io::Error::other(error) })
}

/// The 32 bytes of a digest, whose form its type warrants.
fn bytes_of(digest: &ImageDigest) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digest.hex().as_bytes().chunks(2)) {
        let text = std::str::from_utf8(pair).unwrap_or_default();
        *byte = u8::from_str_radix(text, 16).unwrap_or_default();
    }
    bytes
}

const _: () = assert!(IMAGE_MAX / BLOCK < 1 << 31);
