//! Root filesystems: a tar archive, or the layers of an OCI image, become one read-only ext4 file.
//!
//! ```text
//!   layer 1 ──> stream ─┐                               ┌─> contents ──┐
//!   layer 2 ──> stream ─┼─ in order ─> archive ─> merge ─┤              ├─> ext4 ──> rename ──> out
//!   layer 3 ──> stream ─┘                               └─> tree ──────┘
//!               └─ decompressed ahead, SHA-256
//! ```
//!
//! Contents go from the stream to the block where they stay; nothing is unpacked into directories, no tool is run, and no
//! privilege is needed. Memory: for each of four layers at most that are read at once 32 MiB, and what its decompressor
//! needs (xz 256 MiB at most and Zstandard 128 MiB, more is refused); some 300 bytes for each entry, and names, link
//! targets and attributes. Disk: the image itself; what an upper layer replaces is given back as soon as it is.
//!
//! Kept exactly: types, modes, numeric owners, extended attributes (`SCHILY.xattr.*`, so capabilities, binary POSIX ACLs
//! and `user.*`), hard links, link targets, device numbers, contents, modification times to the nanosecond. Blocks of
//! zeros become holes. The same layers under the same identity give the same bytes.
//! Refused, with the path named: names that leave the root with ".." (module `merge` says how names and links are
//! followed; none leads out); paths beyond 4095 bytes and names beyond 255; more than 3,000,000 entries, or 1 GiB of their
//! names, link targets and attributes; files or images beyond 1 TiB; archives that unpack to more than 16 GiB and 200 times
//! their size; attributes of one inode beyond one block. The last 256 MiB of the host's disk are not used.
//! Not kept: access and change times, which become the modification time; ACLs that an archive has in text form only;
//! attributes of name spaces that Linux does not have, and `user.*` where Linux allows none.

pub(crate) mod archive;
pub(crate) mod flatten;
mod header;
mod merge;
pub(crate) mod stream;

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use vm_types::ImageDigest;

use self::flatten::{Identify, Input, Layer};
pub use crate::ext4::LABEL;
use crate::{
    ImageError,
    progress::{Cancel, ProgressSink, Reporter, blocking},
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

/// One layer of an image. Its blob is a tar archive, plain or compressed with gzip, Zstandard or xz, which its first bytes
/// tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSource {
    /// The file that has the blob.
    pub blob: PathBuf,
    /// What the blob's SHA-256 must be, as `sha256:` and 64 digits.
    pub digest: Option<String>,
    /// What the SHA-256 of the uncompressed archive must be, in the same form.
    pub diff_id: Option<String>,
}

/// A finished root filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltRootfs {
    /// What identifies it: for one archive the SHA-256 of the uncompressed tar stream to its very end, for layers what the
    /// caller said.
    pub digest: ImageDigest,
    /// Size of the filesystem in bytes.
    pub size_bytes: u64,
    /// Bytes it takes on the host's disk; the file is sparse.
    pub used_bytes: u64,
}

/// Makes a read-only (mode 0444) ext4 file of a tar archive. `out` appears whole or not at all; one that is there is
/// replaced. It should be on one filesystem with `scratch`, where it is made. Names like `.wh.x` are names.
///
/// Dropping the future cancels; a directory made below `scratch` then vanishes shortly after.
///
/// # Errors
/// An archive that is damaged, cut short or hostile; lack of room.
pub async fn build(
    source: TarSource,
    out: &Path,
    scratch: &Path,
    progress: ProgressSink,
) -> Result<BuiltRootfs, ImageError> {
    let open = move || {
        let (reader, length) = source.open()?;
        Ok((
            vec![Layer { input: Input::Open(reader, length), digest: None, diff_id: None }],
            Identify::ByStream,
        ))
    };
    make(open, false, out, scratch, progress).await
}

/// Makes a read-only (mode 0444) ext4 file of an image's layers, the lowest first, by the rules of the OCI image
/// specification. `identity` is what tells the image from others: its configuration's digest; the filesystem's UUID is
/// made of it. `out`, `scratch` and cancelling are as of [`build`].
///
/// # Errors
/// A layer that is damaged, cut short, hostile or not what its digests say; lack of room.
pub async fn flatten(
    layers: Vec<LayerSource>,
    identity: ImageDigest,
    out: &Path,
    scratch: &Path,
    progress: ProgressSink,
) -> Result<BuiltRootfs, ImageError> {
    let open = move || {
        let layers = layers.into_iter().map(|layer| {
            let name = layer.blob.display().to_string();
            let parse = |digest: Option<String>| digest.map(|digest| parsed(&digest, &name)).transpose();
            let (digest, diff_id) = (parse(layer.digest)?, parse(layer.diff_id)?);
            Ok(Layer { input: Input::Blob(layer.blob), digest, diff_id })
        });
        Ok((layers.collect::<Result<_, ImageError>>()?, Identify::By(identity)))
    };
    make(open, true, out, scratch, progress).await
}

fn parsed(digest: &str, blob: &str) -> Result<ImageDigest, ImageError> {
    ImageDigest::try_from(digest.to_owned()).map_err(|_| ImageError::CorruptArchive {
        last: String::new(),
        reason: format!("the digest {digest:?} of {blob} is not sha256: and 64 digits"),
    })
}

async fn make(
    open: impl FnOnce() -> Result<(Vec<Layer>, Identify), ImageError> + Send + 'static,
    whiteouts: bool,
    out: &Path,
    scratch: &Path,
    progress: ProgressSink,
) -> Result<BuiltRootfs, ImageError> {
    let scratch = Scratch::new(scratch, "rootfs-")?;
    let reporter = Reporter::new(progress);
    let (image, out) = (scratch.join("image"), out.to_owned());
    let result = blocking(move |cancel| {
        let (layers, identify) = open()?;
        let digest = flatten::flatten(layers, whiteouts, identify, &image, cancel, &reporter)?;
        settle(digest, &image, &out, cancel, &reporter)
    })
    .await;
    scratch.close().await;
    result
}

/// Puts a filesystem that is whole in its place.
pub(crate) fn settle(
    digest: ImageDigest,
    image: &Path,
    out: &Path,
    cancel: &Cancel,
    reporter: &Reporter,
) -> Result<BuiltRootfs, ImageError> {
    reporter.report("writing to disk", 0, None);
    cancel.check()?;
    let finish = || {
        fs::set_permissions(image, fs::Permissions::from_mode(0o444))?;
        sync(image)?;
        move_file(image, out)?;
        let about = fs::metadata(out)?;
        io::Result::Ok(BuiltRootfs { digest, size_bytes: about.len(), used_bytes: about.blocks() * 512 })
    };
    finish().map_err(|source| ImageError::File { action: "finish", path: out.to_owned(), source })
}

/// Renames, and makes that last through a crash of the host.
fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync(to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// Flushes a file to the disk.
fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
