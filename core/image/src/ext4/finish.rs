//! Writes everything but the contents: inodes, directories, bitmaps, descriptors, superblocks, journal.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::{
    crc32c,
    data::DataWriter,
    directory::{self, Entry, Plan},
    extents::{self, Extent, Extents},
    geometry::{
        BLOCK, Cursor, Demand, FIRST_INODE, GROUP, Geometry, HEAD, INODE_SIZE, INODES_PER_BLOCK,
        JOURNAL_BLOCKS, has_super,
    },
    inode::{self, Inode},
    model::{Attributes, Child, Directory, Filesystem, Kind, LINKS_MAX, LOST_FOUND, Node, NodeId, ROOT},
    put32,
    superblock::{
        self, DESCRIPTOR, DESCRIPTORS_PER_BLOCK, Group, INODE_UNINIT, INODE_ZEROED, JOURNAL_INODE,
        RESIZE_INODE, Superblock,
    },
    xattr,
};

const SIZE: usize = BLOCK as usize;
const ROOT_INODE: u32 = 2;
/// Blocks of `lost+found`, so that a check of a full filesystem need not find any.
const LOST_FOUND_BLOCKS: u32 = 4;
/// A short link's target stands in the inode.
const SHORT_LINK: usize = 60;
/// Entries of a block of block numbers (the resize inode is the only one without extents).
const POINTERS: u32 = BLOCK as u32 / 4;
/// Bytes of inode tables that are written at once.
const TABLE_PIECE: usize = 1 << 20;

/// What tells one filesystem from another; the same for the same image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(super) uuid: [u8; 16],
    pub(super) hash_seed: [u8; 16],
}

impl Identity {
    /// UUIDs (RFC 9562, version 8: own use) out of a digest.
    pub(crate) fn of(digest: &[u8; 32]) -> Self {
        let uuid = |from: usize| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&digest[from..from + 16]);
            bytes[6] = bytes[6] & 0x0f | 0x80;
            bytes[8] = bytes[8] & 0x3f | 0x80;
            bytes
        };
        Self { uuid: uuid(0), hash_seed: uuid(16) }
    }

    fn seed(&self) -> u32 {
        crc32c(!0, &self.uuid)
    }

    fn hash_words(&self) -> [u32; 4] {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(self.hash_seed.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        words
    }
}

