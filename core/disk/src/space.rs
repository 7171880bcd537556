//! Room on a filesystem.

use std::{io, path::Path};

use nix::sys::statvfs::statvfs;

use crate::DiskError;

/// Bytes that may still be written below `path`, which need not exist yet.
///
/// # Errors
/// No part of the path can be looked at.
pub fn free_bytes(path: &Path) -> Result<u64, DiskError> {
    let mut place = path;
    loop {
        match statvfs(place) {
            Ok(stat) => return Ok(stat.blocks_available() * stat.fragment_size()),
            Err(nix::Error::ENOENT) if place.parent().is_some_and(|parent| parent != Path::new("")) => {
                place = place.parent().unwrap_or(place);
            }
            Err(error) => {
                return Err(DiskError::Io {
                    action: "find the free space of",
                    path: path.to_owned(),
                    source: io::Error::from(error),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_yet_to_be_made_counts_as_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(dir.path()).unwrap() > 0);
        assert!(free_bytes(&dir.path().join("a/b/c")).unwrap() > 0);
        assert!(free_bytes(Path::new("/proc/none")).is_ok());
    }
}
