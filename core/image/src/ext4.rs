//! Writes ext4 filesystems: contents first, as they come, and all tables once everything is known.
//!
//! ```text
//!   block 0      513                                                                                        end
//!   ├─ super ─────┼─ contents, as they came ─┼─ resize ─ journal ─ bitmaps ─ inodes ─┼─ directories, … ─┼─ free ─┤
//!   │ descriptors │                          │                                       │                  │        │
//!   │ + reserve   └ data::DataWriter ────────┴ geometry::Geometry ───────────────────┴ finish ──────────┘        │
//! ```
//!
//! With the feature `flex_bg` bitmaps and inode tables may stand anywhere, so they stand behind the contents, whose size
//! nobody knew before. Fixed places have only the superblock, its copies (`sparse_super`) and the descriptors with
//! their reserve for growth (`resize_inode`) behind each copy. The same contents in the same order give the same bytes.
//!
//! Source of the form: Linux, Documentation/filesystems/ext4 ("the documentation" below), and fs/ext4 where that is
//! silent. Everything is little-endian but the journal. This module knows neither archives nor layers.

mod data;
mod directory;
mod extents;
mod finish;
mod geometry;
mod hash;
mod inode;
mod model;
mod superblock;
mod xattr;

pub(crate) use data::DataWriter;
pub(crate) use finish::{Identity, finish};
pub use superblock::LABEL;
pub(crate) use {
    extents::{Extent, Extents},
    geometry::{BLOCK, IMAGE_MAX},
    model::{Attributes, Child, Directory, Filesystem, Kind, LINKS_MAX, LOST_FOUND, Node, NodeId, ROOT},
    xattr::{Parsed, Xattr, fits as xattrs_fit},
};

/// CRC-32C as ext4 uses it: no inversion at either end, so that one sum seeds the next ("Checksums").
fn crc32c(seed: u32, data: &[u8]) -> u32 {
    !::crc32c::crc32c_append(!seed, data)
}

fn put16(buffer: &mut [u8], at: usize, value: u16) {
    buffer[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn put32(buffer: &mut [u8], at: usize, value: u32) {
    buffer[at..at + 4].copy_from_slice(&value.to_le_bytes());
}
