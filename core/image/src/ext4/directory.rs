//! Blocks of directories: one plain block, or a tree by hashes where one is not enough ("Directory Entries", "Hash Tree
//! Directories").

use std::{io, ops::Range};

use super::{crc32c, geometry::BLOCK, hash::half_md4, put16, put32};

const SIZE: usize = BLOCK as usize;
/// The entry at a block's end that holds the check sum.
const TAIL: usize = 12;
const ROOM: usize = SIZE - TAIL;
/// How full the leaves of a tree are made, in bytes, so that a guest's first new files split none.
const FILL: usize = ROOM * 7 / 8;
const DOTS: usize = 12 + 12;
/// Entries of a tree's root and of its other inner nodes: 8 bytes each, 8 at the end for the check sum.
const ROOT_MOST: usize = (SIZE - 32 - 8) / 8;
const NODE_MOST: usize = (SIZE - 8 - 8) / 8;
const TYPE_DIRECTORY: u8 = 2;

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) inode: u32,
    pub(super) kind: u8,
}

impl Entry<'_> {
    fn size(&self) -> usize {
        (8 + self.name.len()).next_multiple_of(4)
    }
}

/// What a directory comes to: the entries in the order they are written in, and how they are cut into blocks.
pub(super) struct Plan<'a> {
    entries: Vec<Entry<'a>>,
    /// Leaves of a tree with the hash each begins with; none for a single block.
    leaves: Vec<(u32, Range<usize>)>,
}

impl<'a> Plan<'a> {
    /// Plans a directory of these entries, "." and ".." not among them. Inode numbers do not matter yet.
    pub(super) fn new(entries: Vec<Entry<'a>>, hash_seed: [u32; 4]) -> Self {
        let bytes: usize = entries.iter().map(Entry::size).sum();
        if DOTS + bytes <= ROOM {
            return Self { entries, leaves: Vec::new() };
        }
        let mut hashed: Vec<(u32, u32, Entry<'a>)> = entries
            .into_iter()
            .map(|entry| {
                let (hash, minor) = half_md4(entry.name, hash_seed);
                (hash, minor, entry)
            })
            .collect();
        hashed.sort_unstable_by(|a, b| (a.0, a.1, a.2.name).cmp(&(b.0, b.1, b.2.name)));
        let mut leaves: Vec<(u32, Range<usize>)> = Vec::new();
        let mut used = usize::MAX;
        for (i, (hash, _, entry)) in hashed.iter().enumerate() {
            match leaves.last_mut() {
                Some((_, leaf)) if used + entry.size() <= FILL => {
                    used += entry.size();
                    leaf.end = i + 1;
                }
                _ => {
                    // The lowest bit says that names of this hash begin in the leaf before.
                    let goes_on = i > 0 && hashed[i - 1].0 == *hash;
                    leaves.push((hash | u32::from(goes_on), i..i + 1));
                    used = entry.size();
                }
            }
        }
        Self { entries: hashed.into_iter().map(|(_, _, entry)| entry).collect(), leaves }
    }

    pub(super) fn is_tree(&self) -> bool {
        !self.leaves.is_empty()
    }

    /// How many blocks it takes.
    pub(super) fn blocks(&self) -> u32 {
        let leaves = self.leaves.len();
        let nodes = if leaves > ROOT_MOST { leaves.div_ceil(NODE_MOST) } else { 0 };
        (1 + leaves + nodes) as u32
    }

    /// Writes the blocks in their order.
    pub(super) fn write(
        &self,
        (own, parent): (u32, u32),
        seed: u32,
        mut put: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut block = vec![0; SIZE];
        let dots = [
            Entry { name: b".", inode: own, kind: TYPE_DIRECTORY },
            Entry { name: b"..", inode: parent, kind: TYPE_DIRECTORY },
        ];
        if !self.is_tree() {
            fill(&mut block, dots.iter().chain(&self.entries), seed);
            return put(&block);
        }
        let leaves = self.leaves.len() as u32;
        let hashes = self.leaves.iter().zip(1..).map(|((hash, _), number)| (*hash, number));
        let index: Vec<(u32, u32)> = hashes.collect();
        let nodes: Vec<&[(u32, u32)]> =
            if index.len() > ROOT_MOST { index.chunks(NODE_MOST).collect() } else { Vec::new() };
        // The root: "." and "..", whose entry hides the rest from those who know no trees.
        entry(&mut block, 0, &dots[0], 12);
        entry(&mut block, 12, &dots[1], SIZE - 12);
        // Half MD4, unsigned or not as the superblock says; information of 8 bytes; levels of inner nodes.
        block[28..32].copy_from_slice(&[1, 8, u8::from(!nodes.is_empty()), 0]);
        let top: Vec<(u32, u32)> = nodes.iter().zip(leaves + 1..).map(|(node, at)| (node[0].0, at)).collect();
        inner(&mut block, 32, ROOT_MOST, if nodes.is_empty() { &index } else { &top }, seed);
        put(&block)?;
        for (_, leaf) in &self.leaves {
            fill(&mut block, self.entries[leaf.clone()].iter(), seed);
            put(&block)?;
        }
        for node in nodes {
            block.fill(0);
            put16(&mut block, 4, SIZE as u16);
            inner(&mut block, 8, NODE_MOST, node, seed);
            put(&block)?;
        }
        Ok(())
    }
}

/// A block without a name in it, as `lost+found` has them for later.
pub(super) fn empty_block(seed: u32) -> Vec<u8> {
    let mut block = vec![0; SIZE];
    put16(&mut block, 4, ROOM as u16);
    tail(&mut block, seed);
    block
}

fn fill<'a>(block: &mut [u8], entries: impl Iterator<Item = &'a Entry<'a>>, seed: u32) {
    block.fill(0);
    let (mut at, mut last) = (0, 0);
    for item in entries {
        entry(block, at, item, item.size());
        (last, at) = (at, at + item.size());
    }
    // The last one reaches to the end.
    put16(block, last + 4, (ROOM - last) as u16);
    tail(block, seed);
}

fn entry(block: &mut [u8], at: usize, entry: &Entry<'_>, reach: usize) {
    put32(block, at, entry.inode);
    put16(block, at + 4, reach as u16);
    block[at + 6] = entry.name.len() as u8;
    block[at + 7] = entry.kind;
    block[at + 8..at + 8 + entry.name.len()].copy_from_slice(entry.name);
}

/// The check sum in the form of an entry for nothing.
fn tail(block: &mut [u8], seed: u32) {
    let sum = crc32c(seed, &block[..ROOM]);
    put16(block, ROOM + 4, TAIL as u16);
    block[ROOM + 7] = 0xde;
    put32(block, ROOM + 8, sum);
}

/// The table of an inner node. Its first entry has no hash, but the counts in that place.
fn inner(block: &mut [u8], at: usize, most: usize, table: &[(u32, u32)], seed: u32) {
    for (i, (hash, number)) in table.iter().enumerate() {
        put32(block, at + 8 * i, *hash);
        put32(block, at + 8 * i + 4, *number);
    }
    put16(block, at, most as u16);
    put16(block, at + 2, table.len() as u16);
    // Over what is used, then over the tail with its sum taken as 0.
    let sum = crc32c(crc32c(seed, &block[..at + 8 * table.len()]), &[0; 8]);
    put32(block, at + 8 * most + 4, sum);
}
