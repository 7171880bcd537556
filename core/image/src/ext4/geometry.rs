//! Where things stand in a filesystem, and how big it is.

/// Filesystem block, in bytes.
pub(crate) const BLOCK: u64 = 4096;
/// The largest content of an image, in bytes; block numbers then need 32 bits with room to spare.
pub(crate) const IMAGE_MAX: u64 = 1 << 40;

/// Blocks of a group: as many as one block of bitmap has bits.
pub(super) const GROUP: u32 = 8 * BLOCK as u32;
/// Blocks for group descriptors now and after growth: 64 descriptors of 64 bytes each, for 8 GiB; so the filesystem can
/// be grown online up to 4 TiB, and then further where the kernel knows `meta_bg` growth.
pub(super) const DESCRIPTOR_BLOCKS: u32 = 512;
/// What stands at the begin of each group that has a copy of the superblock.
pub(super) const HEAD: u32 = 1 + DESCRIPTOR_BLOCKS;
pub(super) const INODE_SIZE: u32 = 256;
pub(super) const INODES_PER_BLOCK: u32 = BLOCK as u32 / INODE_SIZE;
pub(super) const JOURNAL_BLOCKS: u32 = (64 << 20) / BLOCK as u32;
/// Inodes below are ext4's own; number 11 is `lost+found`.
pub(super) const FIRST_INODE: u32 = 11;

/// Empty room in the filesystem, beside a tenth of its content. Blocks.
const SLACK: u64 = (64 << 20) / BLOCK;
/// Inodes of each group at least: one for 16 KiB. Growing keeps the ratio, so it is the usual one and not what the
/// content happens to have.
const INODES_MIN: u32 = 8192;
/// One block of bitmap.
const INODES_MAX: u32 = 8 * BLOCK as u32;
/// A last group smaller than this, in blocks, is not worth its bitmaps (and must hold a [`HEAD`]).
const LAST_GROUP_MIN: u32 = 2048;

/// Whether a group has a copy of the superblock: 0, 1 and powers of 3, 5 and 7 (`sparse_super`).
pub(super) fn has_super(group: u32) -> bool {
    let power = |base: u32| {
        let mut left = group;
        while left.is_multiple_of(base) {
            left /= base;
        }
        left == 1
    };
    group <= 1 || power(3) || power(5) || power(7)
}

/// A place to put something next. It passes over the copies of the superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cursor(u32);

impl Cursor {
    pub(super) fn start() -> Self {
        Self(HEAD)
    }

    /// The next free block, and how many lie behind it in one piece, itself counted.
    pub(super) fn run(&mut self) -> (u32, u32) {
        if self.0.is_multiple_of(GROUP) && has_super(self.0 / GROUP) {
            self.0 += HEAD;
        }
        let mut group = self.0 / GROUP + 1;
        while !has_super(group) {
            group += 1;
        }
        (self.0, group * GROUP - self.0)
    }

    pub(super) fn advance(&mut self, blocks: u32) {
        self.0 += blocks;
    }

    /// Takes blocks, in one piece or more, as starts and lengths.
    pub(super) fn take(&mut self, mut blocks: u32) -> Vec<(u32, u32)> {
        let mut runs = Vec::new();
        while blocks > 0 {
            let (start, room) = self.run();
            let length = room.min(blocks);
            runs.push((start, length));
            self.advance(length);
            blocks -= length;
        }
        runs
    }

    /// Takes blocks in one piece; at most those between two copies of the superblock.
    fn piece(&mut self, blocks: u32) -> u32 {
        let (start, room) = self.run();
        if room < blocks {
            self.advance(room);
            return self.piece(blocks);
        }
        self.advance(blocks);
        start
    }

    /// The first block that nobody has.
    pub(super) fn end(self) -> u32 {
        self.0
    }
}

/// What has to be placed behind the contents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Demand {
    /// Blocks of directories, attributes, extent trees and long links.
    pub(super) blocks: u32,
    /// All inodes, ext4's own too.
    pub(super) inodes: u32,
    /// Blocks among the contents that are free again.
    pub(super) dead: u32,
}

/// A filesystem's shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) blocks: u32,
    pub(super) groups: u32,
    pub(super) inodes_per_group: u32,
    /// The block of the inode that keeps the reserve for descriptors.
    pub(super) resize_block: u32,
    pub(super) journal: Vec<(u32, u32)>,
    /// By group.
    pub(super) block_bitmaps: Vec<u32>,
    pub(super) inode_bitmaps: Vec<u32>,
    pub(super) inode_tables: Vec<u32>,
    /// Where what was demanded begins.
    pub(super) rest: Cursor,
    /// Everything from here on is free.
    pub(super) end: u32,
    /// Gaps that came about before a table which had to be in one piece.
    pub(super) gaps: Vec<(u32, u32)>,
}

