//! Asking about what has a name without opening it for more.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, openat, statx},
    path::Arg,
};

/// What is always asked for.
const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::MNT_ID);

/// A mount by number, or on kernels before 5.8 a filesystem.
pub(super) type Mount = (u64, u32, u32);

pub(super) fn mount_of(about: &Statx) -> Mount {
    match about.stx_mask & StatxFlags::MNT_ID.bits() {
        0 => (0, about.stx_dev_major, about.stx_dev_minor),
        _ => (about.stx_mnt_id, 0, 0),
    }
}

/// Opens whatever has the name, for nothing but to be asked about it.
pub(super) fn look(directory: impl AsFd, name: impl Arg) -> rustix::io::Result<(OwnedFd, Statx)> {
    let file = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let about = about(&file)?;
    Ok((file, about))
}

/// What there is to say of what is open.
pub(super) fn about(file: impl AsFd) -> rustix::io::Result<Statx> {
    statx(file, "", AtFlags::EMPTY_PATH, WANTED)
}

/// What there is to say of what has the name, if that is a link of the link itself.
pub(super) fn about_name(directory: impl AsFd, name: impl Arg) -> rustix::io::Result<Statx> {
    statx(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, WANTED)
}

/// The way to what a descriptor of [`look`] is of, which is no link to follow.
pub(super) fn by_descriptor(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

pub(super) fn kind_of(about: &Statx) -> FileType {
    FileType::from_raw_mode(about.stx_mode.into())
}
