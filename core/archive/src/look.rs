//! Asking about what has a name without opening it for more.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat, openat2, statx},
    io::Errno,
    path::Arg,
};

/// What is always asked for.
const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::MNT_ID);

/// A mount by number, or on kernels before 5.8 a filesystem.
pub type Mount = (u64, u32, u32);

/// The mount that something is on.
pub fn mount_of(about: &Statx) -> Mount {
    match about.stx_mask & StatxFlags::MNT_ID.bits() {
        0 => (0, about.stx_dev_major, about.stx_dev_minor),
        _ => (about.stx_mnt_id, 0, 0),
    }
}

/// Opens whatever has the name, for nothing but to be asked about it.
///
/// # Errors
/// The kernel's.
pub fn look(directory: impl AsFd, name: impl Arg) -> rustix::io::Result<(OwnedFd, Statx)> {
    let file = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let about = about(&file)?;
    Ok((file, about))
}

/// What there is to say of what is open.
///
/// # Errors
/// The kernel's.
pub fn about(file: impl AsFd) -> rustix::io::Result<Statx> {
    statx(file, "", AtFlags::EMPTY_PATH, WANTED)
}

/// What there is to say of what has the name, if that is a link of the link itself.
///
/// # Errors
/// The kernel's.
pub fn about_name(directory: impl AsFd, name: impl Arg) -> rustix::io::Result<Statx> {
    statx(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, WANTED)
}

/// The way to what a descriptor of [`look`] is of, which is no link to follow.
pub fn by_descriptor(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// What something is.
pub fn kind_of(about: &Statx) -> FileType {
    FileType::from_raw_mode(about.stx_mode.into())
}

/// Opens what has the path below a directory, with no link on its way, nor at its end unless `flags` have `PATH`; `None` if
/// nothing has.
///
/// # Errors
/// The kernel's.
pub fn below(directory: impl AsFd, path: &[u8], flags: OFlags) -> rustix::io::Result<Option<OwnedFd>> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    match openat2(directory, path, flags, Mode::empty(), resolve) {
        Ok(file) => Ok(Some(file)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE) => Ok(None),
        Err(errno) => Err(errno),
    }
}
