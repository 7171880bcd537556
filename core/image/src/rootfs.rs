//! Root filesystems: a tar archive becomes one read-only ext4 file.
//!
//! ```text
//!   tar, .gz, .zst, .xz ──> stream ──> archive ──> tree (scratch) ──> mke2fs -d ──> debugfs ──> rename ──> out
//!                             └─ SHA-256            └─ tally ─> plan ──┘
//! ```
//!
//! Kept exactly: types, modes, numeric owners, extended attributes (`SCHILY.xattr.*`, so capabilities, binary POSIX ACLs
//! and `user.*`), hard links, link targets, device numbers, contents, modification times. Blocks of zeros become holes.
//! Refused: paths beyond 2000 bytes, files beyond 1 TiB, attributes of one inode beyond one block.
//! Not kept: access and change times; ACLs that an archive has in text form only; sub-second times of names with newlines
//! or that are not UTF-8.

mod archive;
mod ext4;
mod extract;
mod header;
pub(crate) mod stream;
mod tree;

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

pub use ext4::LABEL;
use vm_host::Runner;
use vm_types::ImageDigest;

use crate::{
    ImageError,
    progress::{ProgressSink, Reporter, blocking},
    scratch::Scratch,
};

/// Where a tar stream comes from. Plain, gzip, Zstandard and xz are told apart by their first bytes.
pub enum TarSource {
    /// A file.
    Path(PathBuf),
    /// A stream, e.g. a client's upload. It is read on a thread of its own and may block; a reader that never returns keeps
    /// that thread even when the build was cancelled.
    Reader {
        /// The bytes.
        reader: Box<dyn Read + Send>,
        /// How many there will be, where that is known.
        length: Option<u64>,
    },
}

impl fmt::Debug for TarSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => f.debug_tuple("Path").field(path).finish(),
            Self::Reader { length, .. } => {
                f.debug_struct("Reader").field("length", length).finish_non_exhaustive()
            }
        }
    }
}

impl TarSource {
    fn open(self) -> Result<(Box<dyn Read + Send>, Option<u64>), ImageError> {
        match self {
            Self::Reader { reader, length } => Ok((reader, length)),
            Self::Path(path) => {
                let open = || {
                    let file = File::open(&path)?;
                    let about = file.metadata()?;
                    if about.is_dir() {
                        return Err(io::ErrorKind::IsADirectory.into());
                    }
                    // A pipe has no length.
                    io::Result::Ok((file, about.is_file().then_some(about.len())))
                };
                match open() {
                    Ok((file, length)) => Ok((Box::new(file), length)),
                    Err(source) => Err(ImageError::File { action: "open", path, source }),
                }
            }
        }
    }
}

/// A finished root filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltRootfs {
    /// SHA-256 of the uncompressed tar stream to its very end.
    pub digest: ImageDigest,
    /// Size of the filesystem in bytes.
    pub size_bytes: u64,
    /// Bytes it takes on the host's disk; the file is sparse.
    pub used_bytes: u64,
}

/// Makes a read-only (mode 0444) ext4 file of a tar archive. `out` appears whole or not at all; one that is there is
/// replaced. It should be on one filesystem with `scratch`, which needs room for the content twice over.
///
/// Needs root, for owners and device nodes. Dropping the future cancels; a directory made below `scratch` then vanishes
/// shortly after.
///
/// # Errors
/// An archive that is damaged, cut short or hostile; lack of room; `mke2fs` or `debugfs` failing or not being there.
pub async fn build(
    runner: &dyn Runner,
    source: TarSource,
    out: &Path,
    scratch: &Path,
    progress: ProgressSink,
) -> Result<BuiltRootfs, ImageError> {
    let scratch = Scratch::new(scratch, "rootfs-")?;
    let result = build_in(runner, source, out, &scratch, &Reporter::new(progress)).await;
    scratch.close().await;
    result
}

async fn build_in(
    runner: &dyn Runner,
    source: TarSource,
    out: &Path,
    scratch: &Scratch,
    reporter: &Reporter,
) -> Result<BuiltRootfs, ImageError> {
    let (directory, image) = (scratch.join("root"), scratch.join("image"));
    let unpacked = {
        let (directory, reporter) = (directory.clone(), reporter.clone());
        blocking(move |cancel| {
            let (input, length) = source.open()?;
            fs::create_dir(&directory).map_err(|source| ImageError::File {
                action: "make",
                path: directory.clone(),
                source,
            })?;
            extract::unpack(input, length, &directory, cancel, &reporter)
        })
        .await?
    };
    ext4::make(runner, &unpacked, &directory, &image, reporter).await?;
    reporter.report("writing to disk", 0, None);
    let out = out.to_owned();
    blocking(move |cancel| {
        cancel.check()?;
        let finish = || {
            fs::set_permissions(&image, fs::Permissions::from_mode(0o444))?;
            ext4::sync(&image)?;
            move_file(&image, &out)?;
            let about = fs::metadata(&out)?;
            io::Result::Ok(BuiltRootfs {
                digest: unpacked.digest,
                size_bytes: about.len(),
                used_bytes: about.blocks() * 512,
            })
        };
        finish().map_err(|source| ImageError::File { action: "finish", path: out.clone(), source })
    })
    .await
}

/// Renames, and makes that last through a crash of the host.
fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    ext4::sync(to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}
