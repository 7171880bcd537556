//! Images of the store, written for others: image layouts and Docker archives.
//!
//! The output appears under its name when it is whole, and nothing is overwritten. The same image gives the same bytes: no times, no
//! names of this host.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    Compression, Digest, Layer, MAX_DOCUMENT, OciError, Pulled, Reference, Store,
    document::{self, REF_NAME},
    store::{Cancel, Cancelled, blocking},
};

/// What an image is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// An image layout in a directory.
    Layout,
    /// An image layout in a tar archive.
    LayoutArchive,
    /// What `docker save` writes and `docker load` takes. Layers are uncompressed in it, and verified on the way.
    DockerArchive,
}

/// Writes an image to `path`, where nothing may be. `name` is the tag it has in a layout, or the reference in a Docker archive;
/// without one it is found by its digest alone.
///
/// Dropping the future cancels it: the thread that writes stops at its next piece, and removes what it has written.
///
/// # Errors
/// [`OciError::Exists`], [`OciError::Export`], [`OciError::Gone`], or [`OciError::Digest`] for a layer that does not unpack to what
/// the configuration says.
pub async fn export(
    image: &Pulled,
    store: &Store,
    form: Form,
    path: &Path,
    name: Option<&str>,
) -> Result<(), OciError> {
    let (image, store, path) = (image.clone(), store.clone(), path.to_owned());
    let name = name.map(str::to_owned);
    let cancel = Cancel::default();
    let cancelled = cancel.told();
    let work = blocking(move || {
        let job = Job { image: &image, store: &store, path: &path, name: name.as_deref(), cancelled };
        match form {
            Form::Layout => job.directory(),
            Form::LayoutArchive => job.archive(Job::layout_archive),
            Form::DockerArchive => job.archive(Job::docker_archive),
        }
    });
    let done = work.await;
    drop(cancel);
    done
}

struct Job<'a> {
    image: &'a Pulled,
    store: &'a Store,
    path: &'a Path,
    name: Option<&'a str>,
    cancelled: Cancelled,
}

type Output = tar::Builder<BufWriter<File>>;