/// Completes the image whose contents were written. `dead` are blocks among them that nobody has any more, `tick` is
/// called now and then with how many of how many inodes are written; an error of it ends the work.
pub(crate) fn finish<E: From<io::Error>>(
    mut writer: DataWriter,
    tree: &mut Filesystem,
    identity: &Identity,
    dead: &[Extent],
    mut tick: impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<File, E> {
    ensure_lost_found(tree);
    let numbers = Numbers::assign(tree);
    let mut blocks = 0;
    for &id in &numbers.order {
        blocks += tables_of(tree, id, identity);
    }
    let last = FIRST_INODE + numbers.order.len() as u32 - 2;
    let contents = writer.turn_to(None)?;
    let dead_blocks = dead.iter().map(|extent| extent.length).sum();
    let geometry = Geometry::plan(contents, Demand { blocks, inodes: last, dead: dead_blocks });
    let tables = u64::from(blocks + 2 * geometry.groups) * BLOCK + u64::from(last) * u64::from(INODE_SIZE);
    writer.ensure_room(tables)?;
    writer.turn_to(Some(geometry.rest))?;

    let mut finishing = Finishing {
        table: Table::new(&geometry),
        directories: vec![0; geometry.groups as usize],
        writer,
        tree,
        numbers: &numbers,
        identity,
        seed: identity.seed(),
    };
    let journal = finishing.own_inodes(&geometry)?;
    for (done, &id) in numbers.order.iter().enumerate() {
        if done % 1024 == 0 {
            tick(done as u64, numbers.order.len() as u64)?;
        }
        let inode = finishing.inode(id)?;
        finishing.table.put(finishing.writer.file(), numbers.of(id), &inode, finishing.seed)?;
    }
    let Finishing { mut table, directories, mut writer, seed, .. } = finishing;
    table.flush(writer.file())?;
    let end = writer.turn_to(None)?;
    let file = writer.into_file();
    let used = used_blocks(&geometry, end, dead);
    frame(&file, &geometry, identity, &used, &Inodes { last, directories: &directories }, &journal, seed)?;
    Ok(file)
}

fn ensure_lost_found(tree: &mut Filesystem) {
    let node = tree.nodes.len() as NodeId;
    let Some(root) = tree.directory_mut(ROOT) else { return };
    if root.children.contains_key(LOST_FOUND) {
        return;
    }
    root.children.insert(LOST_FOUND.into(), Child { node, layer: 0 });
    let directory = Directory { parent: ROOT, depth: 1, hidden: 0, children: Default::default() };
    let kind = Kind::Directory(Box::new(directory));
    tree.nodes.push(Node { attributes: Attributes { mode: 0o700, ..Attributes::implied() }, kind, links: 1 });
}

/// Inode numbers, given in the order of a walk: a directory's names in their order, directories before what is in them.
struct Numbers {
    by_node: Vec<u32>,
    /// The root, `lost+found`, then the others by number.
    order: Vec<NodeId>,
}

impl Numbers {
    fn assign(tree: &Filesystem) -> Self {
        let mut numbers = Self { by_node: vec![0; tree.nodes.len()], order: Vec::new() };
        numbers.by_node[ROOT as usize] = ROOT_INODE;
        numbers.order.push(ROOT);
        if let Some(found) = tree.directory(ROOT).and_then(|root| root.children.get(LOST_FOUND)) {
            numbers.by_node[found.node as usize] = FIRST_INODE;
            numbers.order.push(found.node);
        }
        let mut queue = vec![ROOT];
        while let Some(id) = queue.pop() {
            let Some(directory) = tree.directory(id) else { continue };
            let place = queue.len();
            for child in directory.children.values() {
                if numbers.by_node[child.node as usize] == 0 {
                    numbers.by_node[child.node as usize] = FIRST_INODE + numbers.order.len() as u32 - 1;
                    numbers.order.push(child.node);
                }
                if tree.directory(child.node).is_some() {
                    queue.push(child.node);
                }
            }
            queue[place..].reverse();
        }
        numbers
    }

    fn of(&self, id: NodeId) -> u32 {
        self.by_node[id as usize]
    }
}

fn plan<'a>(
    tree: &'a Filesystem,
    directory: &'a Directory,
    identity: &Identity,
    number: impl Fn(NodeId) -> u32,
) -> Plan<'a> {
    let entries = directory.children.iter().map(|(name, child)| Entry {
        name,
        inode: number(child.node),
        kind: tree.node(child.node).kind.entry_type(),
    });
    Plan::new(entries.collect(), identity.hash_words())
}

/// How many blocks an inode needs beside a file's contents; never too few.
fn tables_of(tree: &Filesystem, id: NodeId, identity: &Identity) -> u32 {
    let node = tree.node(id);
    let own = match &node.kind {
        Kind::File { extents, .. } => extents::tree_blocks(extents.as_slice().len()),
        Kind::Directory(directory) => {
            let blocks = plan(tree, directory, identity, |_| 0).blocks().max(LOST_FOUND_BLOCKS);
            // Copies of the superblock and the longest extent cut it in pieces.
            blocks + extents::tree_blocks(blocks.div_ceil(GROUP / 2) as usize)
        }
        Kind::Symlink(target) => u32::from(target.len() >= SHORT_LINK),
        Kind::Device { .. } | Kind::Fifo => 0,
    };
    own + u32::from(xattr::needs_block(&node.attributes.xattrs))
}

struct Finishing<'a> {
    writer: DataWriter,
    table: Table<'a>,
    /// Directories of each group.
    directories: Vec<u32>,
    tree: &'a Filesystem,
    numbers: &'a Numbers,
    identity: &'a Identity,
    seed: u32,
}

