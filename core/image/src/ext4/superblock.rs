//! The superblock, group descriptors and the journal's superblock ("Super Block", "Block Group Descriptors", "Journal").

use super::{
    crc32c,
    finish::Identity,
    geometry::{BLOCK, DESCRIPTOR_BLOCKS, FIRST_INODE, GROUP, Geometry, INODE_SIZE, JOURNAL_BLOCKS},
    inode::EXTRA,
    put16, put32,
};

/// Label of every root filesystem.
pub const LABEL: &str = "vm-root";

pub(super) const DESCRIPTOR: usize = 64;
pub(super) const DESCRIPTORS_PER_BLOCK: u32 = BLOCK as u32 / DESCRIPTOR as u32;
pub(super) const RESIZE_INODE: u32 = 7;
pub(super) const JOURNAL_INODE: u32 = 8;
/// `bg_flags`: the inode bitmap is not written.
pub(super) const INODE_UNINIT: u16 = 1;
/// `bg_flags`: what was never written in the inode table is zeros.
pub(super) const INODE_ZEROED: u16 = 4;

/// has_journal, ext_attr, resize_inode, dir_index. Every kernel since 4.5 knows all of these.
const COMPATIBLE: u32 = 0x4 | 0x8 | 0x10 | 0x20;
/// filetype, extents, 64bit, flex_bg.
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x80 | 0x200;
/// sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum.
const READ_ONLY: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;
/// 16 groups: what growing puts together.
const LOG_GROUPS_PER_FLEX: u8 = 4;
/// Inode tables need no zeroing, now or after growing: the file's unwritten parts are zeros, and each VM would write
/// them to its own disk.
const MOUNT_OPTIONS: &[u8] = b"noinit_itable";

/// Descriptors and their reserve behind it are not counted in.
pub(super) fn reserved_descriptor_blocks(groups: u32) -> u32 {
    DESCRIPTOR_BLOCKS - groups.div_ceil(DESCRIPTORS_PER_BLOCK)
}

/// A superblock for copying into groups.
pub(super) struct Superblock([u8; 1024]);

impl Superblock {
    pub(super) fn new(
        geometry: &Geometry,
        identity: &Identity,
        free_blocks: u64,
        free_inodes: u32,
        journal: &[u8; 60],
    ) -> Self {
        let mut raw = [0; 1024];
        put32(&mut raw, 0x00, geometry.groups * geometry.inodes_per_group);
        put32(&mut raw, 0x04, geometry.blocks);
        put32(&mut raw, 0x0c, free_blocks as u32);
        put32(&mut raw, 0x10, free_inodes);
        // Blocks of 1 KiB shifted by 2, and clusters of one block.
        put32(&mut raw, 0x18, 2);
        put32(&mut raw, 0x1c, 2);
        put32(&mut raw, 0x20, GROUP);
        put32(&mut raw, 0x24, GROUP);
        put32(&mut raw, 0x28, geometry.inodes_per_group);
        // No check by count of mounts.
        put16(&mut raw, 0x36, u16::MAX);
        put16(&mut raw, 0x38, 0xef53);
        // Clean; on errors remount read-only; Linux; dynamic.
        put16(&mut raw, 0x3a, 1);
        put16(&mut raw, 0x3c, 2);
        put32(&mut raw, 0x4c, 1);
        put32(&mut raw, 0x54, FIRST_INODE);
        put16(&mut raw, 0x58, INODE_SIZE as u16);
        put32(&mut raw, 0x5c, COMPATIBLE);
        put32(&mut raw, 0x60, INCOMPATIBLE);
        put32(&mut raw, 0x64, READ_ONLY);
        raw[0x68..0x78].copy_from_slice(&identity.uuid);
        raw[0x78..0x78 + LABEL.len()].copy_from_slice(LABEL.as_bytes());
        put16(&mut raw, 0xce, reserved_descriptor_blocks(geometry.groups) as u16);
        put32(&mut raw, 0xe0, JOURNAL_INODE);
        raw[0xec..0xfc].copy_from_slice(&identity.hash_seed);
        // Half MD4; a copy of the journal's inode is kept here.
        raw[0xfc] = 1;
        raw[0xfd] = 1;
        put16(&mut raw, 0xfe, DESCRIPTOR as u16);
        // user_xattr, acl.
        put32(&mut raw, 0x100, 0x4 | 0x8);
        raw[0x10c..0x148].copy_from_slice(journal);
        put32(&mut raw, 0x14c, JOURNAL_BLOCKS * BLOCK as u32);
        put16(&mut raw, 0x15c, EXTRA);
        put16(&mut raw, 0x15e, EXTRA);
        // Names are hashed as unsigned bytes, whatever the machine.
        put32(&mut raw, 0x160, 2);
        raw[0x174] = LOG_GROUPS_PER_FLEX;
        // CRC-32C.
        raw[0x175] = 1;
        raw[0x200..0x200 + MOUNT_OPTIONS.len()].copy_from_slice(MOUNT_OPTIONS);
        Self(raw)
    }

