//! Reads a tar stream entry by entry: ustar, GNU and PAX, with extended attributes and sparse files.
//!
//! The crate `tar` is not used because it splits PAX records at newlines, which damages binary attributes, knows no PAX
//! sparse file, expands GNU sparse holes into zeros, and takes a stream cut between two entries for a whole one.

use std::{
    collections::BTreeMap,
    io::{self, Read},
};

use super::header::{BLOCK, Header, gnu_sparse_continued, pax_records, pax_time};
use crate::ImageError;

/// The longest header of names or PAX records that is read, in bytes; real ones stay below some 100 KiB.
const META_MAX: u64 = 8 << 20;
/// Segments of a sparse file: as many as a GNU sparse header of that length has.
const SEGMENTS_MAX: usize = (META_MAX / 24) as usize;
/// What PAX headers may say of one entry: extended attributes, and bytes of them and of names. More than an image keeps,
/// which refuses the rest by name, and little enough to hold.
const XATTRS_MAX: usize = 1000;
const PAX_MAX: usize = 1 << 20;
/// The same of all entries to come; each gets a copy. Real ones hold a comment or a time.
const GLOBAL_MAX: usize = 64 << 10;
/// The largest file in an image, in bytes. Beyond it a header is a mistake or an attack.
const FILE_MAX: u64 = 1 << 40;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink(Vec<u8>),
    Hardlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// One entry without its content.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the Unix epoch, and nanoseconds.
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Full size of a file, holes counted.
    pub(crate) size: u64,
    /// Where the stored bytes belong, as offsets and lengths; one segment for a file without holes.
    pub(crate) segments: Vec<(u64, u64)>,
}

/// A tar stream. After each entry its content must be read with [`Archive::read_content`] or it is skipped.
pub(crate) struct Archive<R> {
    input: R,
    /// Unread content of the current entry.
    left: u64,
    /// Blanks that fill up its last block.
    padding: u64,
    global: Pax,
    /// Whether the archive may end between two entries, without an end mark.
    open_end: bool,
    last: String,
}

#[derive(Debug, Clone, Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    sparse_version: (u32, u32),
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse_map: Option<Vec<(u64, u64)>>,
    sparse_offset: Option<u64>,
}

impl Pax {
    /// Bytes that it takes.
    fn weight(&self) -> usize {
        let names = [&self.path, &self.link, &self.sparse_name].into_iter().flatten().map(Vec::len);
        let xattrs = self.xattrs.iter().map(|(name, value)| name.len() + value.len());
        let map = self.sparse_map.as_ref().map_or(0, |map| size_of_val(map.as_slice()));
        names.chain(xattrs).sum::<usize>() + map
    }
}

impl<R: Read> Archive<R> {
    /// With `open_end` the input's end between two entries is the archive's, too: for one that a digest tells to be whole.
    pub(crate) fn new(input: R, open_end: bool) -> Self {
        Self { input, left: 0, padding: 0, global: Pax::default(), open_end, last: String::new() }
    }