impl Finishing<'_> {
    /// The filesystem's own: the reserve of descriptors and the journal. Answers the journal's `i_block`.
    fn own_inodes(&mut self, geometry: &Geometry) -> io::Result<[u8; 60]> {
        let file = self.writer.file();
        let resize = resize_inode(file, geometry)?;
        self.table.put(file, RESIZE_INODE, &resize, self.seed)?;
        let mut log = Extents::default();
        let mut logical = 0;
        for &(start, length) in &geometry.journal {
            log.push(logical, start, length);
            logical += length;
        }
        let first = log.as_slice()[0].start;
        file.write_all_at(&superblock::journal(&self.identity.uuid), u64::from(first) * BLOCK)?;
        // In two pieces at most, so the tree is in the inode.
        let block = extents::tree(log.as_slice(), self.seed, |_| Err(io::ErrorKind::StorageFull.into()))?;
        let journal = Inode {
            mode: 0x8000 | 0o600,
            size: u64::from(JOURNAL_BLOCKS) * BLOCK,
            blocks: JOURNAL_BLOCKS.into(),
            flags: inode::EXTENTS,
            block,
            ..Inode::default()
        };
        self.table.put(file, JOURNAL_INODE, &journal, self.seed)?;
        Ok(block)
    }

    /// Writes what belongs to a node, and answers its inode.
    fn inode(&mut self, id: NodeId) -> io::Result<Inode> {
        let node = self.tree.node(id);
        let number = self.numbers.of(id);
        let seed = inode::seed(self.seed, number);
        let attributes = &node.attributes;
        let mut inode = Inode {
            mode: node.kind.type_bits() | attributes.mode,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: attributes.mtime,
            links: node.links as u16,
            ..Inode::default()
        };
        match &node.kind {
            Kind::File { size, extents } => {
                inode.size = *size;
                self.map(&mut inode, extents, seed)?;
            }
            Kind::Directory(directory) => self.directory(&mut inode, directory, number, seed)?,
            Kind::Symlink(target) => {
                inode.size = target.len() as u64;
                if target.len() < SHORT_LINK {
                    inode.block[..target.len()].copy_from_slice(target);
                } else {
                    let mut block = vec![0; SIZE];
                    block[..target.len()].copy_from_slice(target);
                    let mut extents = Extents::default();
                    extents.push(0, self.writer.put(&block)?, 1);
                    self.map(&mut inode, &extents, seed)?;
                }
            }
            Kind::Device { major, minor, .. } => inode.block = inode::device(*major, *minor),
            Kind::Fifo => {}
        }
        let mut encoded = xattr::encode(&attributes.xattrs);
        inode.attributes = encoded.inside;
        let place = self.writer.next()?;
        if let Some(block) = encoded.block(place, self.seed) {
            inode.attribute_block = self.writer.put(block)?;
            inode.blocks += 1;
        }
        Ok(inode)
    }

    fn directory(
        &mut self,
        inode: &mut Inode,
        directory: &Directory,
        number: u32,
        seed: u32,
    ) -> io::Result<()> {
        let plan = plan(self.tree, directory, self.identity, |id| self.numbers.of(id));
        let mut extents = Extents::default();
        let mut count = 0;
        let writer = &mut self.writer;
        let mut put = |block: &[u8]| {
            extents.push(count, writer.put(block)?, 1);
            count += 1;
            Ok(())
        };
        plan.write((number, self.numbers.of(directory.parent)), seed, &mut put)?;
        if number == FIRST_INODE && !plan.is_tree() {
            for _ in 1..LOST_FOUND_BLOCKS {
                put(&directory::empty_block(seed))?;
            }
        }
        if plan.is_tree() {
            inode.flags |= inode::INDEX;
        }
        inode.size = u64::from(count) * BLOCK;
        self.map(inode, &extents, seed)?;
        let below = directory.children.values();
        let links = 2 + below.filter(|child| self.tree.directory(child.node).is_some()).count() as u32;
        // A count that does not fit is not kept (dir_nlink).
        inode.links = if links > LINKS_MAX { 1 } else { links as u16 };
        self.directories[self.table.group(number)] += 1;
        Ok(())
    }

    fn map(&mut self, inode: &mut Inode, extents: &Extents, seed: u32) -> io::Result<()> {
        let all = extents.as_slice();
        inode.flags |= inode::EXTENTS;
        inode.block = extents::tree(all, seed, |block| self.writer.put(block))?;
        inode.blocks += extents.blocks() + u64::from(extents::tree_blocks(all.len()));
        Ok(())
    }
}