impl Geometry {
    /// The shape of a filesystem whose contents end at a place. Exact: content, a tenth of it, the slack, and what ext4
    /// needs for that.
    pub(super) fn plan(contents: Cursor, demand: Demand) -> Self {
        let inodes = demand.inodes + demand.inodes / 10 + 1024;
        let mut groups = inodes.div_ceil(INODES_MAX).max(1);
        loop {
            let shape = Self::with_groups(contents, demand, inodes, groups);
            // More groups need more tables, so this ends where the tables of so many fit into as many.
            let wanted = shape.blocks.div_ceil(GROUP);
            if wanted <= groups {
                let least = (groups - 1) * GROUP + LAST_GROUP_MIN;
                return Self { blocks: shape.blocks.max(least), ..shape };
            }
            groups = wanted;
        }
    }

    fn with_groups(contents: Cursor, demand: Demand, inodes: u32, groups: u32) -> Self {
        let per_group = inodes.div_ceil(groups).max(INODES_MIN).next_multiple_of(INODES_PER_BLOCK);
        let table = per_group / INODES_PER_BLOCK;
        let mut at = contents;
        let mut gaps = Vec::new();
        let mut piece = |at: &mut Cursor, blocks: u32| {
            let (free, room) = at.run();
            if room < blocks {
                gaps.push((free, room));
            }
            at.piece(blocks)
        };
        let resize_block = piece(&mut at, 1);
        let journal = at.take(JOURNAL_BLOCKS);
        let block_bitmaps = (0..groups).map(|_| piece(&mut at, 1)).collect();
        let inode_bitmaps = (0..groups).map(|_| piece(&mut at, 1)).collect();
        let inode_tables = (0..groups).map(|_| piece(&mut at, table)).collect();
        let rest = at;
        at.take(demand.blocks);
        let end = at.end();
        let live = u64::from(contents.end().saturating_sub(demand.dead)) + u64::from(demand.blocks);
        let free = (live / 10 + SLACK).saturating_sub(u64::from(demand.dead)) as u32;
        // Copies of the superblock take some of what is free.
        at.take(free);
        let blocks = at.end().next_multiple_of((1 << 20) / BLOCK as u32);
        Self {
            blocks,
            groups,
            inodes_per_group: per_group,
            resize_block,
            journal,
            block_bitmaps,
            inode_bitmaps,
            inode_tables,
            rest,
            end,
            gaps,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_the_superblock_are_where_ext4_has_them() {
        let with: Vec<u32> = (0..130).filter(|&group| has_super(group)).collect();
        assert_eq!(with, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn nothing_stands_where_a_copy_does() {
        let mut at = Cursor::start();
        for (start, length) in at.take(30 * GROUP) {
            for block in start..start + length {
                assert!(!has_super(block / GROUP) || block % GROUP >= HEAD, "{block}");
            }
        }
        let heads = (0..=at.end() / GROUP).filter(|&group| has_super(group)).count() as u32;
        assert_eq!(at.end(), 30 * GROUP + heads * HEAD);
    }

    #[test]
    fn plans_stay_near_their_content() {
        let mib = u64::from((1u32 << 20) / BLOCK as u32);
        let tiny = Geometry::plan(Cursor::start(), Demand { inodes: 12, ..Demand::default() });
        assert!(u64::from(tiny.blocks) < 144 * mib, "{tiny:?}");
        let mut gib = Cursor::start();
        gib.take((1 << 30) / BLOCK as u32);
        let planned = Geometry::plan(gib, Demand { blocks: 2000, inodes: 30_000, dead: 0 });
        let blocks = u64::from(planned.blocks);
        assert!(blocks > (1024 + 64) * mib && blocks < 1024 * mib * 13 / 10 + 160 * mib, "{planned:?}");
        assert!(u64::from(planned.blocks - planned.end) > 166 * mib, "{planned:?}");
    }

    #[test]
    fn every_size_has_room_for_its_tables() {
        for inodes in [12, 8000, 100_000, 1_000_000, 3_000_000] {
            for groups in [0, 1, 2, 3, 8, 24, 25, 60] {
                let mut contents = Cursor::start();
                contents.take(groups * GROUP + 77);
                let plan = Geometry::plan(contents, Demand { blocks: 999, inodes, dead: 0 });
                assert_eq!(plan.blocks.div_ceil(GROUP), plan.groups);
                assert!(plan.end < plan.blocks);
                assert!(plan.inodes_per_group <= INODES_MAX);
                assert!(plan.groups * plan.inodes_per_group > inodes + inodes / 10);
                let last = plan.blocks - (plan.groups - 1) * GROUP;
                assert!(last >= LAST_GROUP_MIN, "{last}");
            }
        }
    }
}
