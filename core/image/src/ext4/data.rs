//! Writes blocks one behind the other into a growing image, in large pieces; blocks of zeros are left out.

use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::{fs::FallocateFlags, io::Errno};

use super::{
    extents::{Extent, Extents},
    geometry::{BLOCK, Cursor, IMAGE_MAX},
};

const SIZE: usize = BLOCK as usize;
/// Blocks that are written at once.
const PIECE: u32 = (1 << 20) / BLOCK as u32;
/// How often the host's disk is looked at, in bytes.
const HOST_INTERVAL: u64 = 64 << 20;

static ZEROS: [u8; SIZE] = [0; SIZE];

/// The growing image.
pub(crate) struct DataWriter {
    file: File,
    buffer: Vec<u8>,
    /// Where the buffer belongs.
    at: Cursor,
    start: u32,
    /// Blocks in the buffer, and how many can be until it must be written.
    filled: u32,
    room: u32,
    unchecked: u64,
}

impl DataWriter {
    /// Writes into an empty file.
    pub(crate) fn new(file: File) -> Self {
        let mut writer = Self {
            file,
            buffer: vec![0; PIECE as usize * SIZE],
            at: Cursor::start(),
            start: 0,
            filled: 0,
            room: 0,
            unchecked: HOST_INTERVAL,
        };
        writer.move_to(Cursor::start());
        writer
    }

    /// Stores a file's content: offsets and lengths of what is no hole, in order, which `read` delivers. A last block is
    /// filled up with zeros.
    pub(crate) fn store<E: From<io::Error>>(
        &mut self,
        segments: &[(u64, u64)],
        mut read: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<Extents, E> {
        let mut extents = Extents::default();
        // The file's block that is being put together at the buffer's end.
        let mut open: Option<u64> = None;
        for &(offset, length) in segments {
            let (mut at, end) = (offset, offset + length);
            while at < end {
                let (block, within) = (at / BLOCK, (at % BLOCK) as usize);
                if open != Some(block) {
                    if let Some(former) = open.take() {
                        self.keep(former, 1, &mut extents);
                    }
                    let free = self.free()?;
                    if within == 0 && end - at >= BLOCK {
                        let whole = ((end - at) / BLOCK).min((free.len() / SIZE) as u64);
                        read(&mut free[..whole as usize * SIZE])?;
                        self.keep(block, whole as u32, &mut extents);
                        at += whole * BLOCK;
                        continue;
                    }
                    free[..SIZE].fill(0);
                    open = Some(block);
                }
                let count = (SIZE - within).min((end - at) as usize);
                let free = self.free()?;
                read(&mut free[within..within + count])?;
                at += count as u64;
            }
        }
        if let Some(last) = open {
            self.keep(last, 1, &mut extents);
        }
        Ok(extents)
    }

    /// Takes what was read to the buffer's end into the file, but for blocks of zeros.
    fn keep(&mut self, first: u64, count: u32, extents: &mut Extents) {
        let from = self.filled;
        for i in 0..count {
            let place = (from + i) as usize * SIZE;
            if self.buffer[place..place + SIZE] == ZEROS {
                continue;
            }
            let to = self.filled as usize * SIZE;
            if to != place {
                self.buffer.copy_within(place..place + SIZE, to);
            }
            // A file's size is bounded by FILE_MAX, so block numbers have 28 bits.
            extents.push(first as u32 + i, self.start + self.filled, 1);
            self.filled += 1;
        }
    }

    /// The free part of the buffer: at least one block.
    fn free(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == self.room {
            self.flush()?;
        }
        Ok(&mut self.buffer[self.filled as usize * SIZE..self.room as usize * SIZE])
    }

    /// The number that the next block will have.
    pub(super) fn next(&mut self) -> io::Result<u32> {
        self.free()?;
        Ok(self.start + self.filled)
    }

    /// Writes one block.
    pub(super) fn put(&mut self, block: &[u8]) -> io::Result<u32> {
        self.free()?[..SIZE].copy_from_slice(block);
        self.filled += 1;
        Ok(self.start + self.filled - 1)
    }

    /// Hands what is in the buffer to the kernel.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let bytes = self.filled as usize * SIZE;
        if self.unchecked >= HOST_INTERVAL {
            self.unchecked = 0;
            self.ensure_room(0)?;
        }
        self.file.write_all_at(&self.buffer[..bytes], u64::from(self.start) * BLOCK)?;
        self.unchecked += bytes as u64;
        let mut at = self.at;
        at.advance(self.filled);
        if u64::from(at.end()) * BLOCK > IMAGE_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.move_to(at);
        Ok(())
    }

    /// Fails unless the host's disk has room for so many bytes beside what is left free.
    pub(super) fn ensure_room(&self, bytes: u64) -> io::Result<()> {
        vm_host::files::room_of(&self.file, bytes)
    }

    /// Goes on elsewhere; the buffer must be empty.
    fn move_to(&mut self, mut at: Cursor) {
        let (start, room) = at.run();
        (self.at, self.start, self.filled, self.room) = (at, start, 0, room.min(PIECE));
    }

    /// Writes the rest, and goes on elsewhere. Answers where the next block would have gone.
    pub(super) fn turn_to(&mut self, at: Option<Cursor>) -> io::Result<Cursor> {
        self.flush()?;
        let end = self.at;
        if let Some(at) = at {
            self.move_to(at);
        }
        Ok(end)
    }

    /// Gives the room of what is gone back to the host. What is free reads as zeros.
    pub(crate) fn discard(&mut self, dead: &[Extent]) -> io::Result<()> {
        if dead.is_empty() {
            return Ok(());
        }
        self.flush()?;
        for extent in dead {
            let (from, length) = (u64::from(extent.start) * BLOCK, u64::from(extent.length) * BLOCK);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&self.file, flags, from, length) {
                // A filesystem without holes.
                Err(Errno::OPNOTSUPP) => {
                    for i in 0..u64::from(extent.length) {
                        self.file.write_all_at(&ZEROS, from + i * BLOCK)?;
                    }
                }
                other => other?,
            }
        }
        Ok(())
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn into_file(self) -> File {
        self.file
    }
}
