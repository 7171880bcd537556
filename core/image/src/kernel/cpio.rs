//! Writes cpio archives of the form "newc", as the kernel unpacks them, and reads what was written.
//!
//! Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. Headers are 13 hexadecimal fields after
//! a magic number; name and content are filled up to multiples of 4.

use std::io::Write;

/// An archive in the making. Everything belongs to root and is of time 0, so that the same content gives the same bytes.
#[derive(Debug, Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
    inodes: u32,
}

const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const FILE: u32 = 0o100_000;

impl Writer {
    pub(super) fn directory(&mut self, name: &str, mode: u32) {
        self.entry(name, DIRECTORY | mode, 2, (0, 0), &[]);
    }

    pub(super) fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, FILE | mode, 1, (0, 0), content);
    }

    pub(super) fn character_device(&mut self, name: &str, mode: u32, device: (u32, u32)) {
        self.entry(name, CHARACTER_DEVICE | mode, 1, device, &[]);
    }

    /// Ends the archive; its length is a multiple of 4.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.inodes = 0;
        self.entry("TRAILER!!!", 0, 1, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, links: u32, device: (u32, u32), content: &[u8]) {
        let inode = self.inodes;
        self.inodes += 1;
        let size = content.len() as u32;
        let name_size = name.len() as u32 + 1;
        // ino mode uid gid nlink mtime filesize dev rdev namesize check
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            // Writing to a Vec cannot fail.
            let _ = write!(self.bytes, "{field:08X}");
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The files of an archive, by name; `None` for what is no archive of this form.
pub(super) fn files(archive: &[u8]) -> Option<Vec<(&str, &[u8])>> {
    const HEADER: usize = 110;
    let (mut files, mut at) = (Vec::new(), 0_usize);
    loop {
        let header = archive.get(at..at.checked_add(HEADER)?)?;
        let field = |index: usize| {
            let digits = std::str::from_utf8(header.get(6 + 8 * index..14 + 8 * index)?).ok()?;
            u32::from_str_radix(digits, 16).ok()
        };
        if !header.starts_with(b"070701") {
            return None;
        }
        let name_end = (at + HEADER).checked_add(field(11)? as usize)?;
        let name = archive.get(at + HEADER..name_end)?.strip_suffix(b"\0")?;
        let start = name_end.checked_next_multiple_of(4)?;
        let end = start.checked_add(field(6)? as usize)?;
        let content = archive.get(start..end)?;
        match std::str::from_utf8(name).ok()? {
            "TRAILER!!!" => return Some(files),
            name if field(1)? & 0o170_000 == FILE => files.push((name, content)),
            _ => {}
        }
        at = end.checked_next_multiple_of(4)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_is_damaged_is_not() {
        let mut writer = Writer::default();
        writer.directory("d", 0o755);
        writer.file("d/one", 0o644, b"1");
        writer.file("d/empty", 0o600, b"");
        let archive = writer.finish();
        assert_eq!(files(&archive), Some(vec![("d/one", &b"1"[..]), ("d/empty", b"")]));
        for cut in 0..archive.len() - 4 {
            assert_eq!(files(&archive[..cut]), None, "{cut}");
        }
        assert_eq!(files(&[b'0'; 200]), None);
    }
}
