//! Reads a tar archive whose sender is not trusted, one member at a time.
//!
//! Formats: V7, ustar and PAX (POSIX.1-2008, pax), and GNU tar's with its long names; sparse files as GNU tar has them in its
//! own format and in the PAX format, versions 0.0, 0.1 and 1.0. The crate `tar` knows the fields of headers. Its reader of
//! archives is not used: it takes extended headers apart at ends of lines, which names and attributes may have, keeps them in
//! memory however long they are, and takes PAX sparse files for what they look like.

use std::io::{self, ErrorKind, Read};

use nix::sys::time::TimeSpec;
use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use crate::pax::{BLOCK, padding};

/// The most that may describe one member, in bytes: its headers with names and attributes. They are kept in memory.
const HEADERS: u64 = 1 << 20;
/// What the keys of records of extended attributes begin with.
const XATTR: &[u8] = b"SCHILY.xattr.";
/// Parts of a sparse file.
const PARTS: usize = 1 << 20;

/// The archive ends where it must not.
#[derive(Debug, thiserror::Error)]
#[error("the archive ends without its end mark")]
pub struct Truncated;

/// What stands before a member's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// As it stands there: it may lead anywhere.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: EntryType,
    /// Permission bits, 12 of them.
    pub mode: u32,
    /// Numbers of user and group, if it has such as there can be.
    pub owner: Option<(u32, u32)>,
    /// Extended attributes, by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// When it was modified.
    pub modified: TimeSpec,
    /// Where a link leads; empty if there is no telling.
    pub link: Vec<u8>,
    /// Of a file, in bytes.
    pub size: u64,
    /// Where the content belongs, as offsets and lengths, if the file is sparse.
    pub parts: Option<Vec<(u64, u64)>>,
}

/// What records say of the member that follows.
#[derive(Debug, Default)]
struct Told {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<TimeSpec>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    /// Whether the map stands before the content: version 1.0.
    sparse_in_content: bool,
    sparse_offset: Option<u64>,
    sparse_map: Option<Vec<(u64, u64)>>,
}

/// The archive. Between two members it reads as the content of the first, without its holes.
#[derive(Debug)]
pub struct Members<R> {
    archive: R,
    /// Of the content, in bytes.
    left: u64,
    /// What fills the content's last block up.
    padding: u64,
}

/// Offset and length of the data of a sparse file.
type Parts = Vec<(u64, u64)>;

impl<R: Read> Members<R> {
    /// Reads in small pieces: what is not in memory should be buffered.
    pub fn new(archive: R) -> Self {
        Self { archive, left: 0, padding: 0 }
    }

