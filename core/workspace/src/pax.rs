//! Headers of tar archives in the PAX format.
//!
//! POSIX.1-2008, pax, "ustar Interchange Format" and "pax Extended Header": what a ustar header has no room for becomes a
//! record before it. The crate `tar` writes the header's fields; its builder refuses names that files may well have. Nor does it
//! read records whose value has an end of line, though they tell their length; who unpacks may use it, so such a long name or
//! target goes as GNU tar writes it, which all know.

use std::io::{self, Write};

use tar::{EntryType, Header};

use crate::EntryKind;

const BLOCK: u64 = 512;
/// The largest size, and the latest time, of a header's field of eleven octal digits.
const OCTAL_11: u64 = 0o777_7777_7777;
/// The most that a name may have in a header, in bytes.
const NAME: usize = 100;
const SECOND: i128 = 1_000_000_000;
/// Written at once, in bytes.
const PIECE: usize = 1 << 20;

/// One entry's header. Owners are not told: in the guest all belongs to one user.
pub(crate) struct Item<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) kind: EntryKind,
    pub(crate) mode: u32,
    /// Of a file's content.
    pub(crate) size: u64,
    /// In nanoseconds since 1970.
    pub(crate) mtime: i128,
    /// Where a link leads.
    pub(crate) target: &'a [u8],
}

/// An archive that is being written.
pub(crate) struct Archive<W> {
    to: W,
    piece: Vec<u8>,
    /// Bytes so far.
    written: u64,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(to: W) -> Self {
        Self { to, piece: Vec::with_capacity(PIECE), written: 0 }
    }

    /// Writes an entry's header; a file's content must follow.
    pub(crate) fn item(&mut self, item: &Item<'_>) -> io::Result<()> {
        for (kind, text) in
            [(EntryType::GNULongName, &item.name()[..]), (EntryType::GNULongLink, item.target)]
        {
            if is_long_lines(text) {
                self.long(kind, text)?;
            }
        }
        let records = item.records();
        if !records.is_empty() {
            let mut header = Header::new_ustar();
            header.set_entry_type(EntryType::XHeader);
            header.set_mode(0o644);
            header.set_size(records.len() as u64);
            put(&mut header.as_mut_bytes()[..NAME], b"PaxHeaders/entry");
            self.header(header)?;
            self.content(&records)?;
            self.fill()?;
        }
        self.header(item.header())
    }

    /// Writes a name or target for the next header.
    fn long(&mut self, kind: EntryType, text: &[u8]) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        // It ends in a NUL.
        header.set_size(text.len() as u64 + 1);
        put(&mut header.as_mut_bytes()[..NAME], b"././@LongLink");
        self.header(header)?;
        self.content(text)?;
        self.content(&[0])?;
        self.fill()
    }

    fn header(&mut self, mut header: Header) -> io::Result<()> {
        header.set_cksum();
        self.content(header.as_bytes())
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
        self.zeros(self.written.next_multiple_of(BLOCK) - self.written)
    }

    /// Writes the end mark.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.zeros(2 * BLOCK)?;
        self.to.write_all(&self.piece)?;
        self.to.flush()
    }
}

impl Item<'_> {
    /// The name as it stands: that of a directory ends in a slash.
    fn name(&self) -> Vec<u8> {
        let mut name = self.path.to_vec();
        if self.kind == EntryKind::Directory {
            name.push(b'/');
        }
        name
    }

    fn header(&self) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(match self.kind {
            EntryKind::File => EntryType::Regular,
            EntryKind::Directory => EntryType::Directory,
            EntryKind::Symlink => EntryType::Symlink,
        });
        put(&mut header.as_mut_bytes()[..NAME], &self.name());
        put(&mut header.as_mut_bytes()[157..157 + NAME], self.target);
        header.set_mode(self.mode);
        header.set_uid(0);
        header.set_gid(0);
        // What has a record of its own is read from that.
        header.set_size(if self.size > OCTAL_11 { 0 } else { self.size });
        header.set_mtime(u64::try_from(self.mtime.div_euclid(SECOND)).unwrap_or(0).min(OCTAL_11));
        header
    }

    /// What the header has no room for.
    fn records(&self) -> Vec<u8> {
        let mut records = Vec::new();
        let name = self.name();
        if name.len() > NAME && !is_long_lines(&name) {
            record(&mut records, b"path", &name);
        }
        if self.target.len() > NAME && !is_long_lines(self.target) {
            record(&mut records, b"linkpath", self.target);
        }
        if self.size > OCTAL_11 {
            record(&mut records, b"size", self.size.to_string().as_bytes());
        }
        let seconds = self.mtime.div_euclid(SECOND);
        if self.mtime.rem_euclid(SECOND) != 0 || !(0..=i128::from(OCTAL_11)).contains(&seconds) {
            record(&mut records, b"mtime", time(self.mtime).as_bytes());
        }
        records
    }
}

/// Whether a text is too long for a header, and is not read from a record everywhere.
fn is_long_lines(text: &[u8]) -> bool {
    text.len() > NAME && text.contains(&b'\n')
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
    for part in [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"] {
        records.extend_from_slice(part);
    }
}

/// A time as a decimal number of seconds, away from 1970 in both directions.
fn time(nanos: i128) -> String {
    let sign = if nanos < 0 { "-" } else { "" };
    let (seconds, rest) = (nanos.abs() / SECOND, nanos.abs() % SECOND);
    if rest == 0 { format!("{sign}{seconds}") } else { format!("{sign}{seconds}.{rest:09}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_header_has_no_room_for_is_read_from_records() {
        let (path, target) = (b"n/\xff".repeat(40), b"../".repeat(60));
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        let link =
            Item { path: &path, kind: EntryKind::Symlink, mode: 0o777, size: 0, mtime: -1, target: &target };
        archive.item(&link).unwrap();
        let huge = Item { path: b"huge", kind: EntryKind::File, size: OCTAL_11 + 1, target: b"", ..link };
        archive.item(&huge).unwrap();
        archive.finish().unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut entries = archive.entries().unwrap();
        let mut read = entries.next().unwrap().unwrap();
        assert_eq!((&*read.path_bytes(), &*read.link_name_bytes().unwrap()), (&*path, &*target));
        let records: Vec<_> = read.pax_extensions().unwrap().unwrap().map(Result::unwrap).collect();
        let mtime = records.iter().find(|record| record.key() == Ok("mtime")).unwrap();
        assert_eq!(mtime.value(), Ok("-0.000000001"));
        assert_eq!(entries.next().unwrap().unwrap().size(), OCTAL_11 + 1);
    }

    #[test]
    fn long_names_of_several_lines_are_whole() {
        let (path, target) = (b"n/\xff\n".repeat(40), b"../\n".repeat(60));
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        let link =
            Item { path: &path, kind: EntryKind::Symlink, mode: 0o777, size: 0, mtime: -1, target: &target };
        archive.item(&link).unwrap();
        archive.finish().unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let read = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!((&*read.path_bytes(), &*read.link_name_bytes().unwrap()), (&*path, &*target));
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
}
