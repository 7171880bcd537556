//! Extended attributes: what of an archive's ext4 can hold, and the two forms it holds them in ("Extended Attributes").

use super::{crc32c, geometry::BLOCK, put16, put32};

/// Bytes of an inode behind its fields.
pub(super) const IN_INODE: usize = 96;
const MAGIC: u32 = 0xea02_0000;
/// Header of a block of attributes.
const HEADER: usize = 32;
const ACL_ACCESS: u8 = 2;
const ACL_DEFAULT: u8 = 3;

/// One attribute as ext4 stores it. The order is that of a block's entries.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Xattr {
    /// Stands for the begin of the name.
    index: u8,
    length: u8,
    /// The rest of the name.
    name: Box<[u8]>,
    value: Box<[u8]>,
}

/// What an attribute of an archive comes to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// It is kept. An access ACL says what the permission bits are, too.
    Kept(Option<Xattr>, Option<u16>),
    /// Linux has no such attributes (`com.apple.*`, `system.nfs4_acl`).
    Unknown,
    /// It must not be, for this reason.
    Refused(&'static str),
}

impl Xattr {
    /// Reads an attribute of something with these permission bits.
    pub(crate) fn parse(name: &[u8], value: &[u8], mode: u16) -> Parsed {
        let plain = |index, rest: &[u8]| {
            if rest.is_empty() {
                return Parsed::Refused("has an extended attribute without a name");
            }
            if rest.len() > 255 || rest.contains(&0) {
                return Parsed::Refused("has an extended attribute with an impossible name");
            }
            Parsed::Kept(Some(Self::new(index, rest, value)), None)
        };
        match name {
            b"system.posix_acl_access" => acl(ACL_ACCESS, value, mode),
            b"system.posix_acl_default" => acl(ACL_DEFAULT, value, mode),
            _ => {
                for (prefix, index) in [(&b"user."[..], 1), (b"trusted.", 4), (b"security.", 6)] {
                    if let Some(rest) = name.strip_prefix(prefix) {
                        return plain(index, rest);
                    }
                }
                Parsed::Unknown
            }
        }
    }

    fn new(index: u8, name: &[u8], value: &[u8]) -> Self {
        Self { index, length: name.len() as u8, name: name.into(), value: value.into() }
    }

    /// Whether only files and directories can have it (xattr(7)).
    pub(crate) fn is_user(&self) -> bool {
        self.index == 1
    }

    fn entry_size(&self) -> usize {
        (16 + self.name.len()).next_multiple_of(4)
    }

    fn size(&self) -> usize {
        self.entry_size() + self.value.len().next_multiple_of(4)
    }

    /// The entry's hash (fs/ext4/xattr.c, `ext4_xattr_hash_entry`).
    fn hash(&self) -> u32 {
        let mut hash = 0u32;
        for &byte in &self.name {
            hash = hash.rotate_left(5) ^ u32::from(byte);
        }
        for word in self.value.chunks(4) {
            let mut bytes = [0; 4];
            bytes[..word.len()].copy_from_slice(word);
            hash = hash.rotate_left(16) ^ u32::from_le_bytes(bytes);
        }
        hash
    }
}

/// Turns the form of setxattr(2) (version 2, entries of 8 bytes) into that of the disk (version 1, ids only where they
/// mean something), after the checks of the kernel (`posix_acl_valid`).
fn acl(index: u8, value: &[u8], mode: u16) -> Parsed {
    const INVALID: Parsed = Parsed::Refused("has an ACL that is none");
    const USER_OBJ: u16 = 1;
    const USER: u16 = 2;
    const GROUP_OBJ: u16 = 4;
    const GROUP: u16 = 8;
    const MASK: u16 = 0x10;
    const OTHER: u16 = 0x20;
    let Some((version, entries)) = value.split_first_chunk::<4>() else { return INVALID };
    if u32::from_le_bytes(*version) != 2 || entries.len() % 8 != 0 {
        return INVALID;
    }
    let mut stored = 1u32.to_le_bytes().to_vec();
    let (mut bits, mut last) = (0, 0);
    let (mut named, mut masked) = (false, None);
    for entry in entries.chunks_exact(8) {
        let (tag, perm) =
            (u16::from_le_bytes([entry[0], entry[1]]), u16::from_le_bytes([entry[2], entry[3]]));
        let again = tag == last && matches!(tag, USER | GROUP);
        if perm > 7 || (tag <= last && !again) {
            return INVALID;
        }
        last = tag;
        stored.extend_from_slice(&entry[..4]);
        match tag {
            USER_OBJ => bits |= perm << 6,
            GROUP_OBJ => bits |= perm << 3,
            OTHER => bits |= perm,
            MASK => masked = Some(perm),
            USER | GROUP => {
                named = true;
                stored.extend_from_slice(&entry[4..]);
            }
            _ => return INVALID,
        }
    }
    // No entries take an ACL away.
    if entries.is_empty() {
        return Parsed::Kept(None, None);
    }
    let tags = |tag: u16| entries.chunks_exact(8).any(|entry| entry[..2] == tag.to_le_bytes());
    if !tags(USER_OBJ) || !tags(GROUP_OBJ) || !tags(OTHER) || (named && masked.is_none()) {
        return INVALID;
    }
    let kept = Xattr::new(index, b"", &stored);
    if index == ACL_DEFAULT {
        return Parsed::Kept(Some(kept), None);
    }
    let extended = named || masked.is_some();
    let bits = masked.map_or(bits, |mask| bits & 0o707 | mask << 3);
    // What the permission bits say already needs no ACL.
    Parsed::Kept(extended.then_some(kept), Some(mode & 0o7000 | bits))
}

