//! Files by their paths, in a directory or in a tar archive.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    io::{self, BufReader, Read, Seek},
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};

use super::entries::{Entries, Source};
use crate::{
    OciError,
    store::{Cancelled, STRIDE},
};

/// How often openat2(2) is asked for one file.
const TRIES: u32 = 100;
/// Layouts have a few entries for each layer.
const MAX_ENTRIES: usize = 100_000;
const MAX_LINKS: usize = 8;

/// A part of a file that is open.
#[derive(Debug, Clone)]
pub(crate) struct Section {
    path: PathBuf,
    file: Arc<File>,
    offset: u64,
    /// In bytes.
    pub(crate) size: u64,
    /// Whether the file has nothing else in it.
    alone: bool,
}

impl Section {
    /// The file, where it is all of it.
    pub(crate) fn whole(&self) -> Option<&File> {
        self.alone.then_some(&*self.file)
    }

    /// Bytes from a place in it; 0 at its end.
    pub(crate) fn read_at(&self, piece: &mut [u8], at: u64) -> Result<usize, OciError> {
        let left = usize::try_from(self.size.saturating_sub(at)).unwrap_or(usize::MAX).min(piece.len());
        let read = self.file.read_at(&mut piece[..left], self.offset + at);
        read.map_err(|source| OciError::Read { path: self.path.clone(), source })
    }

    /// All of it, if it is no more than this.
    pub(crate) fn read(&self, what: &str, most: u64) -> Result<Vec<u8>, OciError> {
        if self.size > most {
            return Err(OciError::Large { what: what.to_owned(), bytes: self.size, most });
        }
        let mut bytes = vec![0; usize::try_from(self.size).unwrap_or(usize::MAX)];
        let mut at = 0;
        while at < bytes.len() {
            match self.read_at(&mut bytes[at..], at as u64)? {
                0 => break,
                n => at += n,
            }
        }
        bytes.truncate(at);
        Ok(bytes)
    }
}

/// Files by paths relative to it, with `/` between their parts.
pub(crate) trait Tree: fmt::Debug + Send + Sync {
    /// One file.
    fn file(&self, path: &str) -> Result<Section, OciError>;
}

/// A directory that is open. All is opened beneath it, so that links can lead from one file to another but not out of it.
#[derive(Debug)]
pub(super) struct Dir {
    path: PathBuf,
    dir: OwnedFd,
}

impl Dir {
    pub(super) fn open(path: &Path) -> Result<Self, OciError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = open(path, flags, Mode::empty())
            .map_err(|error| OciError::Read { path: path.to_owned(), source: error.into() })?;
        Ok(Self { path: path.to_owned(), dir })
    }
}

impl Tree for Dir {
    fn file(&self, name: &str) -> Result<Section, OciError> {
        let path = self.path.join(name);
        let failed = |source: io::Error| OciError::Read { path: path.clone(), source };
        // Not blocking: a named pipe would wait for its other end.
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        // The kernel asks for another try where something was renamed while it went up by `..`.
        let mut tries = (0..TRIES).map(|_| openat2(&self.dir, name, how));
        let opened = tries.find(|opened| !matches!(opened, Err(Errno::EAGAIN)));
        let file = match opened.unwrap_or(Err(Errno::EAGAIN)) {
            Err(Errno::EXDEV | Errno::ELOOP) => return Err(OciError::Outside { path: name.to_owned() }),
            Err(Errno::ENOENT) => {
                return Err(OciError::NoPart { path: self.path.clone(), name: name.to_owned() });
            }
            file => File::from(file.map_err(|error| failed(error.into()))?),
        };
        let about = file.metadata().map_err(failed)?;
        if !about.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")));
        }
        Ok(Section { path, file: Arc::new(file), offset: 0, size: about.len(), alone: true })
    }
}

