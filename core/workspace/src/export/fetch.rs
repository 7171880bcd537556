//! What came from the guest, kept in scratch files that are named by numbers: no name that the guest chose becomes a path here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, BufReader, ErrorKind, Read, Seek, Write},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use sha2::{Digest, Sha256};
use vm_archive::{pax::EntryType, read::Members};

use crate::{Cancel, export::ExportError, text::shown};

/// How much more than announced may come: files grow while they are fetched. In bytes, beside a quarter of what was announced.
const GROWTH: u64 = 16 << 20;
/// How much is copied at once, in bytes.
const PIECE: usize = 256 << 10;
/// How much may be written between two looks at the room on the disk, in bytes.
const LOOK: u64 = 16 << 20;

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
    /// What was written since the disk was last looked at, in bytes.
    unlooked: u64,
}

impl Fetched {
    /// Files will be in `directory`, which exists.
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, files: BTreeMap::new(), vanished: BTreeSet::new(), count: 0, unlooked: LOOK }
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
    /// Nothing of the archive is kept where it is none, ends early, holds what is not wanted, or far more bytes than announced;
    /// or where the disk has no room for it. What sizes are announced says nothing of that: files may have holes.
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
        while let Some(member) = archive.next_member().map_err(|source| ExportError::Archive { source })? {
            cancel.check()?;
            if !wanted.contains_key(&member.name) || taken.contains_key(&member.name) {
                return Err(ExportError::Unasked { path: shown(&member.name) });
            }
            // Anything else it has become since the guest was looked at. Sparse ones are not asked for.
            if matches!(member.kind, EntryType::Regular | EntryType::Continuous) && member.parts.is_none() {
                let content = self.keep(&mut archive, member.mode & 0o777, &mut room, cancel)?;
                taken.insert(member.name, content);
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
                self.unlooked += length as u64;
                if self.unlooked >= LOOK {
                    let room = vm_host::files::room_of(&to, LOOK);
                    room.map_err(|source| ExportError::Room { path: self.directory.clone(), source })?;
                    self.unlooked = 0;
                }
                to.write_all(data).map_err(scratch)?;
            }
        }
        to.set_len(size).map_err(scratch)?;
        Ok(Content { file, size, sha256: hash.finalize().into(), mode })
    }
}

/// Copies what a file has, to one that is empty; its holes stay holes.
pub(super) fn copy_data(from: &mut File, to: &mut File) -> io::Result<()> {
    let size = from.metadata()?.len();
    let mut at = 0;
    while at < size {
        let begin = match seek(&*from, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            // A hole reaches the end.
            Err(Errno::NXIO) => break,
            // A filesystem that does not tell.
            Err(_) => at,
        };
        at = seek(&*from, SeekFrom::Hole(begin)).unwrap_or(size);
        for file in [&*from, &*to] {
            seek(file, SeekFrom::Start(begin))?;
        }
        io::copy(&mut Read::take(&*from, at - begin), to)?;
    }
    to.set_len(size)
}

/// Makes a directory for scratch files.
pub(super) fn directory(path: &Path) -> Result<(), ExportError> {
    fs::create_dir(path).map_err(|source| ExportError::Scratch {
        action: "make",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };

    use super::*;

    fn archive(content: &[u8]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, "a", content).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn what_counts_is_the_room_that_data_takes() {
        let wanted = BTreeMap::from([(b"a".to_vec(), 1 << 50)]);
        let take = |directory: &Path, content: &[u8]| {
            let mut fetched = Fetched::new(directory.to_owned());
            fetched.take(archive(content).as_slice(), &wanted, &Cancel::default())
        };
        let scratch = tempfile::tempdir().unwrap();
        // A petabyte is announced, and has become short since.
        take(scratch.path(), b"content").unwrap();
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        // On a thread whose mounts nobody else sees.
        let small = tempfile::tempdir().unwrap();
        let work = || {
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let options = Some("size=16m");
            mount(Some("none"), small.path(), Some("tmpfs"), MsFlags::empty(), options).unwrap();
            take(small.path(), &vec![0; 32 << 20]).unwrap();
            fs::create_dir(small.path().join("more")).unwrap();
            let error = take(&small.path().join("more"), &[1]).unwrap_err();
            assert!(matches!(error, ExportError::Room { .. }), "{error}");
        };
        std::thread::scope(|scope| scope.spawn(work).join().unwrap());
    }

    #[test]
    fn holes_stay_holes() {
        let directory = tempfile::tempdir().unwrap();
        let mut from = File::create_new(directory.path().join("from")).unwrap();
        from.set_len(1 << 30).unwrap();
        for offset in [0, 512 << 20] {
            from.write_all_at(b"data", offset).unwrap();
        }
        drop(from);
        from = File::open(directory.path().join("from")).unwrap();
        let mut to = File::create_new(directory.path().join("to")).unwrap();
        copy_data(&mut from, &mut to).unwrap();
        drop(to);
        let to = File::open(directory.path().join("to")).unwrap();
        assert_eq!(to.metadata().unwrap().len(), 1 << 30);
        assert!(to.metadata().unwrap().blocks() < 1 << 11, "{:?}", to.metadata());
        for (offset, wanted) in
            [(0, b"data"), (4096, &[0; 4]), (512 << 20, b"data"), ((1 << 30) - 4, &[0; 4])]
        {
            let mut found = [1; 4];
            to.read_exact_at(&mut found, offset).unwrap();
            assert_eq!(found, *wanted, "{offset}");
        }
    }
}
