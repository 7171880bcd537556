//! The entries of a tar archive, without their contents. What says more of an entry than its header has room for is bounded, which
//! the `tar` crate does not do: a megabyte of a compressed archive can claim a name of a gigabyte.

use std::{
    fs::File,
    io::{self, BufReader, Read},
};

use tar::{EntryType, Header, PaxExtensions};

/// The longest name, and the most records of an entry, in bytes.
const MORE: u64 = 1 << 20;
const BLOCK: u64 = 512;

/// One of them.
pub(super) struct Entry {
    pub(super) name: Vec<u8>,
    pub(super) kind: EntryType,
    /// Where a link leads.
    pub(super) target: Option<Vec<u8>>,
    /// Of its content, from the archive's beginning.
    pub(super) offset: u64,
    /// Of its content.
    pub(super) size: u64,
}

/// What an archive is read from.
pub(super) trait Source: Read {
    /// Goes on so many bytes further.
    fn pass(&mut self, bytes: u64) -> io::Result<()>;
}

impl Source for BufReader<&File> {
    fn pass(&mut self, bytes: u64) -> io::Result<()> {
        self.seek_relative(i64::try_from(bytes).map_err(io::Error::other)?)
    }
}

impl Source for Box<dyn Read> {
    fn pass(&mut self, bytes: u64) -> io::Result<()> {
        match io::copy(&mut self.take(bytes), &mut io::sink())? {
            read if read == bytes => Ok(()),
            _ => Err(cut()),
        }
    }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it is cut short")
}

/// Reads them one after the other.
pub(super) struct Entries<S> {
    source: S,
    at: u64,
}

impl<S: Source> Entries<S> {
    pub(super) fn new(source: S) -> Self {
        Self { source, at: 0 }
    }

    /// The next one; `None` at the archive's end.
    pub(super) fn next(&mut self) -> io::Result<Option<Entry>> {
        let (mut name, mut target, mut size) = (None, None, None);
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let (kind, length) = (header.entry_type(), header.entry_size()?);
            match kind {
                EntryType::GNULongName => name = Some(self.text(length)?),
                EntryType::GNULongLink => target = Some(self.text(length)?),
                EntryType::XHeader => {
                    let records = self.bytes(length)?;
                    for record in PaxExtensions::new(&records) {
                        let record = record?;
                        let value = record.value_bytes();
                        match record.key_bytes() {
                            b"path" => name = Some(value.to_vec()),
                            b"linkpath" => target = Some(value.to_vec()),
                            b"size" => {
                                let digits =
                                    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                                size = Some(digits.ok_or_else(|| io::Error::other("a size is no number"))?);
                            }
                            _ => {}
                        }
                    }
                }
                EntryType::XGlobalHeader => drop(self.bytes(length)?),
                _ => {
                    let size = size.unwrap_or(length);
                    let offset = self.at;
                    self.pass(size)?;
                    return Ok(Some(Entry {
                        name: name.unwrap_or_else(|| header.path_bytes().into_owned()),
                        kind,
                        target: target.or_else(|| header.link_name_bytes().map(|name| name.into_owned())),
                        offset,
                        size,
                    }));
                }
            }
        }
    }

    /// `None` at the archive's end: blocks of zeros, or nothing.
    fn header(&mut self) -> io::Result<Option<Header>> {
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < block.len() {
            match self.source.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(cut()),
                n => filled += n,
            }
        }
        self.at += BLOCK;
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let sum: u32 = block[..148].iter().chain(&block[156..]).map(|&byte| u32::from(byte)).sum();
        match header.cksum()? == sum + 8 * u32::from(b' ') {
            true => Ok(Some(header)),
            false => Err(io::Error::other("an entry's checksum is wrong")),
        }
    }

    fn text(&mut self, length: u64) -> io::Result<Vec<u8>> {
        let mut text = self.bytes(length)?;
        text.truncate(text.iter().position(|&byte| byte == 0).unwrap_or(text.len()));
        Ok(text)
    }

    fn bytes(&mut self, length: u64) -> io::Result<Vec<u8>> {
        if length > MORE {
            return Err(io::Error::other(format!(
                "it says {length} bytes about one entry; {MORE} are possible"
            )));
        }
        let mut bytes = Vec::new();
        (&mut self.source).take(length).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != length {
            return Err(cut());
        }
        self.at += length;
        let rest = length.next_multiple_of(BLOCK) - length;
        self.source.pass(rest)?;
        self.at += rest;
        Ok(bytes)
    }

    fn pass(&mut self, size: u64) -> io::Result<()> {
        let whole =
            size.checked_next_multiple_of(BLOCK).ok_or_else(|| io::Error::other("a size is too large"))?;
        self.source.pass(whole)?;
        self.at = self.at.checked_add(whole).ok_or_else(|| io::Error::other("a size is too large"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(archive: Vec<u8>) -> io::Result<Vec<(String, u64, u64)>> {
        let mut entries = Entries::new(Box::new(io::Cursor::new(archive)) as Box<dyn Read>);
        let mut found = Vec::new();
        while let Some(entry) = entries.next()? {
            found.push((String::from_utf8_lossy(&entry.name).into_owned(), entry.offset, entry.size));
        }
        Ok(found)
    }

    #[test]
    fn long_names_and_records_are_understood() {
        let long = "d/".repeat(90) + "f";
        let mut builder = tar::Builder::new(Vec::new());
        let header = |size| {
            let mut header = Header::new_gnu();
            header.set_size(size);
            header.set_mode(0o644);
            header
        };
        builder.append_data(&mut header(3), "a", &b"abc"[..]).unwrap();
        builder.append_data(&mut header(600), &long, &[7; 600][..]).unwrap();
        builder.append_pax_extensions([("path", &b"named"[..]), ("mtime", b"1.5")]).unwrap();
        builder.append_data(&mut header(0), "x", io::empty()).unwrap();
        let found = all(builder.into_inner().unwrap()).unwrap();
        assert_eq!(found[0], ("a".to_owned(), 512, 3));
        assert_eq!((&found[1].0, found[1].2), (&long, 600));
        assert_eq!((found[2].0.as_str(), found.len()), ("named", 3));
    }

    #[test]
    fn what_claims_too_much_or_is_damaged_is_refused() {
        for kind in [EntryType::GNULongName, EntryType::XHeader, EntryType::XGlobalHeader] {
            let mut header = Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(1 << 40);
            header.set_cksum();
            let error = all(header.as_bytes().to_vec()).unwrap_err();
            assert!(error.to_string().contains("about one entry"), "{error}");
            header.set_size(5);
            assert!(all(header.as_bytes().to_vec()).unwrap_err().to_string().contains("checksum"));
        }
        let mut header = Header::new_gnu();
        header.set_size(5);
        header.set_cksum();
        assert!(all(header.as_bytes().to_vec()).unwrap_err().to_string().contains("cut short"));
        assert_eq!(all(Vec::new()).unwrap(), []);
    }
}