/// What an archive holds, by what its entries are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An image layout. Newer `docker save` writes one, too: it keeps the layers as they were pushed.
    Layout,
    /// What older ones write.
    Docker,
    /// Nothing.
    Empty,
    /// Something else: most likely a root filesystem.
    Other,
}

/// Looks at no more entries than it takes to be sure, for what is compressed is unpacked up to there.
pub(super) fn kind(path: &Path, cancelled: &Cancelled) -> Result<Kind, OciError> {
    let file = regular(path)?;
    let read = match unpacked(path, &file, cancelled)? {
        Some(reader) => Names::default().read(Entries::new(reader)),
        None => Names::default().read(Entries::new(BufReader::new(&file))),
    };
    read.map_err(|error| malformed(path, &error))
}

#[derive(Default)]
struct Names {
    any: bool,
    marker: bool,
    index: bool,
    list: bool,
}

impl Names {
    fn read(mut self, mut entries: Entries<impl Source>) -> io::Result<Kind> {
        while let Some(entry) = entries.next()? {
            self.any = true;
            let Some(name) = normal(&String::from_utf8_lossy(&entry.name)) else { continue };
            match name.as_str() {
                "oci-layout" => self.marker = true,
                "index.json" => self.index = true,
                "manifest.json" => self.list = true,
                name if is_of_image(name) => {}
                _ => return Ok(Kind::Other),
            }
            if self.marker && self.index {
                return Ok(Kind::Layout);
            }
        }
        Ok(match (self.list, self.any) {
            (true, _) => Kind::Docker,
            (false, true) => Kind::Other,
            (false, false) => Kind::Empty,
        })
    }
}

/// Whether an archive of an image may have an entry of this name. Besides what the two formats know, tools that write Docker's call
/// layers and configurations what they like; none of it is what a root filesystem begins with.
fn is_of_image(name: &str) -> bool {
    let (top, rest) = name.split_once('/').map_or((name, None), |(top, rest)| (top, Some(rest)));
    let hex = |text: &str| text.len() >= 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match rest {
        None => {
            matches!(top, "blobs" | "repositories")
                || hex(top.strip_prefix("sha256:").unwrap_or(top))
                || [".json", ".tar", ".tar.gz", ".tgz", ".tar.zst"].iter().any(|end| top.ends_with(end))
        }
        Some(_) if top == "blobs" || hex(top) => true,
        Some(rest) => matches!(rest, "layer.tar" | "json" | "VERSION"),
    }
}

fn regular(path: &Path) -> Result<File, OciError> {
    let failed = |source| OciError::Read { path: path.to_owned(), source };
    let opened = std::os::unix::fs::OpenOptionsExt::custom_flags(
        File::options().read(true),
        nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY,
    )
    .open(path);
    let file = opened.map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")));
    }
    Ok(file)
}

/// What unpacks a compressed file, as long as somebody waits for it; `None` for one that is none.
fn unpacked(path: &Path, file: &File, cancelled: &Cancelled) -> Result<Option<Box<dyn Read>>, OciError> {
    let failed = |source| OciError::Read { path: path.to_owned(), source };
    let mut magic = [0; 4];
    let known = file.read_at(&mut magic, 0).map_err(failed)?;
    let again = || file.try_clone().map(BufReader::new).map_err(failed);
    let reader: Box<dyn Read> = match &magic[..known] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(again()?)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::with_buffer(again()?).map_err(failed)?),
        _ => return Ok(None),
    };
    Ok(Some(Box::new(Watched { reader, cancelled: cancelled.clone() })))
}

/// Ends with an error once nobody waits any more; nobody gets to see it.
struct Watched<R> {
    reader: R,
    cancelled: Cancelled,
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        if self.cancelled.is() { Err(io::Error::other("cancelled")) } else { self.reader.read(piece) }
    }
}

#[derive(Debug, Clone)]
enum Node {
    File { offset: u64, size: u64 },
    Link { target: String },
}

/// A tar archive that is open.
#[derive(Debug)]
pub(super) struct Tar {
    path: PathBuf,
    file: Arc<File>,
    nodes: HashMap<String, Node>,
}

