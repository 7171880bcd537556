//! Headers of tar archives in the PAX format, as they are written.
//!
//! POSIX.1-2008, pax, "ustar Interchange Format" and "pax Extended Header". What a ustar header has no room for becomes a
//! record before it. The crate `tar` writes the header's fields; its builder refuses names that files may well have, and
//! has no records of binary attributes. Nor do all readers take records apart by the lengths that they tell: some do it at
//! ends of lines, the crate among them. So a long name or target that has one goes as GNU tar writes it, which all know.

use std::ffi::CStr;

pub use tar::EntryType;
use tar::Header;

/// What a header's and an archive's parts are filled up to, in bytes.
pub const BLOCK: u64 = 512;
/// The largest size, and the latest time, of a header's field of eleven octal digits.
const OCTAL_11: u64 = 0o777_7777_7777;
/// The largest number of a field of seven octal digits.
const OCTAL_7: u32 = 0o777_7777;
/// The most that a name may have in a header, in bytes.
const NAME: usize = 100;
const SECOND: u32 = 1_000_000_000;

/// Names and values of extended attributes.
pub(crate) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What is said of one entry of an archive.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// That of a directory ends in a slash.
    pub name: &'a [u8],
    /// What it is.
    pub kind: EntryType,
    /// Permission bits, 12 of them.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When it was modified: seconds since 1970, and nanoseconds that are added to them.
    pub mtime: (i64, u32),
    /// Where a link leads.
    pub link: &'a [u8],
    /// What is stored, in bytes.
    pub size: u64,
    /// A device's numbers.
    pub device: (u32, u32),
    /// Extended attributes.
    pub xattrs: &'a [(Vec<u8>, Vec<u8>)],
    /// The full size of a file of which only parts are stored, in bytes.
    pub sparse: Option<u64>,
}

impl Entry<'_> {
    /// Appends all that stands before the content, in whole blocks.
    pub fn encode(&self, to: &mut Vec<u8>) {
        for (kind, text) in [(EntryType::GNULongName, self.name), (EntryType::GNULongLink, self.link)] {
            if is_long_lines(text) {
                let mut header = Header::new_gnu();
                put(&mut header.as_mut_bytes()[..NAME], b"././@LongLink");
                // It ends in a NUL.
                described(to, header, kind, &[text, b"\0"].concat());
            }
        }
        let records = self.records();
        if !records.is_empty() {
            let mut header = Header::new_ustar();
            put(&mut header.as_mut_bytes()[..NAME], b"PaxHeaders/entry");
            described(to, header, EntryType::XHeader, &records);
        }
        let mut header = self.header();
        header.set_cksum();
        to.extend_from_slice(header.as_bytes());
    }

    fn header(&self) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(self.kind);
        let name = if self.sparse.is_some() { b"GNUSparseFile.0/file" } else { self.name };
        put(&mut header.as_mut_bytes()[..NAME], name);
        put(&mut header.as_mut_bytes()[157..157 + NAME], self.link);
        header.set_mode(self.mode & 0o7777);
        // What has a record of its own is read from that.
        header.set_uid(u64::from(self.uid.min(OCTAL_7)));
        header.set_gid(u64::from(self.gid.min(OCTAL_7)));
        header.set_size(if self.size > OCTAL_11 { 0 } else { self.size });
        header.set_mtime(u64::try_from(self.mtime.0).unwrap_or(0).min(OCTAL_11));
        if matches!(self.kind, EntryType::Char | EntryType::Block) {
            for (number, at) in [(self.device.0, 329), (self.device.1, 337)] {
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
        } else if self.name.len() > NAME && !is_long_lines(self.name) {
            record(&mut records, b"path", self.name);
        }
        if self.link.len() > NAME && !is_long_lines(self.link) {
            record(&mut records, b"linkpath", self.link);
        }
        if self.size > OCTAL_11 {
            number(&mut records, "size", self.size);
        }
        for (key, id) in [("uid", self.uid), ("gid", self.gid)] {
            if id > OCTAL_7 {
                number(&mut records, key, id.into());
            }
        }
        let (seconds, nanos) = self.mtime;
        if nanos != 0 || !u64::try_from(seconds).is_ok_and(|seconds| seconds <= OCTAL_11) {
            record(&mut records, b"mtime", time(seconds, nanos).as_bytes());
        }
        for (name, value) in self.xattrs {
            record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        records
    }
}