/// Whether an inode can hold these.
pub(crate) fn fits(xattrs: &[Xattr]) -> bool {
    place(xattrs).is_some()
}

/// Which stand in the inode, the others in a block. `None`: they do not fit.
fn place(xattrs: &[Xattr]) -> Option<(Vec<&Xattr>, Vec<&Xattr>)> {
    // Magic number before, end mark behind the entries.
    let (mut inside, mut outside) = (8, HEADER + 4);
    let (inner, outer): (Vec<&Xattr>, Vec<&Xattr>) = xattrs.iter().partition(|xattr| {
        let fits = inside + xattr.size() <= IN_INODE;
        *(if fits { &mut inside } else { &mut outside }) += xattr.size();
        fits
    });
    (outside <= BLOCK as usize).then_some((inner, outer))
}

/// Whether a block is needed.
pub(super) fn needs_block(xattrs: &[Xattr]) -> bool {
    place(xattrs).is_none_or(|(_, outer)| !outer.is_empty())
}

/// The inode's part and the block.
pub(super) struct Encoded {
    pub(super) inside: Option<[u8; IN_INODE]>,
    block: Option<Vec<u8>>,
}

pub(super) fn encode(xattrs: &[Xattr]) -> Encoded {
    let (inner, outer) = place(xattrs).unwrap_or_default();
    let inside = (!inner.is_empty()).then(|| {
        let mut buffer = [0; IN_INODE];
        put32(&mut buffer, 0, MAGIC);
        // Positions count from behind the magic number; hashes are for blocks only.
        entries(&mut buffer[4..], 0, &inner, false);
        buffer
    });
    let block = (!outer.is_empty()).then(|| {
        let mut buffer = vec![0; BLOCK as usize];
        put32(&mut buffer, 0, MAGIC);
        put32(&mut buffer, 4, 1);
        put32(&mut buffer, 8, 1);
        entries(&mut buffer, HEADER, &outer, true);
        let hash = outer.iter().fold(0u32, |hash, xattr| hash.rotate_left(16) ^ xattr.hash());
        put32(&mut buffer, 12, hash);
        buffer
    });
    Encoded { inside, block }
}

impl Encoded {
    /// The block for its place, which its check sum covers.
    pub(super) fn block(&mut self, number: u32, fs_seed: u32) -> Option<&[u8]> {
        let block = self.block.as_mut()?;
        put32(block, 16, 0);
        let sum = crc32c(crc32c(fs_seed, &u64::from(number).to_le_bytes()), block);
        put32(block, 16, sum);
        Some(block)
    }
}

/// Entries from the front, values from the back.
fn entries(buffer: &mut [u8], mut at: usize, xattrs: &[&Xattr], hashed: bool) {
    let mut end = buffer.len();
    for xattr in xattrs {
        if !xattr.value.is_empty() {
            end -= xattr.value.len().next_multiple_of(4);
            buffer[end..end + xattr.value.len()].copy_from_slice(&xattr.value);
            put16(buffer, at + 2, end as u16);
        }
        buffer[at] = xattr.length;
        buffer[at + 1] = xattr.index;
        put32(buffer, at + 8, xattr.value.len() as u32);
        put32(buffer, at + 12, if hashed { xattr.hash() } else { 0 });
        buffer[at + 16..at + 16 + xattr.name.len()].copy_from_slice(&xattr.name);
        at += xattr.entry_size();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl_of(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut value = 2u32.to_le_bytes().to_vec();
        for (tag, perm, id) in entries {
            value.extend(tag.to_le_bytes());
            value.extend(perm.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value
    }

    #[test]
    fn an_acl_rules_the_permission_bits() {
        let name = b"system.posix_acl_access";
        let none = u32::MAX;
        let plain = acl_of(&[(1, 6, none), (4, 4, none), (0x20, 0, none)]);
        assert_eq!(Xattr::parse(name, &plain, 0o4777), Parsed::Kept(None, Some(0o4640)));
        let named = acl_of(&[(1, 7, none), (2, 4, 5), (4, 4, none), (0x10, 6, none), (0x20, 1, none)]);
        let Parsed::Kept(Some(kept), Some(0o761)) = Xattr::parse(name, &named, 0o777) else { panic!() };
        assert_eq!(kept.value.len(), 4 + 4 * 4 + 8);
        for wrong in [
            acl_of(&[(1, 6, none)]),
            acl_of(&[(4, 4, none), (1, 6, none), (0x20, 0, none)]),
            acl_of(&[(1, 8, none), (4, 4, none), (0x20, 0, none)]),
            acl_of(&[(1, 7, none), (2, 4, 5), (4, 4, none), (0x20, 1, none)]),
            vec![2, 0, 0, 0, 1],
            vec![],
        ] {
            assert!(matches!(Xattr::parse(name, &wrong, 0), Parsed::Refused(_)), "{wrong:?}");
        }
    }

    #[test]
    fn attributes_fit_to_the_last_byte() {
        let of = |length| [Xattr::new(1, b"name", &vec![7; length])];
        assert!(!needs_block(&of(96 - 8 - 20)));
        assert!(needs_block(&of(96 - 8 - 19)));
        assert!(fits(&of(4096 - 36 - 20)));
        assert!(!fits(&of(4096 - 36 - 19)));
    }
}
