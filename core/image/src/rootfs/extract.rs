//! Unpacks an archive into a directory and counts what a filesystem of it will need.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
    sync::atomic::Ordering,
};

use vm_types::ImageDigest;

use super::{
    archive::{Archive, Entry, Kind},
    stream::Stream,
    tree::{Refusal, Tree, attributes, components},
};
use crate::{
    ImageError,
    progress::{Cancel, Reporter},
};

/// Filesystem block, in bytes.
pub(super) const BLOCK: u64 = 4096;
/// What one inode's extended attributes may take on ext4 without the feature `ea_inode`: one block. Bytes.
const XATTRS_MAX: usize = BLOCK as usize - 64;
/// The longest path, in bytes. `mke2fs -d` (1.47.0) writes one byte beyond its buffer where a path has exactly 2040, which
/// an archive must not be able to make it do.
const PATH_MAX: usize = 2000;
const CHUNK: usize = 256 << 10;
const STAGE: &str = "unpacking";

/// What a filesystem has to hold, in blocks and inodes: upper bounds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) inodes: u64,
    /// File contents without holes.
    pub(super) data_blocks: u64,
    /// Extent trees, attribute blocks, long link targets.
    pub(super) other_blocks: u64,
    /// Bytes of directory entries.
    pub(super) name_bytes: u64,
    pub(super) directories: u64,
}

impl Tally {
    /// Blocks for everything but the filesystem's own tables.
    pub(super) fn blocks(&self) -> u64 {
        // A directory block's end stays empty where the next entry (263 bytes at most) does not fit.
        let directory_blocks = self.name_bytes.div_ceil(BLOCK - 263 - 12) + 2 * self.directories;
        self.data_blocks + self.other_blocks + directory_blocks
    }
}

/// An unpacked archive.
pub(super) struct Unpacked {
    pub(super) tally: Tally,
    pub(super) digest: ImageDigest,
    /// The root directory's own entry, if there was one.
    pub(super) root: Option<Entry>,
    /// Times that do not fit in 32 bits of seconds, by path.
    pub(super) precise_times: HashMap<Vec<u8>, (i64, u32)>,
}

/// Unpacks a stream into an empty directory.
pub(super) fn unpack(
    input: Box<dyn io::Read + Send>,
    length: Option<u64>,
    directory: &Path,
    cancel: &Cancel,
    reporter: &Reporter,
) -> Result<Unpacked, ImageError> {
    reporter.report(STAGE, 0, length);
    let stream = Stream::start(input, cancel.clone()).map_err(|source| ImageError::ReadArchive { source })?;
    let consumed = stream.consumed();
    let mut archive = Archive::new(stream);
    let mut tree = Tree::open(directory).map_err(|source| ImageError::File {
        action: "open",
        path: directory.to_owned(),
        source,
    })?;
    let mut unpacking =
        Unpacking { tally: Tally { inodes: 1, directories: 1, ..Tally::default() }, chunk: vec![0; CHUNK] };
    let mut root = None;
    let mut directory_times: HashMap<Vec<u8>, (i64, u32)> = HashMap::new();
    let mut precise_times = HashMap::new();

    while let Some(mut entry) = archive.next_entry()? {
        cancel.check()?;
        reporter.report(STAGE, consumed.load(Ordering::Relaxed), length);
        entry.mtime = representable(entry.mtime);
        check_limits(&entry)?;
        let file = tree.make(&entry).map_err(|refusal| refused(&entry.path, refusal))?;
        unpacking.count(&entry);
        if let Some(file) = file {
            unpacking.write(&mut archive, &file, &entry, || {
                reporter.report(STAGE, consumed.load(Ordering::Relaxed), length);
                cancel.check()
            })?;
            attributes(file.as_fd(), &entry).map_err(|refusal| refused(&entry.path, refusal))?;
        }
        // Its form was checked when it was made.
        let path = components(&entry.path).unwrap_or_default().join(&b'/');
        if matches!(entry.kind, Kind::Hardlink(_)) {
            continue;
        }
        let precise = entry.mtime.1 != 0 || i32::try_from(entry.mtime.0).is_err();
        if precise && !path.is_empty() {
            precise_times.insert(path.clone(), entry.mtime);
        } else {
            precise_times.remove(&path);
        }
        if entry.kind == Kind::Directory {
            directory_times.insert(path.clone(), entry.mtime);
            if path.is_empty() {
                root = Some(entry);
            }
        } else {
            directory_times.remove(&path);
        }
    }
    archive.drain()?;
    for path in tree.implied() {
        unpacking.tally.inodes += 1;
        unpacking.tally.directories += 1;
        unpacking.tally.name_bytes += 264;
        directory_times.entry(path).or_insert((0, 0));
    }
    // Deep ones first or last makes no difference: setting a time changes nothing in the directory above.
    for (path, mtime) in &directory_times {
        cancel.check()?;
        match tree.set_directory_time(path, *mtime) {
            // An implied directory that a later entry replaced.
            Err(Refusal::Archive(_)) => {}
            other => other.map_err(|refusal| refused(path, refusal))?,
        }
    }
    let digest = archive.into_inner().digest().map_err(|source| ImageError::ReadArchive { source })?;
    reporter.report(STAGE, consumed.load(Ordering::Relaxed), length);
    Ok(Unpacked { tally: unpacking.tally, digest, root, precise_times })
}

