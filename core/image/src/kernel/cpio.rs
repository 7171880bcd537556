//! Writes cpio archives of the form "newc", as the kernel unpacks them.
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
