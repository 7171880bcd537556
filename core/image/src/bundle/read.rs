//! Bundles, read.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use sha2::{Digest, Sha256};
use vm_types::ImageDigest;

use super::{METADATA, METADATA_MAX, Member, Metadata, Part};
use crate::{
    ImageError, ProgressSink,
    kernel::{self, KernelSource, carry},
    progress::{Cancel, Reporter, blocking},
    registered,
    rootfs::{
        self, BuiltRootfs,
        archive::{Archive, Entry, Kind},
        flatten::{self, Identify, Input, Layer, digest_of},
        stream::{Stream, Wanted},
    },
    scratch::Scratch,
};

/// How much is written at once, or left out where it is zeros.
const CHUNK: usize = 128 << 10;
/// How much is written before the disk is looked at again.
const STRIDE: u64 = 64 << 20;

/// What is wanted of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Want {
    /// Its root filesystem, to be put there, and its kernel if it has one.
    Image(PathBuf),
    /// Its kernel alone.
    Kernel,
}

/// What was in a bundle.
#[derive(Debug)]
pub struct Unpacked {
    /// The root filesystem, where it is wanted to be.
    pub rootfs: Option<BuiltRootfs>,
    /// The kernel, to be installed.
    pub kernel: Option<KernelSource>,
}

/// What a bundle says of itself, and the digest of that; `None` for a file that is none.
///
/// # Errors
/// A file that cannot be read, or a bundle that cannot be used here.
pub async fn describe(path: &Path) -> Result<Option<(Metadata, ImageDigest)>, ImageError> {
    let path = path.to_owned();
    blocking(move |cancel| {
        let about = fs::metadata(&path).map_err(|source| file("look at", &path, source))?;
        if !about.is_file() {
            return Ok(None);
        }
        let mut archive = open(&path, cancel)?;
        match archive.next_entry() {
            Ok(Some(entry)) if plain(&entry) == METADATA => metadata(&path, &mut archive, &entry).map(Some),
            // What else it is, and whether it is a good one, others say.
            Ok(_)
            | Err(
                ImageError::CorruptArchive { .. }
                | ImageError::TruncatedArchive { .. }
                | ImageError::RefusedEntry { .. },
            ) => Ok(None),
            Err(error) => Err(error),
        }
    })
    .await
}

/// Takes a bundle apart whose metadata has the digest `identity`, which becomes the root filesystem's; all of it is verified. `scratch`
/// should be on one filesystem with where the root filesystem goes, which appears whole or not at all.
///
/// Dropping the future cancels; a directory made below `scratch` then vanishes shortly after.
///
/// # Errors
/// A bundle that is damaged, hostile or not what it says it is; a kernel that cannot be used; lack of room.
pub async fn unpack(
    path: &Path,
    identity: &ImageDigest,
    want: Want,
    scratch: &Path,
    progress: ProgressSink,
) -> Result<Unpacked, ImageError> {
    let scratch = Scratch::new(scratch, "bundle-")?;
    let (path, directory, reporter) = (path.to_owned(), scratch.join(""), Reporter::new(progress));
    let origin = format!("bundle {}", identity.short());
    let identity = identity.clone();
    let work = move |cancel: &Cancel| {
        let mut archive = open(&path, cancel)?;
        let (metadata, found) = match archive.next_entry()? {
            Some(entry) if plain(&entry) == METADATA => metadata(&path, &mut archive, &entry)?,
            _ => return Err(refused(&path, format!("it does not begin with {METADATA}"))),
        };
        if found != identity {
            return Err(refused(&path, "it has changed while it was read".into()));
        }
        let unpacking = Unpacking {
            path: &path,
            identity: &identity,
            metadata: &metadata,
            archive: Arc::new(Mutex::new(archive)),
            want: &want,
            directory: &directory,
            cancel,
            reporter: &reporter,
        };
        let rootfs = unpacking.parts()?;
        let part = |part: Part, name| metadata.parts.contains_key(&part).then(|| directory.join(name));
        let kernel = match part(Part::Kernel, Part::Kernel.name()) {
            Some(boot) => {
                let modules = part(Part::Modules, MODULES);
                let source =
                    kernel::source_of(boot, modules, part(Part::KernelConfig, Part::KernelConfig.name()));
                Some(source.map_err(|error| in_bundle(&path, error))?)
            }
            None => None,
        };
        Ok((rootfs, kernel))
    };
    match blocking(work).await {
        Ok((rootfs, Some(kernel))) => Ok(Unpacked { rootfs, kernel: Some(kernel.of(origin, scratch)) }),
        other => {
            scratch.close().await;
            other.map(|(rootfs, _)| Unpacked { rootfs, kernel: None })
        }
    }
}

/// Where modules are unpacked to.
const MODULES: &str = "modules";

