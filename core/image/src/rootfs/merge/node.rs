//! What an entry of an archive is on ext4, and what it takes.

use super::{Entry, EntryKind, Refusal};
use crate::ext4::{Attributes, Kind, Parsed, Xattr, xattrs_fit};

/// The longest target of a symbolic link on ext4, in bytes.
const TARGET_MAX: usize = 4095;

/// What an entry takes beside its node. A whole path: each part of it may be a directory that nothing else names.
pub(super) fn weight(entry: &Entry) -> usize {
    let target = match &entry.kind {
        EntryKind::Symlink(target) => target.len(),
        _ => 0,
    };
    let xattrs: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
    entry.path.len() + target + xattrs
}

pub(super) fn symlink(target: &[u8]) -> Result<Kind, Refusal> {
    if target.is_empty() {
        return Err("is a symbolic link to nothing".into());
    }
    if target.len() > TARGET_MAX || target.contains(&0) {
        return Err(format!("is a symbolic link with a target of {} bytes", target.len()));
    }
    Ok(Kind::Symlink(target.into()))
}

/// Linux has 12 bits of major and 20 of minor numbers.
pub(super) fn device(block: bool, major: u32, minor: u32) -> Result<Kind, Refusal> {
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(format!("is device {major}:{minor}, which Linux cannot have"));
    }
    Ok(Kind::Device { block, major, minor })
}

pub(super) fn attributes(entry: &Entry) -> Result<Attributes, Refusal> {
    let symlink = matches!(entry.kind, EntryKind::Symlink(_));
    let mut mode = if symlink { 0o777 } else { entry.mode as u16 };
    let mut xattrs = Vec::new();
    for (name, value) in &entry.xattrs {
        match Xattr::parse(name, value, mode) {
            Parsed::Refused(reason) => return Err(reason.into()),
            // What cannot be set there, or means nothing to Linux, other tools leave out as well.
            Parsed::Unknown => {}
            Parsed::Kept(_, Some(_)) if symlink => {}
            Parsed::Kept(Some(kept), _)
                if kept.is_user() && !matches!(entry.kind, EntryKind::File | EntryKind::Directory) => {}
            Parsed::Kept(kept, bits) => {
                mode = bits.unwrap_or(mode);
                xattrs.extend(kept);
            }
        }
    }
    xattrs.sort_unstable();
    if !xattrs_fit(&xattrs) {
        let bytes: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        return Err(format!("has {bytes} bytes of extended attributes; ext4 holds one block of them"));
    }
    Ok(Attributes {
        mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: representable(entry.mtime),
        xattrs: xattrs.into(),
    })
}

/// ext4 counts 34 bits of seconds from 1901 on.
fn representable((seconds, nanos): (i64, u32)) -> (i64, u32) {
    let range = i64::from(i32::MIN)..(1 << 34) + i64::from(i32::MIN);
    if range.contains(&seconds) { (seconds, nanos) } else { (seconds.clamp(range.start, range.end - 1), 0) }
}
