//! What came from the guest, kept in scratch files that are named by numbers: no name that the guest chose becomes a path here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufReader, ErrorKind, Read, Seek, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use tar::EntryType;

use crate::{Cancel, export::ExportError, text::shown};

use super::member::Members;

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
        let mut archive = Members::new(BufReader::with_capacity(PIECE, archive));
        let mut taken = BTreeMap::new();
        let mut room = announced.saturating_add(announced / 4).saturating_add(GROWTH);
        while let Some(member) = archive.next().map_err(|source| ExportError::Archive { source })? {
            cancel.check()?;
            if !wanted.contains_key(&member.path) || taken.contains_key(&member.path) {
                return Err(ExportError::Unasked { path: shown(&member.path) });
            }
            // Anything else it has become since the guest was looked at.
            if matches!(member.kind, EntryType::Regular | EntryType::Continuous) {
                let content = self.keep(&mut archive, member.mode, &mut room, cancel)?;
                taken.insert(member.path, content);
            }
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
            // Sparse files stay so: the guest would have this disk filled with what costs it nothing.
            if data.iter().all(|byte| *byte == 0) {
                to.seek_relative(length as i64).map_err(scratch)?;
            } else {
                to.write_all(data).map_err(scratch)?;
            }
        }
        to.set_len(size).map_err(scratch)?;
        Ok(Content { file, size, sha256: hash.finalize().into(), mode })
    }
}

/// Makes a directory for scratch files.
pub(super) fn directory(path: &Path) -> Result<(), ExportError> {
    fs::create_dir(path).map_err(|source| ExportError::Scratch {
        action: "make",
        path: path.to_owned(),
        source,
    })
}