    /// The superblock as group `group` has it.
    pub(super) fn for_group(&self, group: u32) -> [u8; 1024] {
        let mut raw = self.0;
        put16(&mut raw, 0x5a, group as u16);
        let sum = crc32c(!0, &raw[..0x3fc]);
        put32(&mut raw, 0x3fc, sum);
        raw
    }
}

/// A group's numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    pub(super) block_bitmap: u32,
    pub(super) inode_bitmap: u32,
    pub(super) inode_table: u32,
    pub(super) free_blocks: u32,
    pub(super) free_inodes: u32,
    pub(super) directories: u32,
    /// Inodes at the table's end that were never used.
    pub(super) unused_inodes: u32,
    pub(super) flags: u16,
    pub(super) block_sum: u32,
    pub(super) inode_sum: u32,
}

impl Group {
    pub(super) fn encode(&self, number: u32, fs_seed: u32) -> [u8; DESCRIPTOR] {
        let mut raw = [0; DESCRIPTOR];
        put32(&mut raw, 0x00, self.block_bitmap);
        put32(&mut raw, 0x04, self.inode_bitmap);
        put32(&mut raw, 0x08, self.inode_table);
        // A group has 32768 of each at most, so the upper halves of counts stay 0.
        put16(&mut raw, 0x0c, self.free_blocks as u16);
        put16(&mut raw, 0x0e, self.free_inodes as u16);
        put16(&mut raw, 0x10, self.directories as u16);
        put16(&mut raw, 0x12, self.flags);
        put16(&mut raw, 0x18, self.block_sum as u16);
        put16(&mut raw, 0x1a, self.inode_sum as u16);
        put16(&mut raw, 0x1c, self.unused_inodes as u16);
        put16(&mut raw, 0x38, (self.block_sum >> 16) as u16);
        put16(&mut raw, 0x3a, (self.inode_sum >> 16) as u16);
        let sum = crc32c(crc32c(fs_seed, &number.to_le_bytes()), &raw);
        put16(&mut raw, 0x1e, sum as u16);
        raw
    }
}

/// The first block of an empty journal, big-endian.
pub(super) fn journal(uuid: &[u8; 16]) -> [u8; 1024] {
    let mut raw = [0; 1024];
    let words = [
        (0x00, 0xc03b_3998),
        // A superblock, version 2.
        (0x04, 4),
        (0x0c, BLOCK as u32),
        (0x10, JOURNAL_BLOCKS),
        // The first block of the log; the first transaction expected there; nothing to replay.
        (0x14, 1),
        (0x18, 1),
        // One filesystem uses it.
        (0x40, 1),
    ];
    for (at, word) in words {
        raw[at..at + 4].copy_from_slice(&u32::to_be_bytes(word));
    }
    raw[0x30..0x40].copy_from_slice(uuid);
    raw
}
