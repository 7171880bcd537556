//! Which blocks of the disk hold a file's blocks ("Extent Tree").

use std::io;

use super::{crc32c, geometry::BLOCK, put16, put32};

/// Extents in an inode.
const IN_INODE: usize = 4;
/// Extents in a block: 12 bytes of header, 12 of each, 4 of check sum.
const IN_BLOCK: usize = 340;
/// Blocks that one extent covers at most.
const LENGTH_MAX: u32 = 32768;

/// Blocks in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// The first one's number in the file.
    pub(crate) logical: u32,
    /// Its number on the disk.
    pub(crate) start: u32,
    pub(crate) length: u32,
}

/// A file's extents, in order. Nearly all files have one, so that one needs no memory of its own.
#[derive(Debug, Default)]
pub(crate) enum Extents {
    #[default]
    None,
    One(Extent),
    Many(Vec<Extent>),
}

impl Extents {
    /// Adds blocks behind the others.
    pub(crate) fn push(&mut self, logical: u32, start: u32, length: u32) {
        let mut next = Extent { logical, start, length };
        if let Some(last) = self.last_mut()
            && last.logical + last.length == logical
            && last.start + last.length == start
        {
            let more = length.min(LENGTH_MAX - last.length);
            last.length += more;
            next = Extent { logical: logical + more, start: start + more, length: length - more };
        }
        while next.length > 0 {
            let length = next.length.min(LENGTH_MAX);
            self.append(Extent { length, ..next });
            next = Extent {
                logical: next.logical + length,
                start: next.start + length,
                length: next.length - length,
            };
        }
    }

    fn append(&mut self, extent: Extent) {
        *self = match std::mem::take(self) {
            Self::None => Self::One(extent),
            Self::One(first) => Self::Many(vec![first, extent]),
            Self::Many(mut all) => {
                all.push(extent);
                Self::Many(all)
            }
        };
    }

    fn last_mut(&mut self) -> Option<&mut Extent> {
        match self {
            Self::None => None,
            Self::One(one) => Some(one),
            Self::Many(all) => all.last_mut(),
        }
    }

    pub(crate) fn as_slice(&self) -> &[Extent] {
        match self {
            Self::None => &[],
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(all) => all,
        }
    }

    /// Blocks on the disk.
    pub(crate) fn blocks(&self) -> u64 {
        self.as_slice().iter().map(|extent| u64::from(extent.length)).sum()
    }
}

/// How many blocks the tree of so many extents takes outside of the inode.
pub(super) fn tree_blocks(extents: usize) -> u32 {
    let (mut level, mut total) = (extents, 0);
    while level > IN_INODE {
        level = level.div_ceil(IN_BLOCK);
        total += level;
    }
    total as u32
}

/// The root of a tree, for an inode. `put` writes a block and answers its number.
pub(super) fn tree(
    extents: &[Extent],
    seed: u32,
    mut put: impl FnMut(&[u8]) -> io::Result<u32>,
) -> io::Result<[u8; 60]> {
    let mut level: Vec<(u32, [u8; 12])> = extents
        .iter()
        .map(|extent| {
            let mut entry = [0; 12];
            put32(&mut entry, 0, extent.logical);
            put16(&mut entry, 4, extent.length as u16);
            put32(&mut entry, 8, extent.start);
            (extent.logical, entry)
        })
        .collect();
    let mut depth = 0;
    while level.len() > IN_INODE {
        let mut above = Vec::with_capacity(level.len().div_ceil(IN_BLOCK));
        for chunk in level.chunks(IN_BLOCK) {
            let mut block = vec![0; BLOCK as usize];
            node(&mut block, chunk, IN_BLOCK, depth);
            let end = 12 + 12 * IN_BLOCK;
            let sum = crc32c(seed, &block[..end]);
            put32(&mut block, end, sum);
            let mut index = [0; 12];
            put32(&mut index, 0, chunk[0].0);
            put32(&mut index, 4, put(&block)?);
            above.push((chunk[0].0, index));
        }
        level = above;
        depth += 1;
    }
    let mut root = [0; 60];
    node(&mut root, &level, IN_INODE, depth);
    Ok(root)
}

fn node(buffer: &mut [u8], entries: &[(u32, [u8; 12])], most: usize, depth: u16) {
    put16(buffer, 0, 0xf30a);
    put16(buffer, 2, entries.len() as u16);
    put16(buffer, 4, most as u16);
    put16(buffer, 6, depth);
    for (place, (_, entry)) in buffer[12..].chunks_exact_mut(12).zip(entries) {
        place.copy_from_slice(entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one_up_to_the_longest() {
        let mut extents = Extents::default();
        for i in 0..40_000 {
            extents.push(i, 100 + i, 1);
        }
        let all = extents.as_slice();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].length, all[1].logical, all[1].start), (32768, 32768, 32868));
        let mut at_once = Extents::default();
        at_once.push(0, 100, 40_000);
        assert_eq!(at_once.as_slice(), all);
    }

    #[test]
    fn a_tree_has_as_many_blocks_as_was_said() {
        for count in [0, 1, 4, 5, 340, 341, 1360, 1361, 340 * 340, 500_000] {
            let extents: Vec<Extent> =
                (0..count).map(|i| Extent { logical: 2 * i, start: 7 + i, length: 1 }).collect();
            let mut written = 0;
            tree(&extents, 0, |_| {
                written += 1;
                Ok(written)
            })
            .unwrap();
            assert_eq!(written, tree_blocks(extents.len()), "{count}");
        }
    }
}
