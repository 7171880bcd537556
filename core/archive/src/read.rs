//! Reads a tar archive whose sender is not trusted, one member at a time.
//!
//! Formats: V7, ustar and PAX (POSIX.1-2008, pax), and GNU tar's with its long names; sparse files as GNU tar has them in its
//! own format and in the PAX format, versions 0.0, 0.1 and 1.0. The crate `tar` knows the fields of headers. Its reader of
//! archives is not used: it takes extended headers apart at ends of lines, which names and attributes may have, keeps them in
//! memory however long they are, and takes PAX sparse files for what they look like.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, Read},
};

use nix::sys::time::TimeSpec;
use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use crate::pax::{BLOCK, padding};

/// The most that may describe one member, in bytes: its headers with names and attributes. They are kept in memory.
const HEADERS: u64 = 1 << 20;
/// What may be said of all members to come, in bytes: each gets a copy. Real ones hold a comment or a time.
const GLOBAL: usize = 64 << 10;
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
    /// Numbers of user and group, if it has such as there can be: to chown(2) the largest is none.
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

/// What records say of the member that follows, or of all.
#[derive(Debug, Clone, Default)]
struct Told {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<TimeSpec>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
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
    /// What holds of all members that follow.
    global: Told,
}

/// Offset and length of the data of a sparse file.
type Parts = Vec<(u64, u64)>;

impl<R: Read> Members<R> {
    /// Reads in small pieces: what is not in memory should be buffered.
    pub fn new(archive: R) -> Self {
        Self { archive, left: 0, padding: 0, global: Told::default() }
    }

