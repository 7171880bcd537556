//! A tar archive that is being written to something.

use std::io::{self, Write};

use vm_archive::pax::{BLOCK, Entry, padding};

/// Written at once, in bytes.
const PIECE: usize = 1 << 20;

/// The archive. One that is given up writes nothing more: whoever reads it must not take it for whole.
pub(crate) struct Archive<W> {
    to: W,
    piece: Vec<u8>,
    /// Bytes so far.
    written: u64,
    /// Headers of the current entry.
    headers: Vec<u8>,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(to: W) -> Self {
        Self { to, piece: Vec::with_capacity(PIECE), written: 0, headers: Vec::new() }
    }

    /// Writes an entry's headers; a file's content must follow.
    pub(crate) fn entry(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        let mut headers = std::mem::take(&mut self.headers);
        headers.clear();
        entry.encode(&mut headers);
        let written = self.content(&headers);
        self.headers = headers;
        written
    }

    /// Writes a part of a file's content.
    pub(crate) fn content(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        if self.piece.len() + bytes.len() > PIECE {
            self.to.write_all(&self.piece)?;
            self.piece.clear();
        }
        if bytes.len() >= PIECE { self.to.write_all(bytes) } else { self.piece.write_all(bytes) }
    }

    /// Writes so many zeros.
    pub(crate) fn zeros(&mut self, mut length: u64) -> io::Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while length > 0 {
            let part = length.min(ZEROS.len() as u64);
            // It is no more than the array has.
            self.content(&ZEROS[..part as usize])?;
            length -= part;
        }
        Ok(())
    }

    /// Fills up the last block, after a file's content.
    pub(crate) fn fill(&mut self) -> io::Result<()> {
        self.zeros(padding(self.written))
    }

    /// Writes the end mark.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.zeros(2 * BLOCK)?;
        self.to.write_all(&self.piece)?;
        self.to.flush()
    }
}