/// Appends a header that describes the next one, with its content.
fn described(to: &mut Vec<u8>, mut header: Header, kind: EntryType, content: &[u8]) {
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    header.set_cksum();
    to.extend_from_slice(header.as_bytes());
    to.extend_from_slice(content);
    to.resize(to.len() + padding(content.len() as u64) as usize, 0);
}

/// How many zeros follow so many bytes of content.
pub fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK
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

/// A time as a decimal number of seconds. The parts of a time before 1970 point in opposite directions.
fn time(seconds: i64, nanos: u32) -> String {
    match (seconds, nanos) {
        (_, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanos:09}"),
        _ => format!("-{}.{:09}", (seconds + 1).unsigned_abs(), SECOND - nanos),
    }
}

/// The attribute's name, where a record can have it: the first `=` ends the key.
pub(crate) fn storable(name: &CStr) -> bool {
    !name.to_bytes().contains(&b'=')
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: Entry<'static> = Entry {
        name: b"file",
        kind: EntryType::Regular,
        mode: 0o4755,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        link: b"",
        size: 0,
        device: (0, 0),
        xattrs: &[],
        sparse: None,
    };

    /// As the crate reads it, which many others do like.
    fn read<T>(entries: &[Entry<'_>], look: impl Fn(&mut tar::Entry<'_, &[u8]>) -> T) -> Vec<T> {
        let mut bytes = Vec::new();
        entries.iter().for_each(|entry| entry.encode(&mut bytes));
        bytes.resize(bytes.len() + 1024, 0);
        let mut archive = tar::Archive::new(bytes.as_slice());
        // No content stands behind the headers.
        archive.entries().unwrap().take(entries.len()).map(|entry| look(&mut entry.unwrap())).collect()
    }

    #[test]
    fn what_a_header_has_no_room_for_is_read_from_records() {
        let name = b"n/\xff".repeat(100);
        let target = b"../".repeat(60);
        let size = OCTAL_11 + 1;
        let huge = Entry {
            name: &name,
            uid: 3_000_000_000,
            gid: OCTAL_7 + 1,
            mtime: (OCTAL_11 as i64 + 1, 0),
            size,
            ..FILE
        };
        read(&[huge], |read| {
            assert_eq!(*read.path_bytes(), *name);
            assert_eq!((read.size(), read.header().mode().unwrap()), (size, 0o4755));
            let records: Vec<_> = read.pax_extensions().unwrap().unwrap().map(Result::unwrap).collect();
            let said =
                |key: &str| records.iter().find(|record| record.key() == Ok(key)).unwrap().value().unwrap();
            assert_eq!((said("uid"), said("gid")), ("3000000000", "2097152"));
            assert_eq!((said("mtime"), said("size")), ("8589934592", "8589934592"));
        });
        let link = Entry { kind: EntryType::Symlink, link: &target, mtime: (-1, 999_999_999), ..FILE };
        read(&[link], |read| {
            assert_eq!(*read.link_name_bytes().unwrap(), *target);
            let mut records = read.pax_extensions().unwrap().unwrap().map(Result::unwrap);
            let mtime = records.find(|record| record.key() == Ok("mtime")).unwrap();
            assert_eq!(mtime.value(), Ok("-0.000000001"));
        });
    }

    #[test]
    fn long_names_of_several_lines_are_whole_everywhere() {
        let (name, target) = (b"n/\xff\n".repeat(40), b"../\n".repeat(60));
        let link =
            Entry { name: &name, kind: EntryType::Symlink, link: &target, mtime: (-1, 999_999_999), ..FILE };
        // What described one entry says nothing of the next.
        let found = read(&[link, FILE], |read| {
            let link = read.link_name_bytes().map(|link| link.into_owned());
            (read.path_bytes().into_owned(), link.unwrap_or_default())
        });
        assert_eq!(found, [(name, target), (b"file".to_vec(), Vec::new())]);
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
