//! Writes a tar archive in the PAX format, in pieces for the wire.
//!
//! POSIX.1-2008, pax, "ustar Interchange Format" and "pax Extended Header". What a ustar header has no room for becomes a
//! record before it. The crate `tar` writes the header's fields; its builder refuses names that files may well have, and
//! has no records of binary attributes.

use std::{ffi::CStr, fs::File, io::Read};

use bytes::{Bytes, BytesMut};
use rustix::fs::Statx;
use tar::{EntryType, Header};

use crate::{CHUNK, Failure, Output};

/// What a header's and an archive's parts are filled up to.
pub(crate) const BLOCK: u64 = 512;
/// The largest size, and the latest time, of a header's field of eleven octal digits.
const OCTAL_11: u64 = 0o777_7777_7777;
/// The largest number of a field of seven octal digits.
const OCTAL_7: u32 = 0o777_7777;
/// The most that a name may have in a header, in bytes.
const NAME: usize = 100;

/// Names and values of extended attributes.
pub(crate) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What a header says.
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) kind: EntryType,
    pub(crate) about: &'a Statx,
    /// Where a link leads.
    pub(crate) link: &'a [u8],
    /// What is stored, in bytes.
    pub(crate) size: u64,
    pub(crate) xattrs: &'a [(Vec<u8>, Vec<u8>)],
    /// The full size of a file of which only parts are stored.
    pub(crate) sparse: Option<u64>,
}

/// The archive, as it goes out.
pub(crate) struct Archive<'a> {
    output: &'a Output,
    piece: BytesMut,
    filled: usize,
    /// Bytes so far.
    written: u64,
}

impl<'a> Archive<'a> {
    pub(crate) fn new(output: &'a Output) -> Self {
        Self { output, piece: BytesMut::zeroed(CHUNK), filled: 0, written: 0 }
    }

    /// Writes the records and the header of an entry, whose content must follow.
    pub(crate) fn entry(&mut self, entry: &Entry<'_>) -> Result<(), Failure> {
        let records = entry.records();
        if !records.is_empty() {
            let mut header = Header::new_ustar();
            header.set_entry_type(EntryType::XHeader);
            header.set_mode(0o644);
            header.set_size(records.len() as u64);
            put(&mut header.as_mut_bytes()[..NAME], b"PaxHeaders/entry");
            self.header(header)?;
            self.write(&records)?;
            self.fill()?;
        }
        self.header(entry.header())
    }

