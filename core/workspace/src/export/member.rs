//! Reads a tar archive whose sender is not trusted, one member at a time.
//!
//! The crate `tar` knows the fields of headers. Its reader of archives is not used, as it takes extended headers (POSIX.1-2008, pax,
//! "pax Extended Header") apart at ends of lines, which names may have, and keeps them in memory however long they are.

use std::io::{self, ErrorKind, Read};

use tar::{EntryType, Header};

const BLOCK: usize = 512;
/// The most that may describe one member, in bytes. It is kept in memory.
const HEADERS: u64 = 64 << 10;

/// What stands before a member's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) path: Vec<u8>,
    pub(super) kind: EntryType,
    /// Permission bits.
    pub(super) mode: u32,
}

/// The archive. Between two members it reads as the content of the first.
#[derive(Debug)]
pub(super) struct Members<R> {
    archive: R,
    /// Of the content, in bytes.
    left: u64,
    /// What fills the content's last block up.
    padding: u64,
}

impl<R: Read> Members<R> {
    pub(super) fn new(archive: R) -> Self {
        Self { archive, left: 0, padding: 0 }
    }

    /// The next one, behind whose header the content is read. None if the archive's end mark comes.
    pub(super) fn next(&mut self) -> io::Result<Option<Member>> {
        self.skip()?;
        let (mut path, mut size) = (None, None);
        let mut room = HEADERS;
        loop {
            let block = self.block()?;
            if block == [0; BLOCK] {
                return if self.block()? == [0; BLOCK] { Ok(None) } else { Err(damaged("half an end mark")) };
            }
            let header = Header::from_byte_slice(&block);
            if header.cksum()? != sum(&block) {
                return Err(damaged("a header with a wrong sum"));
            }
            let stored = header.entry_size()?;
            let kind = header.entry_type();
            self.left = stored;
            match kind {
                EntryType::XHeader
                | EntryType::XGlobalHeader
                | EntryType::GNULongName
                | EntryType::GNULongLink => {
                    room = room
                        .checked_sub(stored.saturating_add(BLOCK as u64))
                        .ok_or_else(|| damaged("a name is longer than any real one"))?;
                    self.padding = padding(stored);
                    let mut records = Vec::new();
                    self.read_to_end(&mut records)?;
                    match kind {
                        EntryType::XHeader => {
                            for record in extended(&records) {
                                match record? {
                                    (b"path", value) => path = Some(value.to_vec()),
                                    (b"size", value) => size = Some(number(value)?),
                                    _ => {}
                                }
                            }
                        }
                        EntryType::GNULongName => {
                            path = Some(records.strip_suffix(b"\0").unwrap_or(&records).to_vec());
                        }
                        _ => {}
                    }
                    self.skip()?;
                }
                _ => {
                    self.left = size.unwrap_or(stored);
                    self.padding = padding(self.left);
                    let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
                    return Ok(Some(Member { path, kind, mode: header.mode()? & 0o777 }));
                }
            }
        }
    }

    /// Goes to the next header.
    fn skip(&mut self) -> io::Result<()> {
        let rest = self.left.saturating_add(std::mem::take(&mut self.padding));
        self.left = 0;
        match io::copy(&mut (&mut self.archive).take(rest), &mut io::sink())? {
            skipped if skipped == rest => Ok(()),
            _ => Err(truncated()),
        }
    }

    fn block(&mut self) -> io::Result<[u8; BLOCK]> {
        let mut block = [0; BLOCK];
        self.archive.read_exact(&mut block).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => truncated(),
            _ => error,
        })?;
        Ok(block)
    }
}

impl<R: Read> Read for Members<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = (&mut self.archive).take(self.left).read(buffer)?;
        if length == 0 && self.left > 0 && !buffer.is_empty() {
            return Err(truncated());
        }
        self.left -= length as u64;
        Ok(length)
    }
}

fn truncated() -> io::Error {
    io::Error::new(ErrorKind::UnexpectedEof, "it ends without its end mark")
}

fn damaged(reason: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason)
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

/// Of a header, whose own field of it counts as spaces.
fn sum(block: &[u8; BLOCK]) -> u32 {
    let bytes = block.iter().enumerate();
    bytes.map(|(at, byte)| if (148..156).contains(&at) { u32::from(b' ') } else { u32::from(*byte) }).sum()
}

fn number(digits: &[u8]) -> io::Result<u64> {
    let digits = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
    digits.ok_or_else(|| damaged("a size that is no number"))
}

/// Keys and values of records `LENGTH KEY=VALUE\n`, the length being that of all of it.
fn extended(mut records: &[u8]) -> impl Iterator<Item = io::Result<(&[u8], &[u8])>> {
    let mut next = move || {
        let space = records.iter().position(|byte| *byte == b' ')?;
        let (record, rest) =
            records.split_at_checked(number(records.get(..space)?).ok()?.try_into().ok()?)?;
        let pair = record.get(space + 1..)?.strip_suffix(b"\n")?;
        let equals = pair.iter().position(|byte| *byte == b'=')?;
        records = rest;
        Some((pair.get(..equals)?, pair.get(equals + 1..)?, rest.is_empty()))
    };
    let mut ended = records.is_empty();
    std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let record = next();
        ended = record.is_none_or(|(.., last)| last);
        Some(record.map(|(key, value, _)| (key, value)).ok_or_else(|| damaged("records that are none")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(members: &[(&[u8], &[u8], EntryType)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content, kind) in members {
            builder.append_pax_extensions([("comment", &b"x"[..]), ("path", *name)]).unwrap();
            let mut header = Header::new_ustar();
            header.set_entry_type(*kind);
            header.set_size(content.len() as u64);
            header.set_mode(0o100_755);
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn names_with_ends_of_lines_and_contents_of_any_length() {
        let long = b"n\n/\xff".repeat(60);
        let content = vec![7; 1025];
        let regular = EntryType::Regular;
        let archive =
            archive(&[(&long, &content, regular), (b"a\n12 b=c\n", b"", regular), (b"x", b"y", regular)]);
        let mut members = Members::new(archive.as_slice());
        let mut found = Vec::new();
        while let Some(member) = members.next().unwrap() {
            assert_eq!((member.kind, member.mode), (regular, 0o755));
            // The second one's content, if there were any, would not have to be read.
            let mut read = Vec::new();
            if member.path == long {
                members.read_to_end(&mut read).unwrap();
                assert_eq!(read, content);
            }
            found.push(member.path);
        }
        assert_eq!(found, [long, b"a\n12 b=c\n".to_vec(), b"x".to_vec()]);
    }

    #[test]
    fn damage_is_an_error_and_never_an_end() {
        let whole = archive(&[(b"a", b"content", EntryType::Regular)]);
        let read = |archive: &[u8]| {
            let mut members = Members::new(archive);
            while members.next()?.is_some() {}
            io::Result::Ok(())
        };
        read(&whole).unwrap();
        for length in 0..whole.len() {
            assert!(read(&whole[..length]).is_err(), "cut off at {length}");
        }
        for at in [0, 100, 130, BLOCK, 2 * BLOCK + 20] {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x15;
            assert!(read(&damaged).is_err(), "byte {at}");
        }
    }
}
