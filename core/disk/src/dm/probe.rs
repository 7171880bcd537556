//! Whether disks of differences work here, and why not.

use std::{io, path::Path};

use nix::sys::statvfs::{FsFlags, statvfs};

use super::{loops, snapshot::Dm};

/// The targets that a disk is made of.
const TARGETS: [&str; 3] = ["linear", "zero", "snapshot"];

/// # Errors
/// What is missing, in words that a user understands.
pub(crate) fn probe(dm: &Dm, disks: &Path) -> io::Result<()> {
    let wrong = |text: String| io::Error::new(io::ErrorKind::Unsupported, text);
    if statvfs(disks)?.flags().contains(FsFlags::ST_NODEV) {
        return Err(wrong(format!("{} is mounted nodev", disks.display())));
    }
    let control = dm
        .control()
        .map_err(|error| wrong(format!("the kernel's device-mapper does not answer: {error}")))?;
    for target in TARGETS {
        if !control.has_target(target)? {
            return Err(wrong(format!("device-mapper has no target `{target}` (module dm-{target})")));
        }
    }
    loops::control(disks).map_err(|error| wrong(format!("there are no loop devices: {error}")))?;
    Ok(())
}

/// Whether this kernel has no device-mapper, so that there can be no devices of it.
pub(crate) fn is_missing(dm: &Dm) -> bool {
    dm.control().is_err()
}