    fn header(&mut self, mut header: Header) -> Result<(), Failure> {
        header.set_cksum();
        self.write(header.as_bytes())
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
        let mut left = length;
        while left > 0 {
            let room = (CHUNK - self.filled).min(usize::try_from(left).unwrap_or(CHUNK));
            match file.read(&mut self.piece[self.filled..self.filled + room]) {
                Ok(0) => break,
                Ok(read) => {
                    self.advance(read).map_err(CopyError::Gone)?;
                    left -= read as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
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
        self.zeros(self.written.next_multiple_of(BLOCK) - self.written)
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

/// Why a file's content did not get into the archive.
pub(crate) enum CopyError {
    Read(std::io::Error),
    Gone(Failure),
}

impl Entry<'_> {
    fn header(&self) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(self.kind);
        let name = if self.sparse.is_some() { b"GNUSparseFile.0/file" } else { self.name };
        put(&mut header.as_mut_bytes()[..NAME], name);
        put(&mut header.as_mut_bytes()[157..157 + NAME], self.link);
        header.set_mode(u32::from(self.about.stx_mode) & 0o7777);
        // What has a record of its own is read from that.
        header.set_uid(u64::from(self.about.stx_uid.min(OCTAL_7)));
        header.set_gid(u64::from(self.about.stx_gid.min(OCTAL_7)));
        header.set_size(if self.size > OCTAL_11 { 0 } else { self.size });
        header.set_mtime(u64::try_from(self.about.stx_mtime.tv_sec).unwrap_or(0).min(OCTAL_11));
        if matches!(self.kind, EntryType::Char | EntryType::Block) {
            let numbers = [self.about.stx_rdev_major, self.about.stx_rdev_minor];
            for (number, at) in numbers.into_iter().zip([329, 337]) {
                // Linux has at most twelve bits of the one and twenty of the other.
                put(&mut header.as_mut_bytes()[at..at + 7], format!("{number:07o}").as_bytes());
            }
        }
        header
    }

    /// What the header has no room for.
    fn records(&self) -> Vec<u8> {
        let mut records = Vec::new();
        let number = |records: &mut Vec<u8>, key: &str, number: u64| {
            record(records, key.as_bytes(), number.to_string().as_bytes());
        };
        if let Some(size) = self.sparse {
            number(&mut records, "GNU.sparse.major", 1);
            number(&mut records, "GNU.sparse.minor", 0);
            record(&mut records, b"GNU.sparse.name", self.name);
            number(&mut records, "GNU.sparse.realsize", size);
        } else if self.name.len() > NAME {
            record(&mut records, b"path", self.name);
        }
        if self.link.len() > NAME {
            record(&mut records, b"linkpath", self.link);
        }
        if self.size > OCTAL_11 {
            number(&mut records, "size", self.size);
        }
        for (key, id) in [("uid", self.about.stx_uid), ("gid", self.about.stx_gid)] {
            if id > OCTAL_7 {
                number(&mut records, key, id.into());
            }
        }
        let (seconds, nanos) = (self.about.stx_mtime.tv_sec, self.about.stx_mtime.tv_nsec);
        if nanos != 0 || !u64::try_from(seconds).is_ok_and(|seconds| seconds <= OCTAL_11) {
            record(&mut records, b"mtime", time(seconds, nanos).as_bytes());
        }
        for (name, value) in self.xattrs {
            record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        records
    }
}

/// Puts a text into a field as far as there is room, and fills it up.
fn put(field: &mut [u8], text: &[u8]) {
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text[..length]);
    field[length..].fill(0);
}

/// Appends `LENGTH KEY=VALUE\n`, where the length counts its own digits.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} ").as_bytes());
    for part in [key, b"=", value, b"\n"] {
        records.extend_from_slice(part);
    }
}

/// A time as a decimal number of seconds. The parts of a time before 1970 point in opposite directions.
fn time(seconds: i64, nanos: u32) -> String {
    match (seconds, nanos) {
        (_, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanos:09}"),
        _ => format!("-{}.{:09}", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanos),
    }
}

/// The attribute's name, where a record can have it: the first `=` ends the key.
pub(crate) fn storable(name: &CStr) -> bool {
    !name.to_bytes().contains(&b'=')
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

    #[test]
    fn what_a_header_has_no_room_for_is_read_from_records() {
        let mut about = statx(CWD, "/", AtFlags::empty(), StatxFlags::BASIC_STATS).unwrap();
        (about.stx_mode, about.stx_uid, about.stx_gid) = (0o4755, 3_000_000_000, OCTAL_7 + 1);
        (about.stx_mtime.tv_sec, about.stx_mtime.tv_nsec) = (OCTAL_11 as i64 + 1, 0);
        let name = b"n".repeat(300);
        let size = OCTAL_11 + 1;
        let entry = Entry {
            name: &name,
            kind: EntryType::Regular,
            about: &about,
            link: b"",
            size,
            xattrs: &[],
            sparse: None,
        };
        let (output, mut pieces) = tokio::sync::mpsc::channel(10);
        let output = Output(output);
        let mut archive = Archive::new(&output);
        archive.entry(&entry).unwrap();
        archive.finish().unwrap();
        let mut bytes = Vec::new();
        while let Ok(piece) = pieces.try_recv() {
            bytes.extend_from_slice(&piece);
        }
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut read = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(*read.path_bytes(), *name);
        assert_eq!((read.size(), read.header().mode().unwrap()), (size, 0o4755));
        let records: Vec<_> = read.pax_extensions().unwrap().unwrap().map(Result::unwrap).collect();
        let said =
            |key: &str| records.iter().find(|record| record.key() == Ok(key)).unwrap().value().unwrap();
        assert_eq!((said("uid"), said("gid")), ("3000000000", "2097152"));
        assert_eq!((said("mtime"), said("size")), ("8589934592", "8589934592"));
    }

    #[test]
    fn records_count_their_own_digits() {
        for value in [0usize, 1, 80, 88, 89, 90, 91, 92, 93, 986, 987, 988, 989, 990, 991, 992] {
            let mut records = Vec::new();
            record(&mut records, b"key", &vec![b'v'; value]);
            let blank = records.iter().position(|byte| *byte == b' ').unwrap();
            let said: usize = std::str::from_utf8(&records[..blank]).unwrap().parse().unwrap();
            assert_eq!(said, records.len(), "{value}");
        }
    }

    #[test]
    fn times_before_1970_are_what_they_are() {
        assert_eq!(time(12, 5), "12.000000005");
        assert_eq!(time(-1, 500_000_000), "-0.500000000");
        assert_eq!(time(-3, 250_000_000), "-2.750000000");
        assert_eq!(time(-3, 0), "-3");
    }
}
