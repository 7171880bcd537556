//! What came from the guest, kept in scratch files that are named by numbers: no name that the guest chose becomes a path here.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, BufReader, ErrorKind, Read, Write},
    path::{Path, PathBuf},
    rc::Rc,
};

use sha2::{Digest, Sha256};
use tar::EntryType;

use crate::{Cancel, export::ExportError, text::shown};

/// The most that may describe one entry of an archive, in bytes. It is kept in memory.
const HEADERS: u64 = 64 << 10;
/// How much more than announced may come: files grow while they are fetched. In bytes, beside a quarter of what was announced.
const GROWTH: u64 = 16 << 20;
/// How much is copied at once, in bytes.
const PIECE: usize = 256 << 10;

/// A file of the guest as it was fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    /// Where it is now.
    pub(super) file: PathBuf,
    /// In bytes.
    pub(super) size: u64,
    /// Of its content.
    pub(super) sha256: [u8; 32],
    /// Permission bits in the guest.
    pub(super) mode: u32,
}

/// All files that were fetched, by their paths in the guest.
#[derive(Debug)]
pub(super) struct Fetched {
    directory: PathBuf,
    files: BTreeMap<Vec<u8>, Content>,
    /// What was asked for and did not come: it went, or became something else, while the guest was looked at.
    vanished: BTreeSet<Vec<u8>>,
    count: u64,
}

impl Fetched {
    /// Files will be in `directory`, which exists.
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, files: BTreeMap::new(), vanished: BTreeSet::new(), count: 0 }
    }

    pub(super) fn get(&self, path: &[u8]) -> Option<&Content> {
        self.files.get(path)
    }

    pub(super) fn vanished(&self) -> &BTreeSet<Vec<u8>> {
        &self.vanished
    }

    /// Whether nothing more can be learnt about a path.
    pub(super) fn is_settled(&self, path: &[u8]) -> bool {
        self.files.contains_key(path) || self.vanished.contains(path)
    }

    /// The content of a file that was fetched, if it has no more than `limit` bytes.
    pub(super) fn read(&self, path: &[u8], limit: u64) -> Option<Vec<u8>> {
        let content = self.files.get(path).filter(|content| content.size <= limit)?;
        fs::read(&content.file).ok()
    }

    /// Takes an archive with files of `wanted`, which has the sizes that the guest gave, and nothing else.
    ///
    /// # Errors
    /// Nothing of the archive is kept where it is none, ends early, holds what is not wanted, or far more bytes than announced.
    pub(super) fn take(
        &mut self,
        archive: impl Read,
        wanted: &BTreeMap<Vec<u8>, u64>,
        cancel: &Cancel,
    ) -> Result<(), ExportError> {
        let announced: u64 = wanted.values().fold(0, |sum, size| sum.saturating_add(*size));
        let state = Rc::<State>::default();
        let guarded = Guarded { archive: BufReader::with_capacity(PIECE, archive), state: Rc::clone(&state) };
        let mut archive = tar::Archive::new(guarded);
        let malformed = |source| ExportError::Archive { source };
        let mut taken = BTreeMap::new();
        let mut room = announced.saturating_add(announced / 4).saturating_add(GROWTH);
        let mut entries = archive.entries().map_err(malformed)?;
        loop {
            cancel.check()?;
            state.headers.set(Some(HEADERS));
            let Some(entry) = entries.next() else { break };
            state.headers.set(None);
            let mut entry = entry.map_err(malformed)?;
            let path = entry.path_bytes().into_owned();
            let kind = entry.header().entry_type();
            if kind.is_pax_global_extensions() {
                continue;
            }
            if !wanted.contains_key(&path) || taken.contains_key(&path) {
                return Err(ExportError::Unasked { path: shown(&path) });
            }
            // It has become something else since the guest was looked at.
            if !matches!(kind, EntryType::Regular | EntryType::Continuous) {
                continue;
            }
            let mode = entry.header().mode().map_err(malformed)? & 0o777;
            let content = self.keep(&mut entry, mode, &mut room, cancel)?;
            taken.insert(path, content);
        }
        if state.ended.get() {
            let source = io::Error::new(ErrorKind::UnexpectedEof, "it ends without its end mark");
            return Err(ExportError::Archive { source });
        }
        self.vanished.extend(wanted.keys().filter(|path| !taken.contains_key(*path)).cloned());
        self.files.append(&mut taken);
        Ok(())
    }

    fn keep(
        &mut self,
        from: &mut impl Read,
        mode: u32,
        room: &mut u64,
        cancel: &Cancel,
    ) -> Result<Content, ExportError> {
        let file = self.directory.join(self.count.to_string());
        self.count += 1;
        let scratch = |source| ExportError::Scratch { action: "write", path: file.clone(), source };
        let mut to = File::create_new(&file).map_err(scratch)?;
        let mut hash = Sha256::new();
        let mut size = 0;
        let mut piece = vec![0; PIECE];
        loop {
            cancel.check()?;
            let length = match from.read(&mut piece) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(source) => return Err(ExportError::Archive { source }),
            };
            let data = piece.get(..length).unwrap_or_default();
            *room = room.checked_sub(length as u64).ok_or(ExportError::TooMuch)?;
            size += length as u64;
            hash.update(data);
            to.write_all(data).map_err(scratch)?;
        }
        Ok(Content { file, size, sha256: hash.finalize().into(), mode })
    }
}

/// What the reader below the archive knows.
#[derive(Default)]
struct State {
    /// What headers may still have; no matter while content is read.
    headers: Cell<Option<u64>>,
    /// The input's end was met.
    ended: Cell<bool>,
}

/// Keeps headers from filling the memory, and sees an end that comes too soon.
struct Guarded<R> {
    archive: BufReader<R>,
    state: Rc<State>,
}

impl<R: Read> Read for Guarded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.archive.read(buffer)?;
        if let Some(left) = self.state.headers.get() {
            let left = left.checked_sub(length as u64).ok_or_else(|| {
                io::Error::new(ErrorKind::InvalidData, "a name is longer than any real one")
            })?;
            self.state.headers.set(Some(left));
        }
        if length == 0 && !buffer.is_empty() {
            self.state.ended.set(true);
        }
        Ok(length)
    }
}

/// Makes a directory for scratch files.
pub(super) fn directory(path: &Path) -> Result<(), ExportError> {
    fs::create_dir(path).map_err(|source| ExportError::Scratch { action: "make", path: path.to_owned(), source })
}