/// The inode that keeps room for descriptors: a block of pointers to the reserved blocks of group 0, each of which
/// points to those of the copies (fs/ext4/resize.c, `verify_reserved_gdb`).
fn resize_inode(file: &File, geometry: &Geometry) -> io::Result<Inode> {
    let used = geometry.groups.div_ceil(DESCRIPTORS_PER_BLOCK);
    let copies: Vec<u32> = (1..geometry.groups).filter(|&group| has_super(group)).collect();
    let mut top = vec![0; SIZE];
    let reserved = used..used + superblock::reserved_descriptor_blocks(geometry.groups);
    for slot in reserved.clone() {
        let place = 1 + slot;
        put32(&mut top, (slot % POINTERS) as usize * 4, place);
        let mut pointers = vec![0; SIZE];
        for (i, group) in copies.iter().enumerate() {
            put32(&mut pointers, 4 * i, place + group * GROUP);
        }
        file.write_all_at(&pointers, u64::from(place) * BLOCK)?;
    }
    file.write_all_at(&top, u64::from(geometry.resize_block) * BLOCK)?;
    let mut block = [0; 60];
    // The place of double indirection.
    put32(&mut block, 13 * 4, geometry.resize_block);
    let pointers = u64::from(POINTERS);
    Ok(Inode {
        mode: 0x8000 | 0o600,
        size: (pointers * pointers + pointers + 12) * BLOCK,
        blocks: 1 + reserved.len() as u64 * (1 + copies.len() as u64),
        block,
        ..Inode::default()
    })
}

/// Collects inodes, which come by number, and writes many at once.
struct Table<'a> {
    geometry: &'a Geometry,
    buffer: Vec<u8>,
    /// The number of the first one in the buffer.
    first: u32,
}

impl<'a> Table<'a> {
    fn new(geometry: &'a Geometry) -> Self {
        Self { geometry, buffer: Vec::with_capacity(TABLE_PIECE), first: 1 }
    }

    fn group(&self, number: u32) -> usize {
        ((number - 1) / self.geometry.inodes_per_group) as usize
    }

    fn put(&mut self, file: &File, number: u32, inode: &Inode, seed: u32) -> io::Result<()> {
        let next = self.first + (self.buffer.len() / INODE_SIZE as usize) as u32;
        let full = self.buffer.len() >= TABLE_PIECE;
        if full || number != next || self.group(number) != self.group(self.first) {
            self.flush(file)?;
            self.first = number;
        }
        self.buffer.extend_from_slice(&inode.encode(number, seed));
        Ok(())
    }

    fn flush(&mut self, file: &File) -> io::Result<()> {
        let table = u64::from(self.geometry.inode_tables[self.group(self.first)]) * BLOCK;
        let index = (self.first - 1) % self.geometry.inodes_per_group;
        file.write_all_at(&self.buffer, table + u64::from(index) * u64::from(INODE_SIZE))?;
        self.buffer.clear();
        Ok(())
    }
}

/// One bit for each block of all groups.
struct Bitmap(Vec<u8>);

impl Bitmap {
    fn set(&mut self, from: u32, length: u32, value: bool) {
        let (mut at, end) = (from, from + length);
        while at < end {
            if at.is_multiple_of(8) && end - at >= 8 {
                let bytes = (end - at) / 8;
                self.0[at as usize / 8..(at as usize / 8 + bytes as usize)].fill(if value {
                    0xff
                } else {
                    0
                });
                at += bytes * 8;
                continue;
            }
            let bit = 1 << (at % 8);
            let byte = &mut self.0[at as usize / 8];
            *byte = if value { *byte | bit } else { *byte & !bit };
            at += 1;
        }
    }

    fn group(&self, group: u32) -> &[u8] {
        &self.0[group as usize * SIZE..(group as usize + 1) * SIZE]
    }
}

