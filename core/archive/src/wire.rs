//! An archive on its way out, in pieces for the wire.

use std::{fs::File, io};

use bytes::{Bytes, BytesMut};

use crate::{
    CHUNK, Failure, Output,
    pax::{BLOCK, Entry, padding},
};

/// The archive, as it goes out.
pub(crate) struct Archive<'a> {
    output: &'a Output,
    piece: BytesMut,
    filled: usize,
    /// Bytes so far.
    written: u64,
    /// Headers of the current entry.
    headers: Vec<u8>,
}

/// Why a file's content did not get into the archive.
pub(crate) enum CopyError {
    Read(io::Error),
    Gone(Failure),
}

impl<'a> Archive<'a> {
    pub(crate) fn new(output: &'a Output) -> Self {
        Self { output, piece: BytesMut::zeroed(CHUNK), filled: 0, written: 0, headers: Vec::new() }
    }

    /// Writes the records and the header of an entry, whose content must follow.
    pub(crate) fn entry(&mut self, entry: &Entry<'_>) -> Result<(), Failure> {
        let mut headers = std::mem::take(&mut self.headers);
        headers.clear();
        entry.encode(&mut headers);
        let written = self.write(&headers);
        self.headers = headers;
        written
    }

    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), Failure> {
        while !bytes.is_empty() {
            let length = bytes.len().min(CHUNK - self.filled);
            self.piece[self.filled..self.filled + length].copy_from_slice(&bytes[..length]);
            self.advance(length)?;
            bytes = &bytes[length..];
        }
        Ok(())
    }

    /// Takes `length` bytes of a file, or what it has; how many it had.
    pub(crate) fn copy(&mut self, file: &mut File, length: u64) -> Result<u64, CopyError> {
        use io::Read;
        let mut left = length;
        while left > 0 {
            let room = (CHUNK - self.filled).min(usize::try_from(left).unwrap_or(CHUNK));
            match file.read(&mut self.piece[self.filled..self.filled + room]) {
                Ok(0) => break,
                Ok(read) => {
                    self.advance(read).map_err(CopyError::Gone)?;
                    left -= read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CopyError::Read(error)),
            }
        }
        Ok(length - left)
    }

    /// Writes so many zeros.
    pub(crate) fn zeros(&mut self, mut length: u64) -> Result<(), Failure> {
        while length > 0 {
            let room = (CHUNK - self.filled).min(usize::try_from(length).unwrap_or(CHUNK));
            self.piece[self.filled..self.filled + room].fill(0);
            self.advance(room)?;
            length -= room as u64;
        }
        Ok(())
    }

    /// Fills up the last block.
    pub(crate) fn fill(&mut self) -> Result<(), Failure> {
        self.zeros(padding(self.written))
    }

    /// Writes the end mark.
    pub(crate) fn finish(mut self) -> Result<(), Failure> {
        self.zeros(2 * BLOCK)?;
        self.send()
    }

    fn advance(&mut self, length: usize) -> Result<(), Failure> {
        self.filled += length;
        self.written += length as u64;
        if self.filled == CHUNK { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> Result<(), Failure> {
        let mut piece = std::mem::replace(&mut self.piece, BytesMut::zeroed(CHUNK));
        piece.truncate(std::mem::take(&mut self.filled));
        if piece.is_empty() { Ok(()) } else { self.output.send(Bytes::from(piece)) }
    }
}