    /// The next entry; `None` at the archive's end mark.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, ImageError> {
        self.skip(self.left + self.padding)?;
        (self.left, self.padding) = (0, 0);
        let mut pax = self.global.clone();
        let (mut long_path, mut long_link) = (None, None);
        // Whether a header says something of the next one.
        let mut begun = false;
        loop {
            let mut block = [0; BLOCK];
            if self.open_end && !begun {
                if !self.fill_or_end(&mut block)? {
                    return Ok(None);
                }
            } else {
                self.fill(&mut block)?;
            }
            if block == [0; BLOCK] {
                // One empty block is an end mark too (GNU tar warns of it only), but there must be one.
                return Ok(None);
            }
            let header = Header::parse(&block).map_err(|reason| self.corrupt(reason))?;
            let size = header.size().and_then(|n| u64::try_from(n).ok());
            let size = size.ok_or_else(|| self.corrupt("a size is no number"))?;
            begun |= matches!(header.kind(), b'x' | b'X' | b'L' | b'K');
            match header.kind() {
                b'x' | b'X' => {
                    let data = self.meta(size)?;
                    self.apply_pax(&mut pax, &data)?;
                    let names = pax.weight() - pax.sparse_map.as_deref().map_or(0, size_of_val);
                    if names > PAX_MAX {
                        return Err(self.corrupt("too many extended attributes, or too long names"));
                    }
                }
                b'g' => {
                    let data = self.meta(size)?;
                    let mut global = std::mem::take(&mut self.global);
                    self.apply_pax(&mut global, &data)?;
                    if global.weight() > GLOBAL_MAX {
                        return Err(self.corrupt("a header of all entries is longer than any real one"));
                    }
                    pax = global.clone();
                    self.global = global;
                }
                b'L' => long_path = Some(until_nul(self.meta(size)?)),
                b'K' => long_link = Some(until_nul(self.meta(size)?)),
                // A volume's label is no file.
                b'V' => drop(self.meta(size)?),
                _ => return self.entry(&header, pax, long_path, long_link).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header<'_>,
        pax: Pax,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, ImageError> {
        let stored_path = pax.path.or(long_path).unwrap_or_else(|| header.path());
        let path = pax.sparse_name.unwrap_or(stored_path);
        self.last = String::from_utf8_lossy(&path).into_owned();
        let number = |value: Option<i64>, what: &str| {
            value
                .and_then(|n| u32::try_from(n).ok())
                .ok_or_else(|| self.corrupt(format!("{what} is out of range")))
        };
        let link = || pax.link.or(long_link).unwrap_or_else(|| header.link());
        let device = || {
            let (major, minor) = header.device().unwrap_or((-1, -1));
            Ok::<_, ImageError>((number(Some(major), "a device")?, number(Some(minor), "a device")?))
        };
        let kind = match header.kind() {
            b'0' | b'\0' | b'7' if path.ends_with(b"/") => Kind::Directory,
            b'0' | b'\0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::Hardlink(link()),
            b'2' => Kind::Symlink(link()),
            b'3' => device().map(|(major, minor)| Kind::CharDevice(major, minor))?,
            b'4' => device().map(|(major, minor)| Kind::BlockDevice(major, minor))?,
            b'5' | b'D' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(ImageError::RefusedEntry {
                    path: self.last.clone(),
                    reason: format!("has the unknown type {:?}", char::from(other)),
                });
            }
        };
        let mode = number(header.mode(), "a mode")? & 0o7777;
        let id = |told: Option<u32>, field, what| match told.map_or_else(|| number(field, what), Ok)? {
            // The kernel's number for none: chown(2) takes it as "leave it", and an inode that has it is nobody's to write.
            u32::MAX => Err(ImageError::RefusedEntry {
                path: self.last.clone(),
                reason: format!("has {what} that there cannot be, {}", u32::MAX),
            }),
            id => Ok(id),
        };
        let uid = id(pax.uid, header.uid(), "an owner")?;
        let gid = id(pax.gid, header.gid(), "a group")?;
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => (header.mtime().ok_or_else(|| self.corrupt("a time is no number"))?, 0),
        };
        let stored = pax.size.or(header.size().and_then(|n| n.try_into().ok())).unwrap_or(0);
        // POSIX gives content to hard links in PAX archives; whatever the type, its stored bytes must be passed over.
        self.left = match header.kind() {
            b'2'..=b'6' => 0,
            b'1' if pax.size.is_none() => 0,
            _ => stored,
        };
        self.padding = self.left.next_multiple_of(BLOCK as u64) - self.left;

        let (size, segments) = if kind != Kind::File {
            (0, Vec::new())
        } else if header.kind() == b'S' {
            let (mut segments, mut more, size) =
                header.gnu_sparse().ok_or_else(|| self.corrupt("a sparse map is no map"))?;
            while more {
                let mut block = [0; BLOCK];
                self.fill(&mut block)?;
                let (next, again) =
                    gnu_sparse_continued(&block).ok_or_else(|| self.corrupt("a sparse map is no map"))?;
                segments.extend(next);
                more = again;
                if segments.len() > SEGMENTS_MAX {
                    return Err(self.corrupt("a sparse map has no end"));
                }
            }
            (pax.sparse_size.unwrap_or(size), segments)
        } else if pax.sparse_version.0 == 0 && pax.sparse_map.is_none() {
            (stored, vec![(0, stored)])
        } else {
            let size = pax.sparse_size.ok_or_else(|| self.corrupt("a sparse file has no size"))?;
            let segments = match (pax.sparse_version, pax.sparse_map) {
                ((0, _), Some(map)) => map,
                ((1, 0), _) => self.sparse_map_in_content()?,
                _ => return Err(self.corrupt("a sparse file is of an unknown version")),
            };
            (size, segments)
        };
        if size > FILE_MAX {
            return Err(ImageError::RefusedEntry {
                path: self.last.clone(),
                reason: format!("has {size} bytes; a file in an image has 1 TiB at most"),
            });
        }
        self.check_segments(&kind, size, &segments)?;
        Ok(Entry {
            path,
            kind,
            mode,
            uid,
            gid,
            mtime,
            xattrs: pax.xattrs.into_iter().collect(),
            size,
            segments,
        })
    }

