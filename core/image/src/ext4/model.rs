//! A filesystem in memory: everything but the contents of files, which are on the disk already.

use std::collections::BTreeMap;

use super::{extents::Extents, xattr::Xattr};

/// Which node; an index into [`Filesystem::nodes`].
pub(crate) type NodeId = u32;

/// The root directory.
pub(crate) const ROOT: NodeId = 0;
/// Where `e2fsck` puts what it finds; each filesystem has it at its root.
pub(crate) const LOST_FOUND: &[u8] = b"lost+found";
/// How many names one inode can have (EXT4_LINK_MAX).
pub(crate) const LINKS_MAX: u32 = 65_000;

/// All nodes, dead ones too (without links).
#[derive(Debug)]
pub(crate) struct Filesystem {
    pub(crate) nodes: Vec<Node>,
}

/// What an inode holds beside what it is.
#[derive(Debug, Clone)]
pub(crate) struct Attributes {
    /// Permissions, with set-user-id, set-group-id and sticky bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the Unix epoch, in ext4's range, and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// In the order of [`Xattr`]; they fit ([`super::xattr::fits`]).
    pub(crate) xattrs: Box<[Xattr]>,
}

/// One thing, perhaps under several names.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) attributes: Attributes,
    pub(crate) kind: Kind,
    /// How many names it has; 0 for what is gone.
    pub(crate) links: u32,
}

#[derive(Debug)]
pub(crate) enum Kind {
    File {
        /// Bytes, holes counted.
        size: u64,
        extents: Extents,
    },
    Directory(Box<Directory>),
    Symlink(Box<[u8]>),
    Device {
        /// A block device rather than a character device.
        block: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) parent: NodeId,
    /// 0 for the root.
    pub(crate) depth: u16,
    /// The last layer that hid what lower layers have in it, 0 for none.
    pub(crate) hidden: u32,
    pub(crate) children: BTreeMap<Box<[u8]>, Child>,
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Child {
    pub(crate) node: NodeId,
    /// The layer that last named it.
    pub(crate) layer: u32,
}

impl Filesystem {
    /// A filesystem with a root directory (root's, mode 0755) and nothing else.
    pub(crate) fn new() -> Self {
        let root = Directory { parent: ROOT, depth: 0, hidden: 0, children: BTreeMap::new() };
        let kind = Kind::Directory(Box::new(root));
        Self { nodes: vec![Node { attributes: Attributes::implied(), kind, links: 1 }] }
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    /// The directory, if this node is one.
    pub(crate) fn directory(&self, id: NodeId) -> Option<&Directory> {
        match &self.node(id).kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    pub(crate) fn directory_mut(&mut self, id: NodeId) -> Option<&mut Directory> {
        match &mut self.node_mut(id).kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }
}

impl Attributes {
    /// Those of a directory that is needed but nowhere described.
    pub(crate) fn implied() -> Self {
        Self { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: Box::default() }
    }
}

impl Kind {
    /// The type bits of `i_mode`.
    pub(super) fn type_bits(&self) -> u16 {
        match self {
            Self::File { .. } => 0x8000,
            Self::Directory(_) => 0x4000,
            Self::Symlink(_) => 0xa000,
            Self::Device { block: true, .. } => 0x6000,
            Self::Device { block: false, .. } => 0x2000,
            Self::Fifo => 0x1000,
        }
    }

    /// The type in a directory entry ("Directory Entries", ftype).
    pub(super) fn entry_type(&self) -> u8 {
        match self {
            Self::File { .. } => 1,
            Self::Directory(_) => 2,
            Self::Device { block: false, .. } => 3,
            Self::Device { block: true, .. } => 4,
            Self::Fifo => 5,
            Self::Symlink(_) => 7,
        }
    }
}