struct Unpacking {
    tally: Tally,
    chunk: Vec<u8>,
}

impl Unpacking {
    /// Everything but file contents.
    fn count(&mut self, entry: &Entry) {
        let name = entry.path.rsplit(|&b| b == b'/').find(|part| !part.is_empty()).map_or(0, <[u8]>::len);
        // ext4_dir_entry_2: 8 bytes and the name, filled up to 4 bytes.
        self.tally.name_bytes += (8 + name as u64).next_multiple_of(4);
        if !matches!(entry.kind, Kind::Hardlink(_)) {
            self.tally.inodes += 1;
        }
        match &entry.kind {
            Kind::Directory => self.tally.directories += 1,
            Kind::Symlink(target) if target.len() >= 60 => self.tally.other_blocks += 1,
            _ => {}
        }
        if !entry.xattrs.is_empty() {
            self.tally.other_blocks += 1;
        }
    }

    /// Writes a file's content. Blocks of zeros become holes, whether the archive says so or not.
    fn write(
        &mut self,
        archive: &mut Archive<Stream>,
        file: &File,
        entry: &Entry,
        mut tick: impl FnMut() -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let failed = |source| ImageError::Entry {
            action: "write",
            path: String::from_utf8_lossy(&entry.path).into_owned(),
            source,
        };
        let (mut blocks, mut runs, mut next_block) = (0, 0, 0);
        for &(offset, length) in &entry.segments {
            let mut at = offset;
            while at < offset + length {
                tick()?;
                // Chunks end on block boundaries of the file, so that holes do too.
                let most = (CHUNK as u64 - at % BLOCK).min(offset + length - at) as usize;
                let count = archive.read_content(&mut self.chunk[..most])?;
                let bytes = &self.chunk[..count];
                let mut start = 0;
                while start < count {
                    let position = at + start as u64;
                    let end = count.min(start + (BLOCK - position % BLOCK) as usize);
                    if bytes[start..end].iter().all(|&b| b == 0) {
                        start = end;
                        continue;
                    }
                    let mut stop = end;
                    while stop < count {
                        let next = count.min(stop + BLOCK as usize);
                        if bytes[stop..next].iter().all(|&b| b == 0) {
                            break;
                        }
                        stop = next;
                    }
                    file.write_all_at(&bytes[start..stop], position).map_err(failed)?;
                    let (first, last) = (position / BLOCK, (at + stop as u64 - 1) / BLOCK);
                    if first > next_block || runs == 0 {
                        runs += 1;
                    }
                    blocks += last + 1 - first.max(next_block);
                    next_block = last + 1;
                    start = stop;
                }
                at += count as u64;
            }
        }
        file.set_len(entry.size).map_err(failed)?;
        self.tally.data_blocks += blocks;
        // An extent covers 32768 blocks at most; four fit into the inode, 340 into a block of the tree.
        let extents = runs + blocks / 8192;
        if extents > 3 {
            self.tally.other_blocks += 2 + extents / 160;
        }
        Ok(())
    }
}

/// ext4 counts 34 bits of seconds from 1901 on.
fn representable((seconds, nanos): (i64, u32)) -> (i64, u32) {
    let range = i64::from(i32::MIN)..(1 << 34) + i64::from(i32::MIN);
    if range.contains(&seconds) { (seconds, nanos) } else { (seconds.clamp(range.start, range.end - 1), 0) }
}

/// Refuses what ext4 could not hold before the host's filesystem, which may hold more, takes it.
fn check_limits(entry: &Entry) -> Result<(), ImageError> {
    let length = entry.path.len();
    if length > PATH_MAX {
        let start = String::from_utf8_lossy(&entry.path[..64]).into_owned();
        return Err(ImageError::RefusedEntry {
            path: format!("{start}…"),
            reason: format!("is {length} bytes long; a path in an image has {PATH_MAX} at most"),
        });
    }
    let bytes: usize = entry.xattrs.iter().map(|(name, value)| 16 + name.len() + 4 + value.len() + 4).sum();
    if bytes > XATTRS_MAX {
        return Err(ImageError::RefusedEntry {
            path: String::from_utf8_lossy(&entry.path).into_owned(),
            reason: format!("has {bytes} bytes of extended attributes; ext4 holds {XATTRS_MAX} at most"),
        });
    }
    Ok(())
}

fn refused(path: &[u8], refusal: Refusal) -> ImageError {
    let path = String::from_utf8_lossy(path).into_owned();
    match refusal {
        Refusal::Archive(reason) => ImageError::RefusedEntry { path, reason },
        Refusal::Host(action, source) => ImageError::Entry { action, path, source },
    }
}