impl Tar {
    /// Reads the entries' headers. `scratch` is where a compressed archive is unpacked to, in a file without a name.
    pub(super) fn open(path: &Path, scratch: &Path, cancelled: &Cancelled) -> Result<Self, OciError> {
        let failed = |source| OciError::Read { path: path.to_owned(), source };
        let mut file = regular(path)?;
        if let Some(mut reader) = unpacked(path, &file, cancelled)? {
            let store =
                |source| OciError::Store { action: "unpack an archive to", path: scratch.to_owned(), source };
            let mut whole = tempfile::tempfile_in(scratch).map_err(store)?;
            // Which of the two failed, the error says: the disk has its own codes.
            let failed = |error: io::Error| match error.raw_os_error() {
                Some(_) => store(error),
                None => malformed(path, &error),
            };
            loop {
                crate::store::room(scratch, STRIDE)?;
                if io::copy(&mut (&mut reader).take(STRIDE), &mut whole).map_err(failed)? < STRIDE {
                    break;
                }
            }
            file = whole;
            file.rewind().map_err(failed)?;
        }
        let size = file.metadata().map_err(failed)?.len();
        let nodes = nodes(path, Entries::new(BufReader::new(&file)), size)?;
        Ok(Self { path: path.to_owned(), file: Arc::new(file), nodes })
    }
}

fn malformed(path: &Path, error: &io::Error) -> OciError {
    OciError::Malformed {
        what: format!("archive {}", path.display()),
        reason: crate::error::plain(&error.to_string()),
    }
}

/// What is where, in an archive of this size.
fn nodes(
    path: &Path,
    mut entries: Entries<impl Source>,
    size: u64,
) -> Result<HashMap<String, Node>, OciError> {
    let refused =
        |reason: String| OciError::Malformed { what: format!("archive {}", path.display()), reason };
    let mut nodes = HashMap::new();
    while let Some(entry) = entries.next().map_err(|error| malformed(path, &error))? {
        if nodes.len() == MAX_ENTRIES {
            return Err(refused(format!("it has more than {MAX_ENTRIES} entries")));
        }
        let Some(name) = normal(&String::from_utf8_lossy(&entry.name)) else { continue };
        let kind = entry.kind;
        let node = if kind.is_file() || kind.is_contiguous() {
            let (offset, length) = (entry.offset, entry.size);
            if offset.checked_add(length).is_none_or(|end| end > size) {
                return Err(refused(format!("it ends within {name:?}")));
            }
            Node::File { offset, size: length }
        } else if let (true, Some(target)) = (kind.is_symlink() || kind.is_hard_link(), &entry.target) {
            let target = String::from_utf8_lossy(target).into_owned();
            let target = match (kind.is_symlink(), name.rsplit_once('/')) {
                (true, Some((dir, _))) if !target.starts_with('/') => format!("{dir}/{target}"),
                _ => target,
            };
            Node::Link { target }
        } else {
            continue;
        };
        nodes.insert(name, node);
    }
    Ok(nodes)
}

/// A path without `.`, `..` and empty parts; `None` where it leads out of the archive or to its top.
fn normal(path: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

impl Tree for Tar {
    fn file(&self, name: &str) -> Result<Section, OciError> {
        let missing = || OciError::NoPart { path: self.path.clone(), name: name.to_owned() };
        let mut at = normal(name).ok_or_else(missing)?;
        for _ in 0..MAX_LINKS {
            match self.nodes.get(&at).ok_or_else(missing)? {
                Node::File { offset, size } => {
                    let (path, file) = (self.path.clone(), self.file.clone());
                    return Ok(Section { path, file, offset: *offset, size: *size, alone: false });
                }
                Node::Link { target } => {
                    at = normal(target).ok_or_else(|| OciError::Outside { path: name.to_owned() })?;
                }
            }
        }
        Err(missing())
    }
}
