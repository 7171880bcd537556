//! Root filesystems that are used where they are: a file of the host's, never written and never removed.
//!
//! Such a file is known by its content, and known to be the same by what the host's filesystem says of it: number, size and time of
//! the last change. Whoever is about to use it asks [`check`], and once more afterwards where it was read at length.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::Path,
};

use sha2::{Digest, Sha256};
use vm_types::{ImageDigest, image::RegisteredFile};

use crate::{
    ImageError,
    progress::{Cancel, ProgressSink, Reporter, blocking},
    rootfs::stream::hex,
};

const CHUNK: usize = 1 << 20;
/// Where a superblock is, and what of it is read (Linux, Documentation/filesystems/ext4/super.rst).
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC: (usize, u16) = (0x38, 0xEF53);
const BLOCKS_LOW: usize = 0x4;
const BLOCK_SIZE: usize = 0x18;
const INCOMPATIBLE: usize = 0x60;
const BLOCKS_HIGH: usize = 0x150;
const NEEDS_RECOVERY: u32 = 0x4;
const SIXTY_FOUR_BIT: u32 = 0x80;

/// Looks whether `path` holds an ext4 filesystem that nobody has mounted, and reads all of it.
///
/// # Errors
/// A file that is none, is mounted or was not unmounted cleanly, or changes while it is read.
pub async fn inspect(
    path: &Path,
    progress: ProgressSink,
) -> Result<(ImageDigest, RegisteredFile), ImageError> {
    let (path, reporter) = (path.to_owned(), Reporter::new(progress));
    blocking(move |cancel| {
        let file = about(&path)?;
        filesystem(&file)?;
        let digest =
            read(&file, cancel, |done| reporter.report("reading", done, Some(file.size_bytes)), None)?;
        check(&file)?;
        Ok((digest, file))
    })
    .await
}

/// Whether the file is as it was when it was registered.
///
/// # Errors
/// [`ImageError::RegisteredChanged`], [`ImageError::File`] where it is gone.
pub fn check(file: &RegisteredFile) -> Result<(), ImageError> {
    if about(&file.path)? == *file {
        Ok(())
    } else {
        Err(ImageError::RegisteredChanged { path: file.path.clone() })
    }
}

/// Copies the file to `out`, read-only, with its holes; what is there is replaced. It has to have this digest.
///
/// # Errors
/// A file that has changed, or lack of room. `out` is then as it was.
pub async fn copy(
    file: &RegisteredFile,
    digest: &ImageDigest,
    out: &Path,
    progress: ProgressSink,
) -> Result<(), ImageError> {
    let (file, digest, out) = (file.clone(), digest.clone(), out.to_owned());
    let reporter = Reporter::new(progress);
    blocking(move |cancel| {
        check(&file)?;
        let failed = |source| ImageError::File { action: "write", path: out.clone(), source };
        let directory = out.parent().unwrap_or(Path::new("/"));
        let mut copy = tempfile::Builder::new().prefix("promote-").tempfile_in(directory).map_err(failed)?;
        let report = |done| reporter.report("copying", done, Some(file.size_bytes));
        let found = read(&file, cancel, report, Some(copy.as_file_mut()))?;
        check(&file)?;
        if found != digest {
            return Err(ImageError::RegisteredChanged { path: file.path.clone() });
        }
        let keep = || {
            copy.as_file().set_len(file.size_bytes)?;
            copy.as_file().set_permissions(fs::Permissions::from_mode(0o444))?;
            copy.as_file().sync_all()?;
            copy.persist(&out).map_err(|error| error.error)?;
            File::open(directory)?.sync_all()
        };
        keep().map_err(failed)
    })
    .await
}

fn about(path: &Path) -> Result<RegisteredFile, ImageError> {
    let failed = |source| ImageError::File { action: "look at", path: path.to_owned(), source };
    let path = fs::canonicalize(path).map_err(failed)?;
    let about = fs::metadata(&path).map_err(failed)?;
    if !about.is_file() {
        return Err(not_one(&path, "it is no regular file"));
    }
    Ok(RegisteredFile {
        size_bytes: about.len(),
        modified_nanos: about.mtime().saturating_mul(1_000_000_000).saturating_add(about.mtime_nsec()),
        inode: about.ino(),
        path,
    })
}

fn not_one(path: &Path, reason: &str) -> ImageError {
    ImageError::NotAFilesystem { path: path.to_owned(), reason: reason.to_owned() }
}

/// Whether there is an ext4 filesystem in the file that was unmounted.
///
/// # Errors
/// [`ImageError::NotAFilesystem`], or the file cannot be read.
pub(crate) fn verify(path: &Path) -> Result<(), ImageError> {
    filesystem(&about(path)?)
}

