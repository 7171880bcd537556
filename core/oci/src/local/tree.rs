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

use crate::OciError;

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

/// How much of an archive is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// What its entries are called.
    Names,
    /// What is in them, too: a compressed archive is unpacked for that.
    Content,
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
    pub(super) fn open(path: &Path, scratch: &Path, depth: Depth) -> Result<Self, OciError> {
        let failed = |source| OciError::Read { path: path.to_owned(), source };
        let opened = std::os::unix::fs::OpenOptionsExt::custom_flags(
            File::options().read(true),
            nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY,
        )
        .open(path);
        let mut file = opened.map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")));
        }
        let mut magic = [0; 4];
        let known = file.read_at(&mut magic, 0).map_err(failed)?;
        let again = || file.try_clone().map_err(failed);
        let packed: Option<Box<dyn Read>> = match &magic[..known] {
            [0x1f, 0x8b, ..] => {
                Some(Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(again()?))))
            }
            [0x28, 0xb5, 0x2f, 0xfd] => Some(Box::new(zstd::Decoder::new(again()?).map_err(failed)?)),
            _ => None,
        };
        match (packed, depth) {
            (None, _) => {}
            (Some(reader), Depth::Names) => {
                let mut archive = tar::Archive::new(reader);
                let entries = archive.entries().map_err(|error| malformed(path, &error))?;
                let nodes = nodes(path, entries, None)?;
                return Ok(Self { path: path.to_owned(), file: Arc::new(file), nodes });
            }
            (Some(mut reader), Depth::Content) => {
                let store = |source| OciError::Store {
                    action: "unpack an archive to",
                    path: scratch.to_owned(),
                    source,
                };
                let mut unpacked = tempfile::tempfile_in(scratch).map_err(store)?;
                // Which of the two failed, the error says: the disk has its own codes.
                io::copy(&mut reader, &mut unpacked).map_err(|error| match error.raw_os_error() {
                    Some(_) => store(error),
                    None => malformed(path, &error),
                })?;
                file = unpacked;
                file.rewind().map_err(failed)?;
            }
        }
        let size = file.metadata().map_err(failed)?.len();
        let mut archive = tar::Archive::new(&file);
        let entries = archive.entries_with_seek().map_err(|error| malformed(path, &error))?;
        let nodes = nodes(path, entries, Some(size))?;
        Ok(Self { path: path.to_owned(), file: Arc::new(file), nodes })
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.nodes.contains_key(path)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}

fn malformed(path: &Path, error: &io::Error) -> OciError {
    OciError::Malformed {
        what: format!("archive {}", path.display()),
        reason: crate::error::plain(&error.to_string()),
    }
}

/// What is where, in an archive of this size if that is known.
fn nodes<R: Read>(
    path: &Path,
    entries: tar::Entries<'_, R>,
    size: Option<u64>,
) -> Result<HashMap<String, Node>, OciError> {
    let refused =
        |reason: String| OciError::Malformed { what: format!("archive {}", path.display()), reason };
    let mut nodes = HashMap::new();
    for entry in entries {
        let entry = entry.map_err(|error| malformed(path, &error))?;
        if nodes.len() == MAX_ENTRIES {
            // A root filesystem has many; an image in an archive has not.
            break;
        }
        let Some(name) = normal(&String::from_utf8_lossy(&entry.path_bytes())) else { continue };
        let kind = entry.header().entry_type();
        let node = if kind.is_file() || kind.is_contiguous() {
            let (offset, length) = (entry.raw_file_position(), entry.size());
            if size.is_some_and(|size| offset.checked_add(length).is_none_or(|end| end > size)) {
                return Err(refused(format!("it ends within {name:?}")));
            }
            Node::File { offset, size: length }
        } else if let (true, Some(target)) =
            (kind.is_symlink() || kind.is_hard_link(), entry.link_name_bytes())
        {
            let target = String::from_utf8_lossy(&target).into_owned();
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