    /// The next one, behind whose header the content is read. None if the archive's end mark comes.
    ///
    /// # Errors
    /// [`Truncated`], [`ErrorKind::InvalidData`] of what is no archive, and those of the source.
    pub fn next_member(&mut self) -> io::Result<Option<Member>> {
        self.skip()?;
        let mut told = Told::default();
        let mut room = HEADERS;
        loop {
            let block = self.block()?;
            if block.iter().all(|byte| *byte == 0) {
                // The second one is taken, so that its writer comes to its end; not all have one.
                let _ = self.block();
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            if header.cksum()? != sum(&block) {
                return Err(damaged("a header with a wrong sum"));
            }
            let (stored, kind) = (header.entry_size()?, header.entry_type());
            self.left = stored;
            self.padding = padding(stored);
            match kind {
                EntryType::XHeader | EntryType::GNULongName | EntryType::GNULongLink => {
                    let content = self.described(&mut room)?;
                    match kind {
                        EntryType::XHeader => told.take(&content)?,
                        EntryType::GNULongName => told.name = Some(content),
                        _ => told.link = Some(content),
                    }
                }
                // It describes the archive or others.
                EntryType::XGlobalHeader => self.skip()?,
                _ => return self.member(header, kind, told).map(Some),
            }
        }
    }

    /// Content that describes a member; of a name without the NUL behind it.
    fn described(&mut self, room: &mut u64) -> io::Result<Vec<u8>> {
        *room = room
            .checked_sub(self.left.saturating_add(BLOCK))
            .ok_or_else(|| damaged("names and attributes of one member take more than 1 MiB"))?;
        let mut content = Vec::new();
        self.read_to_end(&mut content)?;
        self.skip()?;
        if content.last() == Some(&0) {
            content.pop();
        }
        Ok(content)
    }

    fn member(&mut self, header: &Header, kind: EntryType, told: Told) -> io::Result<Member> {
        // POSIX gives content to hard links in PAX archives. Of others that are no files the field may say anything.
        self.left = match kind {
            EntryType::Symlink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Directory
            | EntryType::Fifo => 0,
            EntryType::Link => told.size.unwrap_or(0),
            _ => told.size.unwrap_or(self.left),
        };
        self.padding = padding(self.left);
        let (size, parts) = self.map(header, kind, &told)?;
        let name = told.sparse_name.or(told.name).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = told.link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        let modified = told.modified.unwrap_or_else(|| {
            // GNU tar's times before 1970 are a longer two's complement, of which this is the lower half.
            let seconds = header.mtime().unwrap_or(0).cast_signed();
            TimeSpec::new(seconds, 0)
        });
        let mode = header.mode()? & 0o7777;
        let id = |told: Option<u64>, header: io::Result<u64>| u32::try_from(told.or(header.ok())?).ok();
        let owner = id(told.uid, header.uid()).zip(id(told.gid, header.gid()));
        let (link, xattrs) = (link.unwrap_or_default(), told.xattrs);
        Ok(Member { name, kind, mode, owner, xattrs, modified, link, size, parts })
    }

    /// Size and parts of a file.
    fn map(&mut self, header: &Header, kind: EntryType, told: &Told) -> io::Result<(u64, Option<Parts>)> {
        let sizeless = || damaged("a sparse file without a size");
        let (size, parts) = if kind == EntryType::GNUSparse {
            let (size, parts) = self.old_map(header)?;
            (told.sparse_size.unwrap_or(size), parts)
        } else if told.sparse_in_content {
            (told.sparse_size.ok_or_else(sizeless)?, self.map_in_content()?)
        } else if let Some(parts) = &told.sparse_map {
            (told.sparse_size.ok_or_else(sizeless)?, parts.clone())
        } else {
            return Ok((self.left, None));
        };
        let (mut end, mut stored) = (0_u64, 0);
        for (offset, length) in &parts {
            let next = offset.checked_add(*length).filter(|next| *offset >= end && *next <= size);
            end = next.ok_or_else(|| damaged("a sparse file whose parts are not in it"))?;
            stored += length;
        }
        if stored != self.left {
            return Err(damaged("a sparse file whose parts are not those that are stored"));
        }
        Ok((size, Some(parts)))
    }

    /// Of GNU tar's own format: the map is in the header, and goes on in blocks behind it, which count for nothing.
    fn old_map(&mut self, header: &Header) -> io::Result<(u64, Vec<(u64, u64)>)> {
        let gnu = header.as_gnu().ok_or_else(|| damaged("a sparse file in a format that has none"))?;
        let mut parts = Vec::new();
        let mut add = |fields: &[GnuSparseHeader]| {
            for field in fields.iter().filter(|field| !field.is_empty()) {
                parts.push((field.offset()?, field.length()?));
            }
            if parts.len() > PARTS { Err(damaged("a sparse file of too many parts")) } else { Ok(()) }
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            block.as_mut_bytes().copy_from_slice(&self.block()?);
            add(block.sparse())?;
            more = block.is_extended();
        }
        Ok((gnu.real_size()?, parts))
    }

    /// Of version 1.0: decimal numbers, one a line, fill whole blocks before the data; the first is how many pairs follow.
    fn map_in_content(&mut self) -> io::Result<Vec<(u64, u64)>> {
        let wrong = || damaged("a sparse file whose map is none");
        let (mut numbers, mut wanted) = (Vec::new(), 1);
        let mut digits = Vec::new();
        while numbers.len() < wanted {
            self.left = self.left.checked_sub(BLOCK).ok_or_else(wrong)?;
            for byte in self.block()? {
                match byte {
                    b'0'..=b'9' if digits.len() < 20 => digits.push(byte),
                    b'\n' => {
                        let found = number(&digits)?;
                        digits.clear();
                        if numbers.is_empty() {
                            let pairs = usize::try_from(found).ok().filter(|pairs| *pairs <= PARTS);
                            wanted = 1 + 2 * pairs.ok_or_else(wrong)?;
                        }
                        numbers.push(found);
                        if numbers.len() == wanted {
                            break;
                        }
                    }
                    _ => return Err(wrong()),
                }
            }
        }
        Ok(pairs(&numbers[1..]))
    }

    /// Goes to the next header.
    fn skip(&mut self) -> io::Result<()> {
        let rest = self.left.saturating_add(std::mem::take(&mut self.padding));
        self.left = 0;
        if rest == 0 {
            return Ok(());
        }
        match io::copy(&mut (&mut self.archive).take(rest), &mut io::sink())? {
            skipped if skipped == rest => Ok(()),
            _ => Err(truncated()),
        }
    }

    fn block(&mut self) -> io::Result<[u8; BLOCK as usize]> {
        let mut block = [0; BLOCK as usize];
        let mut filled = 0;
        while filled < block.len() {
            match self.archive.read(&mut block[filled..]) {
                Ok(0) => return Err(truncated()),
                Ok(length) => filled += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(block)
    }
}

impl<R: Read> Read for Members<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let length = self.archive.read(&mut buffer[..most])?;
        if length == 0 {
            return Err(truncated());
        }
        self.left -= length as u64;
        Ok(length)
    }
}

impl Told {
    /// Takes records `LENGTH KEY=VALUE\n`, the length being that of all of it.
    fn take(&mut self, mut records: &[u8]) -> io::Result<()> {
        while !records.is_empty() {
            let (key, value, rest) = first(records).ok_or_else(|| damaged("records that are none"))?;
            records = rest;
            match key {
                key if key.starts_with(XATTR) => {
                    self.xattrs.push((key[XATTR.len()..].to_vec(), value.to_vec()));
                }
                // An empty value takes back what was said of all.
                _ if value.is_empty() => {}
                b"path" => self.name = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size = Some(number(value)?),
                b"uid" => self.uid = Some(number(value)?),
                b"gid" => self.gid = Some(number(value)?),
                b"mtime" => self.modified = std::str::from_utf8(value).ok().and_then(time),
                b"GNU.sparse.major" => self.sparse_in_content = number(value)? == 1,
                b"GNU.sparse.name" => self.sparse_name = Some(value.to_vec()),
                b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse_size = Some(number(value)?),
                b"GNU.sparse.offset" => self.sparse_offset = Some(number(value)?),
                b"GNU.sparse.numbytes" => {
                    let offset = self.sparse_offset.take();
                    let offset = offset.ok_or_else(|| damaged("a part of a sparse file without a place"))?;
                    self.sparse_map.get_or_insert_default().push((offset, number(value)?));
                }
                b"GNU.sparse.map" => {
                    let numbers: io::Result<Vec<u64>> =
                        value.split(|byte| *byte == b',').map(number).collect();
                    self.sparse_map = Some(pairs(&numbers?));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Key and value of the first record, and what is behind it.
fn first(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().position(|byte| *byte == b' ')?;
    let length = usize::try_from(number(&records[..space]).ok()?).ok()?;
    let (record, rest) = records.split_at_checked(length)?;
    let pair = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = pair.iter().position(|byte| *byte == b'=')?;
    Some((&pair[..equals], &pair[equals + 1..], rest))
}

fn pairs(numbers: &[u64]) -> Vec<(u64, u64)> {
    numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
}

fn number(digits: &[u8]) -> io::Result<u64> {
    let digits = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
    digits.ok_or_else(|| damaged("a number that is none"))
}

fn truncated() -> io::Error {
    io::Error::new(ErrorKind::UnexpectedEof, Truncated)
}

fn damaged(reason: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason)
}

/// Of a header, whose own field of it counts as spaces.
fn sum(block: &[u8]) -> u32 {
    let all: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    let own: u32 = block[148..156].iter().map(|byte| u32::from(*byte)).sum();
    all - own + 8 * u32::from(b' ')
}

/// A decimal number of seconds, see POSIX.1-2008, pax, "pax Extended Header".
fn time(text: &str) -> Option<TimeSpec> {
    let (before, text) = match text.strip_prefix('-') {
        Some(text) => (true, text),
        None => (false, text),
    };
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = seconds.parse().ok().filter(|seconds| *seconds >= 0)?;
    // What is finer than the kernel's times is cut off.
    let nanos: i64 = format!("{:0<9}", &fraction[..fraction.len().min(9)]).parse().ok()?;
    Some(match (before, nanos) {
        (false, _) => TimeSpec::new(seconds, nanos),
        (true, 0) => TimeSpec::new(-seconds, 0),
        (true, _) => TimeSpec::new(-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: EntryType = EntryType::Regular;

    fn archive(members: &[(&[u8], &[u8], EntryType)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content, kind) in members {
            let records = [("SCHILY.xattr.user.x", &b"\n11 path=up\n"[..]), ("path", *name)];
            builder.append_pax_extensions(records).unwrap();
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
    fn records_are_as_long_as_they_say() {
        let long = b"n\n/\xff".repeat(60);
        let content = vec![7; 1025];
        let archive = archive(&[(&long, &content, FILE), (b"a\n12 b=c\n", b"", FILE), (b"x", b"y", FILE)]);
        let mut members = Members::new(archive.as_slice());
        let mut found = Vec::new();
        while let Some(member) = members.next_member().unwrap() {
            assert_eq!((member.kind, member.mode), (FILE, 0o755));
            // Content need not be read.
            if member.name == long {
                let mut read = Vec::new();
                members.read_to_end(&mut read).unwrap();
                assert_eq!(read, content);
            }
            found.push(member.name);
        }
        assert_eq!(found, [long, b"a\n12 b=c\n".to_vec(), b"x".to_vec()]);
    }

    #[test]
    fn times_before_1970_as_gnu_tar_writes_them() {
        let mut header = Header::new_gnu();
        header.set_entry_type(FILE);
        header.set_size(0);
        header.set_mode(0o644);
        // `touch -d @-5 f; tar --format=gnu -c f`.
        let mut time = [0xff; 12];
        time[11] = 0xfb;
        header.as_gnu_mut().unwrap().mtime = time;
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_data(&mut header, "f", &b""[..]).unwrap();
        let archive = builder.into_inner().unwrap();
        let member = Members::new(archive.as_slice()).next_member().unwrap().unwrap();
        assert_eq!(member.modified, TimeSpec::new(-5, 0));
    }

    #[test]
    fn all_of_the_end_mark_is_read() {
        let whole = archive(&[(b"a", b"content", FILE)]);
        let mut source = whole.as_slice();
        let mut members = Members::new(&mut source);
        while members.next_member().unwrap().is_some() {}
        assert!(source.is_empty(), "{} bytes are left", source.len());
    }

    #[test]
    fn damage_is_an_error_and_never_an_end() {
        let whole = archive(&[(b"a", b"content", FILE)]);
        let read = |archive: &[u8]| {
            let mut members = Members::new(archive);
            while members.next_member()?.is_some() {}
            io::Result::Ok(())
        };
        read(&whole).unwrap();
        // Up to the first block of the end mark.
        for length in 0..whole.len() - BLOCK as usize {
            assert!(read(&whole[..length]).is_err(), "cut off at {length}");
        }
        for at in [0, 100, 130, BLOCK as usize, 2 * BLOCK as usize + 20] {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x15;
            assert!(read(&damaged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn times_have_their_nanoseconds() {
        for (text, seconds, nanos) in [
            ("12", 12, 0),
            ("12.5", 12, 500_000_000),
            ("12.000000005", 12, 5),
            ("12.0000000059", 12, 5),
            ("-0.5", -1, 500_000_000),
            ("-2.75", -3, 250_000_000),
            ("-3", -3, 0),
        ] {
            assert_eq!(time(text), Some(TimeSpec::new(seconds, nanos)), "{text}");
        }
        for text in ["", "x", "1.x", "--1", "1.-5", "99999999999999999999"] {
            assert_eq!(time(text), None, "{text}");
        }
    }
}
