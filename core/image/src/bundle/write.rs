//! Bundles, written.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Cursor, Read, Seek, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use vm_types::{ImageDigest, image::ImageConfig};

use super::{FORMAT, METADATA, Member, Metadata, Part, host_platform};
use crate::{
    ImageError, ProgressSink,
    kernel::carry,
    progress::{Cancel, Reporter, blocking},
    rootfs::flatten::digest_of,
};

const CHUNK: usize = 1 << 20;
/// Zstandard's own default.
const LEVEL: i32 = 3;

/// What is to be in a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// What it is called.
    pub name: Option<String>,
    /// A file with the root filesystem, ext4.
    pub rootfs: PathBuf,
    /// The directory of an installed kernel.
    pub kernel: Option<PathBuf>,
    /// How its commands run.
    pub config: ImageConfig,
}

/// Writes a bundle to `out`, where nothing may be: it appears when it is whole. Answers the digest that it is known by.
///
/// Dropping the future cancels; nothing is left then.
///
/// # Errors
/// [`ImageError::Exists`], or a file that cannot be read or written.
pub async fn write(
    contents: Contents,
    out: &Path,
    progress: ProgressSink,
) -> Result<ImageDigest, ImageError> {
    let (out, reporter) = (out.to_owned(), Reporter::new(progress));
    blocking(move |cancel| {
        if out.symlink_metadata().is_ok() {
            return Err(ImageError::Exists { path: out });
        }
        let parts = match &contents.kernel {
            Some(directory) => Some(carry::parts(directory)?),
            None => None,
        };
        let mut sources = Vec::new();
        if let Some(carry::Parts { vmlinuz, modules, config }) = parts {
            sources.push((Part::Kernel, Source::File(vmlinuz)));
            sources.push((Part::Modules, Source::Bytes(modules)));
            sources.extend(config.map(|config| (Part::KernelConfig, Source::Bytes(config))));
        }
        sources.push((Part::Ext4, Source::File(contents.rootfs)));
        let mut members = BTreeMap::new();
        for (part, source) in &sources {
            members.insert(*part, source.member(cancel, &reporter)?);
        }
        let total = members.values().map(|member| member.size).sum();
        let metadata = Metadata {
            format: FORMAT,
            name: contents.name,
            platform: host_platform(),
            parts: members,
            config: contents.config,
        };
        let text = serde_json::to_vec_pretty(&metadata).map_err(|error| failed(&out)(error.into()))?;
        let sources = sources.into_iter();
        let write = |output| {
            let watched = Watched { output, cancel, reporter: &reporter, done: 0, total };
            let mut archive = tar::Builder::new(watched);
            archive.mode(tar::HeaderMode::Deterministic);
            append(&mut archive, METADATA, &text)?;
            for (part, source) in sources {
                match source {
                    Source::Bytes(bytes) => append(&mut archive, part.name(), &bytes)?,
                    // Holes stay holes.
                    Source::File(path) => archive.append_file(part.name(), &mut File::open(path)?)?,
                }
            }
            archive.into_inner().map(|watched| watched.output)
        };
        settle(&out, write).map_err(|error| match error.kind() {
            _ if cancel.check().is_err() => ImageError::Cancelled,
            io::ErrorKind::AlreadyExists => ImageError::Exists { path: out.clone() },
            _ => failed(&out)(error),
        })?;
        digest_of(&Sha256::digest(&text).into())
    })
    .await
}

fn failed(out: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = out.to_owned();
    move |source| ImageError::File { action: "write", path, source }
}

type Output = zstd::Encoder<'static, BufWriter<File>>;

/// Gives what is written its name once it is whole.
fn settle(out: &Path, write: impl FnOnce(Output) -> io::Result<Output>) -> io::Result<()> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = tempfile::Builder::new()
        .prefix(".export-")
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(parent)?;
    let (file, place) = temporary.into_parts();
    let mut output = zstd::Encoder::new(BufWriter::with_capacity(CHUNK, file), LEVEL)?;
    output.include_checksum(true)?;
    let file = write(output)?.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    place.persist_noclobber(out).map_err(|error| error.error)
}

fn append(archive: &mut tar::Builder<Watched<'_>>, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(bytes.len() as u64);
    archive.append_data(&mut header, name, Cursor::new(bytes))
}

enum Source {
    File(PathBuf),
    Bytes(Vec<u8>),
}

impl Source {
    /// What is written of it before it is.
    fn member(&self, cancel: &Cancel, reporter: &Reporter) -> Result<Member, ImageError> {
        let path = match self {
            Self::Bytes(bytes) => {
                return Ok(Member {
                    digest: digest_of(&Sha256::digest(bytes).into())?,
                    size: bytes.len() as u64,
                });
            }
            Self::File(path) => path,
        };
        let failed = |source| ImageError::File { action: "read", path: path.clone(), source };
        let mut file = File::open(path).map_err(failed)?;
        let total = file.seek(io::SeekFrom::End(0)).and_then(|end| file.rewind().map(|()| end));
        let total = total.map_err(failed)?;
        let (mut hasher, mut chunk, mut size) = (Sha256::new(), vec![0; CHUNK], 0);
        loop {
            cancel.check()?;
            match file.read(&mut chunk).map_err(failed)? {
                0 => break,
                count => {
                    hasher.update(&chunk[..count]);
                    size += count as u64;
                    reporter.report("reading", size, Some(total));
                }
            }
        }
        Ok(Member { digest: digest_of(&hasher.finalize().into())?, size })
    }
}

/// Tells how far it is, and ends with an error once nobody waits any more.
struct Watched<'a> {
    output: Output,
    cancel: &'a Cancel,
    reporter: &'a Reporter,
    done: u64,
    total: u64,
}

impl Write for Watched<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.cancel.check().map_err(io::Error::other)?;
        let count = self.output.write(bytes)?;
        self.done += count as u64;
        self.reporter.report("compressing", self.done.min(self.total), Some(self.total));
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}