    /// Segments are in order, inside the file, and make up exactly what is stored.
    fn check_segments(&self, kind: &Kind, size: u64, segments: &[(u64, u64)]) -> Result<(), ImageError> {
        if *kind != Kind::File {
            return Ok(());
        }
        let (mut end, mut total) = (0u64, 0u64);
        for &(offset, length) in segments {
            let fits = offset >= end && offset.checked_add(length).is_some_and(|e| e <= size);
            if !fits {
                return Err(self.corrupt("a sparse map does not fit its file"));
            }
            end = offset + length;
            total += length;
        }
        if total == self.left { Ok(()) } else { Err(self.corrupt("a sparse map does not fit its content")) }
    }

    /// PAX sparse format 1.0: the map stands before the content, as decimal numbers, one a line (their count of pairs
    /// first), filled up to whole blocks.
    fn sparse_map_in_content(&mut self) -> Result<Vec<(u64, u64)>, ImageError> {
        let mut numbers = Vec::new();
        let mut wanted = 1;
        let mut digits = String::new();
        let mut read = 0;
        while numbers.len() < wanted {
            if self.left < BLOCK as u64 || read > META_MAX {
                return Err(self.corrupt("a sparse map has no end"));
            }
            let mut block = [0; BLOCK];
            self.fill(&mut block)?;
            self.left -= BLOCK as u64;
            read += BLOCK as u64;
            for &byte in &block {
                match byte {
                    b'0'..=b'9' if digits.len() < 20 => digits.push(char::from(byte)),
                    b'\n' => {
                        let number: u64 =
                            digits.parse().map_err(|_| self.corrupt("a sparse map is no map"))?;
                        digits.clear();
                        if numbers.is_empty() {
                            wanted = usize::try_from(number)
                                .ok()
                                .filter(|&n| n <= SEGMENTS_MAX)
                                .map(|pairs| 1 + 2 * pairs)
                                .ok_or_else(|| self.corrupt("a sparse map is too long"))?;
                        }
                        numbers.push(number);
                        if numbers.len() == wanted {
                            break;
                        }
                    }
                    _ => return Err(self.corrupt("a sparse map is no map")),
                }
            }
        }
        Ok(numbers[1..].chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }

    fn apply_pax(&self, pax: &mut Pax, data: &[u8]) -> Result<(), ImageError> {
        let records = pax_records(data).ok_or_else(|| self.corrupt("a PAX header is no list of records"))?;
        for (key, value) in records {
            let invalid =
                || self.corrupt(format!("PAX record {:?} is invalid", String::from_utf8_lossy(key)));
            let number =
                || std::str::from_utf8(value).ok().and_then(|v| v.parse::<u64>().ok()).ok_or_else(invalid);
            let small = || number().and_then(|n| u32::try_from(n).map_err(|_| invalid()));
            // An empty value takes back what was said before, also of all entries. Not so where it is one: of an attribute,
            // or of the map of a file that is all hole.
            let said = !value.is_empty();
            let text = || said.then(|| value.to_vec());
            match key {
                b"path" => pax.path = text(),
                b"linkpath" => pax.link = text(),
                b"size" => pax.size = said.then(number).transpose()?,
                b"uid" => pax.uid = said.then(small).transpose()?,
                b"gid" => pax.gid = said.then(small).transpose()?,
                b"mtime" => pax.mtime = said.then(|| pax_time(value).ok_or_else(invalid)).transpose()?,
                b"GNU.sparse.major" => pax.sparse_version.0 = said.then(small).transpose()?.unwrap_or(0),
                b"GNU.sparse.minor" => pax.sparse_version.1 = said.then(small).transpose()?.unwrap_or(0),
                b"GNU.sparse.name" => pax.sparse_name = text(),
                b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                    pax.sparse_size = said.then(number).transpose()?;
                }
                b"GNU.sparse.offset" => pax.sparse_offset = Some(number()?),
                b"GNU.sparse.numbytes" => {
                    let offset = pax.sparse_offset.take().ok_or_else(invalid)?;
                    let map = pax.sparse_map.get_or_insert_default();
                    if map.len() >= SEGMENTS_MAX {
                        return Err(self.corrupt("a sparse map is too long"));
                    }
                    map.push((offset, number()?));
                }
                b"GNU.sparse.map" => {
                    let text = std::str::from_utf8(value).map_err(|_| invalid())?;
                    let numbers: Result<Vec<u64>, _> =
                        text.split(',').filter(|n| !n.is_empty()).map(str::parse).collect();
                    let numbers = numbers.map_err(|_| invalid())?;
                    if numbers.len() / 2 > SEGMENTS_MAX {
                        return Err(self.corrupt("a sparse map is too long"));
                    }
                    pax.sparse_map = Some(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect());
                }
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        pax.xattrs.insert(name.to_vec(), value.to_vec());
                        if pax.xattrs.len() > XATTRS_MAX {
                            return Err(self.corrupt("too many extended attributes"));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads some of the current entry's content; 0 at its end.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, ImageError> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.fill_slice(&mut buffer[..most])?;
        self.left -= most as u64;
        Ok(most)
    }

    /// Reads whatever follows the end mark (more blanks, as a rule), so that it is part of the digest.
    pub(crate) fn drain(&mut self) -> Result<(), ImageError> {
        io::copy(&mut self.input, &mut io::sink()).map(drop).map_err(|error| self.failed(error))
    }

    /// Gives the stream back.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }

    fn meta(&mut self, size: u64) -> Result<Vec<u8>, ImageError> {
        if size > META_MAX {
            return Err(self.corrupt("a header is longer than any real one"));
        }
        let mut data = vec![0; size as usize];
        self.fill_slice(&mut data)?;
        self.skip(size.next_multiple_of(BLOCK as u64) - size)?;
        Ok(data)
    }

    fn fill(&mut self, block: &mut [u8; BLOCK]) -> Result<(), ImageError> {
        self.fill_slice(block)
    }

    /// The same, unless the input ends before it: then false.
    fn fill_or_end(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, ImageError> {
        let count = loop {
            match self.input.read(block) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other.map_err(|error| self.failed(error))?,
            }
        };
        if count > 0 {
            self.fill_slice(&mut block[count..])?;
        }
        Ok(count > 0)
    }

    fn fill_slice(&mut self, buffer: &mut [u8]) -> Result<(), ImageError> {
        self.input.read_exact(buffer).map_err(|error| self.failed(error))
    }

    fn skip(&mut self, bytes: u64) -> Result<(), ImageError> {
        match io::copy(&mut (&mut self.input).take(bytes), &mut io::sink()) {
            Ok(skipped) if skipped == bytes => Ok(()),
            Ok(_) => Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn failed(&self, error: io::Error) -> ImageError {
        match error.kind() {
            io::ErrorKind::ConnectionAborted => ImageError::Cancelled,
            io::ErrorKind::UnexpectedEof => ImageError::TruncatedArchive { last: self.last.clone() },
            io::ErrorKind::QuotaExceeded => ImageError::RefusedEntry {
                path: self.last.clone(),
                reason: "is in an archive that unpacks to more than 16 GiB and more than 200 times its size"
                    .into(),
            },
            _ if needs_memory(&error) => self.corrupt("to decompress it takes more than 256 MiB of memory"),
            // The decompressors' own errors carry no errno.
            _ if error.raw_os_error().is_none() => self.corrupt(error.to_string()),
            _ => ImageError::ReadArchive { source: error },
        }
    }

    fn corrupt(&self, reason: impl Into<String>) -> ImageError {
        ImageError::CorruptArchive { last: self.last.clone(), reason: reason.into() }
    }
}

/// Whether xz asks for more than it may have.
fn needs_memory(error: &io::Error) -> bool {
    use liblzma::stream::Error;
    error
        .get_ref()
        .and_then(|inner| inner.downcast_ref())
        .is_some_and(|inner| matches!(inner, Error::MemLimit))
}

fn until_nul(mut data: Vec<u8>) -> Vec<u8> {
    if let Some(end) = data.iter().position(|&b| b == 0) {
        data.truncate(end);
    }
    data
}

#[cfg(test)]
mod tests;