    /// The next one, behind whose header the content is read. None if the archive's end mark comes.
    ///
    /// # Errors
    /// [`Truncated`], [`ErrorKind::InvalidData`] of what is no archive, and those of the source.
    pub fn next_member(&mut self) -> io::Result<Option<Member>> {
        self.skip()?;
        let mut told = self.global.clone();
        let (mut long_name, mut long_link) = (None, None);
        let mut room = HEADERS;
        loop {
            let mut block = self.block()?;
            if block.iter().all(|byte| *byte == 0) {
                // The second one is taken, so that its writer comes to its end; not all have one.
                let _ = self.block();
                return Ok(None);
            }
            if !is_summed(&block)? {
                return Err(damaged("a header with a wrong sum"));
            }
            // star puts times behind a shorter prefix of the name and marks that at the block's end.
            if block.ends_with(b"tar\0") {
                block[476] = 0;
            }
            let header = Header::from_byte_slice(&block);
            self.left = field(&header.as_old().size, header.entry_size())?;
            self.padding = padding(self.left);
            match header.as_old().linkflag[0] {
                // Solaris has a letter of its own.
                b'x' | b'X' => {
                    let records = self.described(&mut room)?;
                    told.take(&records)?;
                }
                b'g' => {
                    let records = self.described(&mut room)?;
                    self.global.take(&records)?;
                    if self.global.weight() > GLOBAL {
                        return Err(damaged("what is said of all members takes more than 64 KiB"));
                    }
                    told = self.global.clone();
                }
                b'L' => long_name = Some(self.described(&mut room)?),
                b'K' => long_link = Some(self.described(&mut room)?),
                // A volume's label is no file.
                b'V' => self.skip()?,
                _ => {
                    told.name = told.name.or(long_name);
                    told.link = told.link.or(long_link);
                    return self.member(header, told).map(Some);
                }
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

    fn member(&mut self, header: &Header, told: Told) -> io::Result<Member> {
        let old = header.as_old();
        // GNU tar's incremental archives give directories a type of their own, and the names in them as content.
        let names = old.linkflag[0] == b'D';
        let kind = if names { EntryType::Directory } else { header.entry_type() };
        // POSIX gives content to hard links in PAX archives. Of others that are no files the field may say anything.
        self.left = match kind {
            EntryType::Symlink | EntryType::Char | EntryType::Block | EntryType::Fifo => 0,
            EntryType::Directory if !names => 0,
            EntryType::Link => told.size.unwrap_or(0),
            _ => told.size.unwrap_or(self.left),
        };
        self.padding = padding(self.left);
        let (size, parts) = self.map(header, kind, &told)?;
        let name = told.sparse_name.or(told.name).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = told.link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        let modified = told.modified.unwrap_or_else(|| {
            // GNU tar's times before 1970 are a longer two's complement, of which this is the lower half.
            let seconds = field(&old.mtime, header.mtime()).unwrap_or(0).cast_signed();
            TimeSpec::new(seconds, 0)
        });
        let mode = field(&old.mode, header.mode())? & 0o7777;
        let id = |told: Option<u64>, header: io::Result<u64>| {
            u32::try_from(told.or(header.ok())?).ok().filter(|id| *id != u32::MAX)
        };
        let uid = id(told.uid, field(&old.uid, header.uid()));
        let owner = uid.zip(id(told.gid, field(&old.gid, header.gid())));
        let (link, xattrs) = (link.unwrap_or_default(), told.xattrs.into_iter().collect());
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
    /// About how many bytes it takes.
    fn weight(&self) -> usize {
        let names = [&self.name, &self.link, &self.sparse_name].into_iter().flatten().map(Vec::len);
        let places = size_of::<(Vec<u8>, Vec<u8>)>();
        let xattrs = self.xattrs.iter().map(|(name, value)| places + name.len() + value.len());
        names.chain(xattrs).sum::<usize>() + self.sparse_map.as_deref().map_or(0, size_of_val)
    }

    /// Takes records `LENGTH KEY=VALUE\n`, the length being that of all of it.
    fn take(&mut self, mut records: &[u8]) -> io::Result<()> {
        while !records.is_empty() {
            let (key, value, rest) = first(records).ok_or_else(|| damaged("records that are none"))?;
            records = rest;
            // An empty value takes back what was said before, also of all. Not so where it is one: of an attribute, or of the
            // map of a file that is all hole.
            let said = (!value.is_empty()).then_some(value);
            let text = || said.map(<[u8]>::to_vec);
            match key {
                key if key.starts_with(XATTR) => {
                    self.xattrs.insert(key[XATTR.len()..].to_vec(), value.to_vec());
                }
                b"path" => self.name = text(),
                b"linkpath" => self.link = text(),
                b"size" => self.size = said.map(number).transpose()?,
                b"uid" => self.uid = said.map(number).transpose()?,
                b"gid" => self.gid = said.map(number).transpose()?,
                b"mtime" => self.modified = said.and_then(|value| time(std::str::from_utf8(value).ok()?)),
                b"GNU.sparse.major" => {
                    self.sparse_in_content = match said.map(number).transpose()? {
                        None | Some(0) => false,
                        Some(1) => true,
                        Some(_) => return Err(damaged("a sparse file of an unknown version")),
                    }
                }
                b"GNU.sparse.name" => self.sparse_name = text(),
                b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                    self.sparse_size = said.map(number).transpose()?;
                }
                b"GNU.sparse.offset" => self.sparse_offset = Some(number(value)?),
                b"GNU.sparse.numbytes" => {
                    let offset = self.sparse_offset.take();
                    let offset = offset.ok_or_else(|| damaged("a part of a sparse file without a place"))?;
                    self.sparse_map.get_or_insert_default().push((offset, number(value)?));
                }
                b"GNU.sparse.map" => {
                    let numbers = said.into_iter().flat_map(|value| value.split(|byte| *byte == b','));
                    let numbers: io::Result<Vec<u64>> = numbers.map(number).collect();
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

/// What was read of a header's field; a blank one is 0.
fn field<T: Default>(bytes: &[u8], read: io::Result<T>) -> io::Result<T> {
    if bytes.iter().all(|byte| matches!(byte, b' ' | 0)) { Ok(T::default()) } else { read }
}

/// Whether a header has its right sum, in which the sum's own field counts as spaces. Some historic tars summed signed bytes.
fn is_summed(block: &[u8; BLOCK as usize]) -> io::Result<bool> {
    let stored = i64::from(Header::from_byte_slice(block).cksum()?);
    let sum = |value: fn(u8) -> i64| {
        let others = block[..148].iter().chain(&block[156..]);
        others.map(|byte| value(*byte)).sum::<i64>() + 8 * i64::from(b' ')
    };
    Ok(stored == sum(i64::from) || stored == sum(|byte| i64::from(byte.cast_signed())))
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
mod tests;