fn file(action: &'static str, path: &Path, source: io::Error) -> ImageError {
    ImageError::File { action, path: path.to_owned(), source }
}

fn refused(path: &Path, reason: String) -> ImageError {
    ImageError::Bundle { path: path.to_owned(), reason }
}

/// A part that is not what it should be is the bundle's fault; its own path says nothing to anybody.
fn in_bundle(path: &Path, error: ImageError) -> ImageError {
    match error {
        ImageError::NotAKernel { reason, .. } => refused(path, format!("its kernel is none: {reason}")),
        ImageError::NotAFilesystem { reason, .. } => {
            refused(path, format!("its root filesystem cannot be used: {reason}"))
        }
        other => other,
    }
}

fn open(path: &Path, cancel: &Cancel) -> Result<Archive<Stream>, ImageError> {
    let opened = File::open(path).map_err(|source| file("open", path, source))?;
    let wanted = Wanted { blob: false, stream: false };
    let stream = Stream::start(Box::new(opened), wanted, cancel.clone())
        .map_err(|source| ImageError::ReadArchive { source })?;
    Ok(Archive::new(stream, false))
}

/// An entry's name; tools put `./` in front.
fn plain(entry: &Entry) -> String {
    let name = String::from_utf8_lossy(&entry.path);
    name.strip_prefix("./").unwrap_or(&name).to_owned()
}

fn metadata(
    path: &Path,
    archive: &mut Archive<Stream>,
    entry: &Entry,
) -> Result<(Metadata, ImageDigest), ImageError> {
    if entry.size > METADATA_MAX || entry.kind != Kind::File || entry.segments.len() > 1 {
        return Err(refused(path, format!("{METADATA} is no file of at most {METADATA_MAX} bytes")));
    }
    let mut bytes = vec![0; usize::try_from(entry.size).unwrap_or_default()];
    archive.read_content(&mut bytes)?;
    let metadata = Metadata::parse(&bytes).map_err(|reason| refused(path, reason))?;
    Ok((metadata, digest_of(&Sha256::digest(&bytes).into())?))
}

struct Unpacking<'a> {
    path: &'a Path,
    identity: &'a ImageDigest,
    metadata: &'a Metadata,
    archive: Arc<Mutex<Archive<Stream>>>,
    want: &'a Want,
    directory: &'a Path,
    cancel: &'a Cancel,
    reporter: &'a Reporter,
}