fn filesystem(file: &RegisteredFile) -> Result<(), ImageError> {
    let path = &file.path;
    let failed = |source| ImageError::File { action: "read", path: path.clone(), source };
    let mut block = [0; SUPERBLOCK_BYTES];
    match File::open(path).map_err(failed)?.read_exact_at(&mut block, SUPERBLOCK) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(not_one(path, "it is too small"));
        }
        other => other.map_err(failed)?,
    }
    let u32_at = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    if u16::from_le_bytes([block[MAGIC.0], block[MAGIC.0 + 1]]) != MAGIC.1 {
        return Err(not_one(path, "it holds no ext4 filesystem; a disk with partitions is none"));
    }
    let features = u32_at(INCOMPATIBLE);
    if features & NEEDS_RECOVERY != 0 {
        return Err(not_one(path, "its filesystem is mounted, or was not unmounted"));
    }
    let high = if features & SIXTY_FOUR_BIT != 0 { u64::from(u32_at(BLOCKS_HIGH)) } else { 0 };
    let blocks = high << 32 | u64::from(u32_at(BLOCKS_LOW));
    let bytes = blocks.checked_mul(1024_u64.checked_shl(u32_at(BLOCK_SIZE)).unwrap_or(u64::MAX));
    if bytes.is_none_or(|bytes| bytes > file.size_bytes) {
        return Err(not_one(path, "the file is shorter than its filesystem"));
    }
    Ok(())
}

/// The digest of the content, which is copied too if there is where to. Blocks of zeros are left out there.
fn read(
    file: &RegisteredFile,
    cancel: &Cancel,
    report: impl Fn(u64),
    mut to: Option<&mut File>,
) -> Result<ImageDigest, ImageError> {
    let failed = |source| ImageError::File { action: "read", path: file.path.clone(), source };
    let mut from = File::open(&file.path).map_err(failed)?;
    let (mut hash, mut done, mut chunk) = (Sha256::new(), 0, vec![0; CHUNK]);
    loop {
        cancel.check()?;
        let count = from.read(&mut chunk).map_err(failed)?;
        let Some(bytes) = chunk.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
        hash.update(bytes);
        if let Some(to) = &mut to {
            let write = |to: &mut File| match bytes.iter().all(|&byte| byte == 0) {
                true => to.seek(SeekFrom::Current(bytes.len() as i64)).map(drop),
                false => to.write_all(bytes),
            };
            write(to).map_err(|source| ImageError::File {
                action: "copy",
                path: file.path.clone(),
                source,
            })?;
        }
        done += bytes.len() as u64;
        report(done);
    }
    ImageDigest::try_from(format!("sha256:{}", hex(&hash.finalize())))
        .map_err(|error| failed(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use std::{process::Command, sync::Arc};

    use super::*;

    fn make() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.ext4");
        let made = Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&path).arg("8M").status();
        assert!(made.expect("mke2fs of the package e2fsprogs is needed").success());
        (dir, path)
    }

    fn quiet() -> ProgressSink {
        Arc::new(|_| ())
    }

    fn patch(path: &Path, at: u64, bytes: &[u8]) {
        File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
    }

    #[tokio::test]
    async fn a_file_is_known_by_its_content_and_copied_with_its_holes() {
        let (dir, path) = make();
        let (digest, file) = inspect(&path, quiet()).await.unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(inspect(&link, quiet()).await.unwrap(), (digest.clone(), file.clone()));
        let out = dir.path().join("out");
        std::os::unix::fs::symlink(&path, &out).unwrap();
        copy(&file, &digest, &out, quiet()).await.unwrap();
        assert_eq!(fs::read(&out).unwrap(), fs::read(&path).unwrap());
        let about = fs::symlink_metadata(&out).unwrap();
        assert!(about.is_file() && about.blocks() * 512 < about.len() && about.mode() & 0o777 == 0o444);
    }

    #[tokio::test]
    async fn a_file_that_changes_is_told() {
        let (dir, path) = make();
        let (digest, file) = inspect(&path, quiet()).await.unwrap();
        patch(&path, 7 << 20, b"changed");
        let out = dir.path().join("out");
        for error in [check(&file).unwrap_err(), copy(&file, &digest, &out, quiet()).await.unwrap_err()] {
            assert!(
                matches!(error, ImageError::RegisteredChanged { .. }) && error.hint().is_some(),
                "{error}"
            );
        }
        // The same stamp and another content.
        let file = RegisteredFile { ..about(&path).unwrap() };
        let error = copy(&file, &digest, &out, quiet()).await.unwrap_err();
        assert!(matches!(error, ImageError::RegisteredChanged { .. }), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn what_is_no_filesystem_of_ours_is_refused_with_the_reason() {
        let (dir, path) = make();
        let reason = async |path: &Path| match inspect(path, quiet()).await.unwrap_err() {
            ImageError::NotAFilesystem { reason, .. } => reason,
            other => panic!("{other}"),
        };
        assert!(reason(dir.path()).await.contains("regular"));
        fs::write(dir.path().join("short"), b"x").unwrap();
        assert!(reason(&dir.path().join("short")).await.contains("small"));
        File::options().write(true).open(&path).unwrap().set_len(4 << 20).unwrap();
        assert!(reason(&path).await.contains("shorter"));
        patch(&path, SUPERBLOCK + INCOMPATIBLE as u64, &[0xC6]);
        assert!(reason(&path).await.contains("mounted"));
        patch(&path, SUPERBLOCK + MAGIC.0 as u64, &[0]);
        assert!(reason(&path).await.contains("ext4"));
    }
}
