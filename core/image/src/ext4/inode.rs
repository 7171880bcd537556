//! One inode ("Index Nodes").

use super::{
    crc32c,
    geometry::{BLOCK, INODE_SIZE},
    put16, put32,
    xattr::IN_INODE,
};

/// `i_flags`: the blocks are given by extents.
pub(super) const EXTENTS: u32 = 0x8_0000;
/// `i_flags`: an indexed directory.
pub(super) const INDEX: u32 = 0x1000;
/// Bytes of fields behind the first 128.
pub(super) const EXTRA: u16 = 32;

/// What an inode holds.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    /// Type and permissions.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) mtime: (i64, u32),
    pub(super) links: u16,
    /// Filesystem blocks it takes, those of its tree and attributes counted.
    pub(super) blocks: u64,
    pub(super) flags: u32,
    /// Root of an extent tree, a short link's target, a device's number.
    pub(super) block: [u8; 60],
    pub(super) attribute_block: u32,
    pub(super) attributes: Option<[u8; IN_INODE]>,
}

impl Default for Inode {
    fn default() -> Self {
        Self {
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: (0, 0),
            links: 1,
            blocks: 0,
            flags: 0,
            block: [0; 60],
            attribute_block: 0,
            attributes: None,
        }
    }
}

/// The seed of all check sums of an inode's own; no inode here has a generation but 0.
pub(super) fn seed(fs_seed: u32, number: u32) -> u32 {
    crc32c(crc32c(fs_seed, &number.to_le_bytes()), &[0; 4])
}

impl Inode {
    /// All four times are that of the last change of the content: the others are of the host that unpacked.
    pub(super) fn encode(&self, number: u32, fs_seed: u32) -> [u8; INODE_SIZE as usize] {
        let mut raw = [0; INODE_SIZE as usize];
        let seconds = self.mtime.0 as u32;
        let extra = extra(self.mtime);
        let sectors = self.blocks * (BLOCK / 512);
        put16(&mut raw, 0x00, self.mode);
        put16(&mut raw, 0x02, self.uid as u16);
        put32(&mut raw, 0x04, self.size as u32);
        for at in [0x08, 0x0c, 0x10, 0x90] {
            put32(&mut raw, at, seconds);
        }
        for at in [0x84, 0x88, 0x8c, 0x94] {
            put32(&mut raw, at, extra);
        }
        put16(&mut raw, 0x18, self.gid as u16);
        put16(&mut raw, 0x1a, self.links);
        put32(&mut raw, 0x1c, sectors as u32);
        put32(&mut raw, 0x20, self.flags);
        raw[0x28..0x64].copy_from_slice(&self.block);
        put32(&mut raw, 0x68, self.attribute_block);
        put32(&mut raw, 0x6c, (self.size >> 32) as u32);
        put16(&mut raw, 0x74, (sectors >> 32) as u16);
        put16(&mut raw, 0x78, (self.uid >> 16) as u16);
        put16(&mut raw, 0x7a, (self.gid >> 16) as u16);
        put16(&mut raw, 0x80, EXTRA);
        if let Some(attributes) = &self.attributes {
            raw[128 + usize::from(EXTRA)..].copy_from_slice(attributes);
        }
        let sum = crc32c(seed(fs_seed, number), &raw);
        put16(&mut raw, 0x7c, sum as u16);
        put16(&mut raw, 0x82, (sum >> 16) as u16);
        raw
    }
}

/// A time's second word: nanoseconds above two bits of epoch ("Inode Timestamps").
fn extra((seconds, nanos): (i64, u32)) -> u32 {
    let low = i64::from(seconds as i32);
    let epoch = ((seconds - low) >> 32) as u32 & 3;
    (nanos << 2) | epoch
}

/// A device's number in `i_block`: the old form where it is enough, else the new one in the second word
/// (include/linux/kdev_t.h).
pub(super) fn device(major: u32, minor: u32) -> [u8; 60] {
    let mut block = [0; 60];
    if major < 256 && minor < 256 {
        put32(&mut block, 0, major << 8 | minor);
    } else {
        put32(&mut block, 4, (minor & 0xff) | major << 8 | (minor & !0xff) << 12);
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_split_as_ext4_does() {
        assert_eq!(extra((0, 0)), 0);
        assert_eq!(extra((-1, 5)), 5 << 2);
        assert_eq!(extra((i64::from(i32::MAX) + 1, 0)), 1);
        assert_eq!(extra((4_102_444_801, 500_000_000)), (500_000_000 << 2) | 1);
    }
}