impl Unpacking<'_> {
    fn refused(&self, reason: String) -> ImageError {
        refused(self.path, reason)
    }

    fn is_wanted(&self, part: Part) -> bool {
        match self.want {
            Want::Image(_) => true,
            Want::Kernel => !part.is_rootfs(),
        }
    }

    /// Takes what is wanted out of the archive; the root filesystem's place is taken last, when all is verified.
    fn parts(&self) -> Result<Option<BuiltRootfs>, ImageError> {
        let mut seen = BTreeSet::new();
        let wanted = self.metadata.parts.keys().filter(|part| self.is_wanted(**part)).count();
        // Whoever wants the kernel alone need not read what is behind it.
        while *self.want != Want::Kernel || seen.len() < wanted {
            let entry = self.archive.lock().unwrap_or_else(PoisonError::into_inner).next_entry()?;
            let Some(entry) = entry else { break };
            let name = plain(&entry);
            let known = Part::named(&name).and_then(|part| Some((part, self.metadata.parts.get(&part)?)));
            let Some((part, member)) = known else {
                return Err(self.refused(format!("{METADATA} says nothing of {name:?}, which is in it")));
            };
            if entry.kind != Kind::File || entry.size != member.size {
                return Err(
                    self.refused(format!("{name} is no file of {} bytes, as {METADATA} says", member.size))
                );
            }
            if !self.is_wanted(part) {
                continue;
            }
            if !seen.insert(part) {
                return Err(self.refused(format!("{name} is in it twice")));
            }
            self.part(part, member, &entry)?;
        }
        let missing = self.metadata.parts.keys().find(|part| self.is_wanted(**part) && !seen.contains(part));
        if let Some(part) = missing {
            return Err(self.refused(format!("{} is missing", part.name())));
        }
        let Want::Image(out) = self.want else { return Ok(None) };
        self.archive.lock().unwrap_or_else(PoisonError::into_inner).drain()?;
        let image = self.directory.join(IMAGE);
        if !self.metadata.has_rootfs() {
            return Ok(None);
        }
        rootfs::settle(self.identity.clone(), &image, out, self.cancel, self.reporter).map(Some)
    }

    fn part(&self, part: Part, member: &Member, entry: &Entry) -> Result<(), ImageError> {
        let sum = Arc::default();
        let content = Content::new(Arc::clone(&self.archive), entry, Arc::clone(&sum));
        let name = part.name();
        match part {
            Part::Kernel | Part::KernelConfig => {
                self.reporter.report("unpacking the kernel", 0, None);
                self.copy(content, &self.directory.join(name), member.size, None)?;
            }
            Part::Modules => {
                self.reporter.report("unpacking the kernel", 0, None);
                carry::unpack(Box::new(content), &self.directory.join(MODULES), self.cancel)?;
            }
            Part::Ext4 => {
                let image = self.directory.join(IMAGE);
                self.copy(content, &image, member.size, Some("unpacking"))?;
                registered::verify(&image).map_err(|error| in_bundle(self.path, error))?;
            }
            Part::Tar => {
                let input = Input::Open(Box::new(content), Some(member.size));
                let layer = Layer { input, digest: None, diff_id: None };
                let (identity, image) = (Identify::By(self.identity.clone()), self.directory.join(IMAGE));
                flatten::flatten(vec![layer], false, identity, &image, self.cancel, self.reporter)?;
            }
        }
        match sum.get() {
            Some(found) if digest_of(found)? == member.digest => Ok(()),
            Some(found) => Err(self.refused(format!(
                "{name} has the digest {} instead of {}",
                digest_of(found)?,
                member.digest
            ))),
            None => Err(self.refused(format!("{name} has more in it than an archive"))),
        }
    }

    /// Writes a part to a new file, but for its zeros.
    fn copy(
        &self,
        mut content: Content,
        to: &Path,
        size: u64,
        stage: Option<&str>,
    ) -> Result<(), ImageError> {
        let failed = |source| file("write", to, source);
        let mut output = File::create_new(to).map_err(failed)?;
        let (mut chunk, mut done, mut unchecked) = (vec![0; CHUNK], 0_u64, STRIDE);
        loop {
            self.cancel.check()?;
            let count = content.fill(&mut chunk)?;
            let Some(bytes) = chunk.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
            if bytes.iter().all(|&byte| byte == 0) {
                output.seek(SeekFrom::Current(count as i64)).map_err(failed)?;
            } else {
                if unchecked >= STRIDE {
                    unchecked = 0;
                    vm_host::files::room_of(&output, STRIDE).map_err(failed)?;
                }
                output.write_all(bytes).map_err(failed)?;
                unchecked += count as u64;
            }
            done += count as u64;
            if let Some(stage) = stage {
                self.reporter.report(stage, done, Some(size));
            }
        }
        output.set_len(size).map_err(failed)
    }
}

/// The filesystem in the making.
const IMAGE: &str = "image";

/// What is in one entry, its holes as zeros. At its end `sum` is its SHA-256.
struct Content {
    archive: Arc<Mutex<Archive<Stream>>>,
    /// What is stored of it, the first one last.
    segments: Vec<(u64, u64)>,
    at: u64,
    size: u64,
    hasher: Sha256,
    sum: Arc<OnceLock<[u8; 32]>>,
}

impl Content {
    fn new(archive: Arc<Mutex<Archive<Stream>>>, entry: &Entry, sum: Arc<OnceLock<[u8; 32]>>) -> Self {
        let segments = entry.segments.iter().rev().copied().collect();
        Self { archive, segments, at: 0, size: entry.size, hasher: Sha256::new(), sum }
    }

    fn next(&mut self, buffer: &mut [u8]) -> Result<usize, ImageError> {
        while self.segments.last().is_some_and(|(start, length)| start + length <= self.at) {
            self.segments.pop();
        }
        let most = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX).min(buffer.len());
        let count = match self.segments.last() {
            Some(&(start, length)) if start <= self.at => {
                let count = most(start + length - self.at);
                let mut archive = self.archive.lock().unwrap_or_else(PoisonError::into_inner);
                archive.read_content(&mut buffer[..count])?
            }
            hole => {
                let count = most(hole.map_or(self.size, |(start, _)| *start) - self.at);
                buffer[..count].fill(0);
                count
            }
        };
        self.hasher.update(&buffer[..count]);
        self.at += count as u64;
        if self.at == self.size {
            let _ = self.sum.set(std::mem::take(&mut self.hasher).finalize().into());
        }
        Ok(count)
    }

    /// As much as there is and has room.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, ImageError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.next(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Whoever reads an archive in an archive knows these by their kinds.
        self.next(buffer).map_err(|error| match error {
            ImageError::Cancelled => io::ErrorKind::ConnectionAborted.into(),
            ImageError::TruncatedArchive { .. } => io::ErrorKind::UnexpectedEof.into(),
            ImageError::RefusedEntry { .. } => io::ErrorKind::QuotaExceeded.into(),
            ImageError::ReadArchive { source } => source,
            other => io::Error::other(other.to_string()),
        })
    }
}