impl Job<'_> {
    fn failed(&self) -> impl Fn(io::Error) -> OciError + '_ {
        |source| match source.kind() {
            io::ErrorKind::AlreadyExists => OciError::Exists { path: self.path.to_owned() },
            _ => OciError::Export { path: self.path.to_owned(), source },
        }
    }

    /// Of a blob, for copying.
    fn watched<R>(&self, reader: R) -> Watched<'_, R> {
        Watched { reader, cancelled: &self.cancelled }
    }

    /// To be asked before the output gets its name.
    fn go_on(&self) -> Result<(), OciError> {
        match self.cancelled.is() {
            true => Err(self.failed()(nobody_waits())),
            false => Ok(()),
        }
    }

    fn beside(&self) -> Result<PathBuf, OciError> {
        if self.path.symlink_metadata().is_ok() {
            return Err(OciError::Exists { path: self.path.to_owned() });
        }
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        Ok(parent.unwrap_or(Path::new(".")).to_owned())
    }

    /// The layout's own documents by their names.
    fn documents(&self) -> Result<[(&'static str, Vec<u8>); 2], OciError> {
        let manifest = self.store.read("image's manifest", &self.image.manifest_digest, MAX_DOCUMENT)?;
        let kind: Value = serde_json::from_slice(&manifest).unwrap_or_default();
        let mut entry = json!({
            "mediaType": kind["mediaType"].as_str().unwrap_or(document::MANIFEST),
            "digest": self.image.manifest_digest,
            "size": manifest.len(),
        });
        if let Some(platform) = self.image.config.platform() {
            entry["platform"] = json!({ "architecture": platform.architecture, "os": platform.os });
            if let Some(variant) = platform.variant {
                entry["platform"]["variant"] = variant.into();
            }
        }
        if let Some(name) = self.name {
            entry["annotations"] = json!({ REF_NAME: name });
        }
        let index = json!({ "schemaVersion": 2, "mediaType": document::INDEX, "manifests": [entry] });
        Ok([
            ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            ("index.json", index.to_string().into_bytes()),
        ])
    }

    fn directory(&self) -> Result<(), OciError> {
        let failed = self.failed();
        let parent = self.beside()?;
        let temporary = tempfile::Builder::new().prefix(".export-").tempdir_in(parent).map_err(&failed)?;
        let blobs = temporary.path().join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(&failed)?;
        for digest in self.image.digests() {
            let from = self.store.open_blob("blob", digest)?;
            let mut to = File::create_new(blobs.join(digest.hex())).map_err(&failed)?;
            if rustix::fs::ioctl_ficlone(&to, &from).is_err() {
                io::copy(&mut self.watched(from), &mut to).map_err(&failed)?;
            }
        }
        for (name, bytes) in self.documents()? {
            fs::write(temporary.path().join(name), bytes).map_err(&failed)?;
        }
        self.go_on()?;
        fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o755)).map_err(&failed)?;
        rustix::fs::renameat_with(
            rustix::fs::CWD,
            temporary.path(),
            rustix::fs::CWD,
            self.path,
            rustix::fs::RenameFlags::NOREPLACE,
        )
        .map_err(|error| failed(error.into()))?;
        // It has another name now.
        let _ = temporary.keep();
        Ok(())
    }

    fn archive(
        &self,
        write: impl FnOnce(&Self, &mut Output) -> Result<(), OciError>,
    ) -> Result<(), OciError> {
        let failed = self.failed();
        let parent = self.beside()?;
        let temporary = tempfile::Builder::new()
            .prefix(".export-")
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(parent)
            .map_err(&failed)?;
        let (file, place) = temporary.into_parts();
        let mut output = tar::Builder::new(BufWriter::with_capacity(256 << 10, file));
        write(self, &mut output)?;
        let finished =
            output.into_inner().and_then(|writer| writer.into_inner().map_err(|error| error.into_error()));
        finished.and_then(|file| file.sync_all()).map_err(&failed)?;
        self.go_on()?;
        place.persist_noclobber(self.path).map_err(|error| failed(error.error))
    }

    fn layout_archive(&self, output: &mut Output) -> Result<(), OciError> {
        let failed = self.failed();
        let [marker, index] = self.documents()?;
        for (name, bytes) in [marker, index] {
            append(output, name, bytes.len() as u64, &bytes[..]).map_err(&failed)?;
        }
        for digest in self.image.digests() {
            let file = self.store.open_blob("blob", digest)?;
            let size = file.metadata().map_err(&failed)?.len();
            append(output, &format!("blobs/sha256/{}", digest.hex()), size, self.watched(file))
                .map_err(&failed)?;
        }
        Ok(())
    }

    fn docker_archive(&self, output: &mut Output) -> Result<(), OciError> {
        let failed = self.failed();
        let image = self.image;
        let config = format!("{}.json", image.config_digest.hex());
        let file = self.store.open_blob("image's configuration", &image.config_digest)?;
        let size = file.metadata().map_err(&failed)?.len();
        append(output, &config, size, file).map_err(&failed)?;
        let path = |layer: &Layer| format!("{}.tar", layer.diff_id.hex());
        let mut written = std::collections::HashSet::new();
        for layer in image.layers.iter().filter(|layer| written.insert(layer.diff_id)) {
            self.layer(output, &path(layer), layer)?;
        }
        // As Docker itself prints it: it would not find it by the full form.
        let tags: Vec<String> = match self.name {
            Some(name) => {
                let reference: Reference = name.parse()?;
                let tag = reference.tag().unwrap_or("latest");
                vec![format!("{}:{tag}", reference.with_tag("latest")?.familiar())]
            }
            None => Vec::new(),
        };
        let layers: Vec<String> = image.layers.iter().map(path).collect();
        let list = json!([{ "Config": config, "RepoTags": tags, "Layers": layers }]).to_string();
        append(output, "manifest.json", list.len() as u64, list.as_bytes()).map_err(&failed)
    }

    /// A layer, unpacked. How long it is, is known when it has been written; the header is then put right.
    fn layer(&self, output: &mut Output, name: &str, layer: &Layer) -> Result<(), OciError> {
        let failed = self.failed();
        let file = self.store.open_blob("layer", &layer.digest)?;
        let reader: Box<dyn Read> = match layer.compression {
            Compression::None => Box::new(file),
            Compression::Gzip => {
                Box::new(flate2::bufread::MultiGzDecoder::new(io::BufReader::with_capacity(256 << 10, file)))
            }
            Compression::Zstd => Box::new(zstd::Decoder::new(file).map_err(&failed)?),
        };
        let what = || format!("layer {}", layer.digest);
        // The builder's own functions want the size first; its writer is at the end of the last entry.
        let writer = output.get_mut();
        let start = writer.stream_position().map_err(&failed)?;
        writer.write_all(header(name, 0).as_bytes()).map_err(&failed)?;
        let mut reader = Hashing { reader: self.watched(reader), hasher: Sha256::new() };
        let size = io::copy(&mut reader, writer).map_err(|error| match error.raw_os_error() {
            Some(_) => failed(error),
            None if self.cancelled.is() => failed(error),
            // The decompressor's.
            None => OciError::Malformed { what: what(), reason: crate::error::plain(&error.to_string()) },
        })?;
        match Digest::finished(reader.hasher) {
            found if found == layer.diff_id => {}
            found => {
                return Err(OciError::Digest {
                    what: format!("unpacked {}", what()),
                    found,
                    expected: layer.diff_id,
                });
            }
        }
        let padding = [0; 512];
        let fill = (512 - usize::try_from(size % 512).unwrap_or_default()) % 512;
        let patch = |writer: &mut BufWriter<File>| {
            writer.write_all(&padding[..fill])?;
            writer.seek(SeekFrom::Start(start))?;
            writer.write_all(header(name, size).as_bytes())?;
            writer.seek(SeekFrom::End(0)).map(drop)
        };
        patch(writer).map_err(&failed)
    }
}

/// Ends with an error once nobody waits any more.
struct Watched<'a, R> {
    reader: R,
    cancelled: &'a Cancelled,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        if self.cancelled.is() { Err(nobody_waits()) } else { self.reader.read(piece) }
    }
}

fn nobody_waits() -> io::Error {
    io::Error::other("cancelled")
}

struct Hashing<R> {
    reader: R,
    hasher: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(piece)?;
        self.hasher.update(&piece[..read]);
        Ok(read)
    }
}

/// For a name of at most 100 bytes, which all here are.
fn header(name: &str, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0o444);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    header
}

fn append(output: &mut Output, name: &str, size: u64, reader: impl Read) -> io::Result<()> {
    output.append(&header(name, size), reader)
}
