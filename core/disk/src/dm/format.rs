//! The file of differences: how large it has to be, and its first sector.
//!
//! What device-mapper's persistent snapshots look like (Documentation/admin-guide/device-mapper/snapshot.rst, dm-snap-persistent.c):
//! a chunk with the header, then again and again one chunk of metadata, which has 16 bytes for each of the chunks of data behind it.

use std::{fs::File, io, os::unix::fs::FileExt};

pub(crate) const SECTOR: u64 = 512;

/// What is copied and noted at once in new disks.
///
/// Each first write to a chunk costs a copy of the rest of it, its entry in the metadata and a flush of the delta. Small ones
/// waste memory and metadata (32 bytes of kernel memory for each, all of it read when a VM starts), large ones copy much for
/// little.
pub(crate) const CHUNK_BYTES: u64 = 16 << 10;

const MAGIC: u32 = 0x7041_6e53;
const ENTRY_BYTES: u64 = 16;

/// The header, where a snapshot has been made of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// False once the kernel could not write a difference down.
    pub(crate) valid: bool,
    pub(crate) chunk_bytes: u64,
}

/// `None` for a file in which there is nothing yet.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] for one that is something else.
pub(crate) fn read(delta: &File) -> io::Result<Option<Header>> {
    let mut sector = [0; 16];
    delta.read_exact_at(&mut sector, 0)?;
    let word = |n: usize| u32::from_le_bytes([sector[n], sector[n + 1], sector[n + 2], sector[n + 3]]);
    match word(0) {
        0 => Ok(None),
        MAGIC => {
            let chunk_bytes = u64::from(word(12)) * SECTOR;
            if !chunk_bytes.is_power_of_two() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "its chunk size is damaged"));
            }
            Ok(Some(Header { valid: word(4) == 1, chunk_bytes }))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it holds no differences of a disk")),
    }
}

/// Takes back that a difference could not be written down. What was noted before is whole: the kernel writes data before it
/// notes where it is, so what is there is what a loss of power would have left.
pub(crate) fn make_valid(delta: &File) -> io::Result<()> {
    delta.write_all_at(&1_u32.to_le_bytes(), 4)?;
    delta.sync_data()
}

/// How long a delta has to be so that every chunk of the disk can differ.
pub(crate) fn delta_bytes(disk_bytes: u64, chunk_bytes: u64) -> u64 {
    let data = disk_bytes.div_ceil(chunk_bytes);
    // One more than is filled: the kernel wipes the next metadata chunk when one is full.
    let metadata = data.div_ceil(chunk_bytes / ENTRY_BYTES) + 1;
    ((1 + metadata + data) * chunk_bytes).next_multiple_of(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_finds_a_place_in_the_delta() {
        for chunk in [4 << 10, 16 << 10, 64 << 10_u64] {
            for disk in [SECTOR, 1 << 20, 10 << 30, (10 << 30) + SECTOR, 16 << 40] {
                // As dm-snap-persistent.c counts: chunk 0 is the header, then strides of one of metadata and `entries` of data.
                let (entries, chunks) = (chunk / ENTRY_BYTES, disk.div_ceil(chunk));
                let last_data = 1 + (chunks - 1) / entries * (entries + 1) + 1 + (chunks - 1) % entries;
                let wiped = 1 + chunks / entries * (entries + 1);
                let holds = delta_bytes(disk, chunk) / chunk;
                assert!(holds > last_data.max(wiped), "{disk} in chunks of {chunk}");
                assert!(holds <= chunks + chunks / entries + 4 + (1 << 20) / chunk, "wasteful for {disk}");
            }
        }
    }

    #[test]
    fn what_is_no_delta_is_not_taken_for_one() {
        let file = tempfile::tempfile().unwrap();
        assert!(read(&file).is_err(), "empty");
        file.set_len(4096).unwrap();
        assert_eq!(read(&file).unwrap(), None);
        file.write_all_at(b"ext4 or so", 0).unwrap();
        assert_eq!(read(&file).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let mut header = Vec::new();
        for word in [MAGIC, 0, 1, 32] {
            header.extend(word.to_le_bytes());
        }
        file.write_all_at(&header, 0).unwrap();
        assert_eq!(read(&file).unwrap(), Some(Header { valid: false, chunk_bytes: 16 << 10 }));
        make_valid(&file).unwrap();
        assert_eq!(read(&file).unwrap(), Some(Header { valid: true, chunk_bytes: 16 << 10 }));
    }
}