fn used_blocks(geometry: &Geometry, end: Cursor, dead: &[Extent]) -> Bitmap {
    let mut used = Bitmap(vec![0; geometry.groups as usize * SIZE]);
    // A cursor that came to the begin of a group stands behind its head, even if there is no such group.
    used.set(0, end.end().min(geometry.blocks), true);
    for extent in dead {
        used.set(extent.start, extent.length, false);
    }
    for &(start, length) in &geometry.gaps {
        used.set(start, length, false);
    }
    for group in (0..geometry.groups).filter(|&group| has_super(group)) {
        used.set(group * GROUP, HEAD, true);
    }
    used.set(geometry.blocks, geometry.groups * GROUP - geometry.blocks, true);
    used
}

/// Which inodes are used.
struct Inodes<'a> {
    last: u32,
    directories: &'a [u32],
}

/// Bitmaps, descriptors and superblocks.
fn frame(
    file: &File,
    geometry: &Geometry,
    identity: &Identity,
    used: &Bitmap,
    inodes: &Inodes<'_>,
    journal: &[u8; 60],
    seed: u32,
) -> io::Result<()> {
    let per_group = geometry.inodes_per_group;
    let mut descriptors = vec![0; geometry.groups.div_ceil(DESCRIPTORS_PER_BLOCK) as usize * SIZE];
    let (mut all_free_blocks, mut all_free_inodes) = (0, 0);
    for group in 0..geometry.groups {
        let g = group as usize;
        let blocks = used.group(group);
        file.write_all_at(blocks, u64::from(geometry.block_bitmaps[g]) * BLOCK)?;
        let taken: u32 = blocks.iter().map(|byte| byte.count_ones()).sum();
        let used_inodes = inodes.last.saturating_sub(group * per_group).min(per_group);
        let (mut flags, mut inode_sum) = (INODE_ZEROED, 0);
        if used_inodes == 0 {
            flags |= INODE_UNINIT;
        } else {
            let mut bitmap = Bitmap(vec![0; SIZE]);
            bitmap.set(0, used_inodes, true);
            bitmap.set(per_group, GROUP - per_group, true);
            file.write_all_at(&bitmap.0, u64::from(geometry.inode_bitmaps[g]) * BLOCK)?;
            inode_sum = crc32c(seed, &bitmap.0[..per_group as usize / 8]);
        }
        let free_inodes = per_group - used_inodes;
        let numbers = Group {
            block_bitmap: geometry.block_bitmaps[g],
            inode_bitmap: geometry.inode_bitmaps[g],
            inode_table: geometry.inode_tables[g],
            free_blocks: GROUP - taken,
            free_inodes,
            directories: inodes.directories[g],
            unused_inodes: free_inodes,
            flags,
            block_sum: crc32c(seed, blocks),
            inode_sum,
        };
        descriptors[g * DESCRIPTOR..(g + 1) * DESCRIPTOR].copy_from_slice(&numbers.encode(group, seed));
        all_free_blocks += u64::from(GROUP - taken);
        all_free_inodes += free_inodes;
    }
    let superblock = Superblock::new(geometry, identity, all_free_blocks, all_free_inodes, journal);
    file.set_len(u64::from(geometry.blocks) * BLOCK)?;
    for group in (0..geometry.groups).filter(|&group| has_super(group)) {
        let start = u64::from(group) * u64::from(GROUP) * BLOCK;
        // The first one leaves room for a boot sector.
        let offset = if group == 0 { 1024 } else { 0 };
        file.write_all_at(&superblock.for_group(group), start + offset)?;
        file.write_all_at(&descriptors, start + BLOCK)?;
    }
    Ok(())
}

const _: () = assert!(INODES_PER_BLOCK * INODE_SIZE == BLOCK as u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_with_the_last_group_fills_it_and_no_more() {
        let mut end = Cursor::start();
        end.take(GROUP - HEAD);
        // As the writer does it before the next block, which does not come.
        end.run();
        let plan = Geometry::plan(Cursor::start(), Demand { inodes: 12, ..Demand::default() });
        let used = used_blocks(&Geometry { blocks: GROUP, groups: 1, ..plan }, end, &[]);
        assert!(used.group(0).iter().all(|&byte| byte == 0xff));
    }
}
