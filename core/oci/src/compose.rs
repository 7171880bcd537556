//! Images that are made here: a layer as it is written, and the documents that make an image of layers.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::PathBuf,
};

use bytes::Bytes;
use oci_distribution::manifest::{OciDescriptor, OciImageManifest};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::{
    Compression, Digest, ImageConfig, Layer, Lease, OciError, Platform, Pulled, Store,
    document::{self, Document, Manifest},
    image::Parts,
    store::{STRIDE, blocking},
};

/// Pieces that may wait to be compressed.
const QUEUE: usize = 16;
/// Zstandard's own default: a disk is hardly faster.
const LEVEL: i32 = 3;
/// Bytes that are written to the disk at once.
const BUFFER: usize = 256 << 10;

/// A layer in the making: a plain tar archive goes in, and is compressed and hashed by a thread of its own. Its file has no
/// name before [`LayerDraft::finish`], so whatever happens, nothing of it stays.
#[derive(Debug)]
pub struct LayerDraft {
    store: Store,
    queue: mpsc::Sender<Bytes>,
    writer: JoinHandle<Result<Made, OciError>>,
}

/// A layer that is whole.
#[derive(Debug)]
struct Made {
    file: File,
    digest: Digest,
    diff_id: Digest,
    size: u64,
}

/// Hashes and counts what goes through.
struct Hashed<W> {
    to: W,
    hasher: Sha256,
    size: u64,
}

impl<W: Write> Hashed<W> {
    fn new(to: W) -> Self {
        Self { to, hasher: Sha256::new(), size: 0 }
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

impl LayerDraft {
    /// Begins a layer.
    pub fn begin(store: &Store) -> Self {
        let (queue, mut pieces) = mpsc::channel::<Bytes>(QUEUE);
        let directory = store.scratch().to_owned();
        let within = directory.clone();
        let writer = tokio::task::spawn_blocking(move || {
            let failed = |action, path: PathBuf| move |source| OciError::Store { action, path, source };
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            let file = openat(CWD, &directory, flags, Mode::RUSR | Mode::WUSR)
                .map_err(|error| failed("make a file in", directory.clone())(error.into()))?;
            let write = |mut pieces: Box<dyn FnMut() -> Option<Bytes>>| {
                let file = BufWriter::with_capacity(BUFFER, File::from(file));
                let mut tar = Hashed::new(zstd::Encoder::new(Hashed::new(file), LEVEL)?);
                let mut unchecked = STRIDE;
                while let Some(piece) = pieces() {
                    if unchecked >= STRIDE {
                        vm_host::files::room(&within, STRIDE)?;
                        unchecked = 0;
                    }
                    unchecked += piece.len() as u64;
                    tar.write_all(&piece)?;
                }
                let blob = tar.to.finish()?;
                let file = blob.to.into_inner().map_err(io::IntoInnerError::into_error)?;
                Ok(Made {
                    file,
                    digest: Digest::finished(blob.hasher),
                    diff_id: Digest::finished(tar.hasher),
                    size: blob.size,
                })
            };
            write(Box::new(move || pieces.blocking_recv())).map_err(failed("write in", directory))
        });
        Self { store: store.clone(), queue, writer }
    }

    /// Goes on with it. Waits while the disk or the compression is behind.
    ///
    /// # Errors
    /// [`OciError::Store`]; nothing more can be written then.
    pub async fn write(&mut self, piece: Bytes) -> Result<(), OciError> {
        if self.queue.send(piece).await.is_ok() {
            return Ok(());
        }
        // It ends before the queue only with an error.
        (&mut self.writer).await.map_err(|source| OciError::Broken { source })?.map(drop)
    }

    /// Makes it a blob of the store, which `lease` keeps.
    ///
    /// # Errors
    /// [`OciError::Store`].
    pub async fn finish(self, lease: &Lease) -> Result<Layer, OciError> {
        drop(self.queue);
        let made = self.writer.await.map_err(|source| OciError::Broken { source })??;
        lease.add(made.digest);
        let layer = Layer {
            digest: made.digest,
            diff_id: made.diff_id,
            size: made.size,
            media_type: format!("{}+zstd", document::LAYER),
            compression: Compression::Zstd,
        };
        let claim = self.store.claim(made.digest).await;
        let path = self.store.path(&made.digest);
        blocking(move || {
            let failed = |action| {
                let path = path.clone();
                move |source: io::Error| OciError::Store { action, path, source }
            };
            made.file.set_permissions(fs::Permissions::from_mode(0o444)).map_err(failed("make read-only"))?;
            made.file.sync_all().map_err(failed("flush"))?;
            let own = format!("/proc/self/fd/{}", made.file.as_raw_fd());
            match linkat(CWD, own, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
                // What has that name has that content.
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(failed("name")(error.into())),
            }
            if let Some(directory) = path.parent() {
                File::open(directory).and_then(|file| file.sync_all()).map_err(failed("flush"))?;
            }
            drop(claim);
            Ok(())
        })
        .await?;
        Ok(layer)
    }
}

/// Makes an image of layers that are in the store. Digests of unpacked layers are the layers' own, whatever `config` has.
///
/// # Errors
/// [`OciError::Store`], or [`OciError::Malformed`] for what no image can be.
pub async fn compose(
    store: &Store,
    lease: Lease,
    config: &ImageConfig,
    layers: &[Layer],
) -> Result<Pulled, OciError> {
    let config = written(config, layers);
    let config = serde_json::to_vec(&config).map_err(|error| OciError::Malformed {
        what: "image's configuration".to_owned(),
        reason: error.to_string(),
    })?;
    let blob = described(document::CONFIG, Digest::of(&config), config.len() as u64)?;
    let layers = layers.iter().map(|layer| described(&layer.media_type, layer.digest, layer.size));
    let (bytes, manifest) = manifest(blob, layers.collect::<Result<_, _>>()?)?;
    let parts = Parts::of(&manifest, &config, &Platform::host())?;
    let size = bytes.len() as u64;
    store.put(&lease, config).await?;
    let digest = store.put(&lease, bytes).await?;
    Ok(parts.pulled(digest, size, None, &manifest, Vec::new(), lease))
}

/// The configuration's document; what is empty is left out, as others do it.
fn written(config: &ImageConfig, layers: &[Layer]) -> Value {
    let set = |names: &[String]| names.iter().map(|name| (name.clone(), json!({}))).collect::<Map<_, _>>();
    let run = json!({
        "Env": config.env, "WorkingDir": config.working_dir, "User": config.user, "Entrypoint": config.entrypoint,
        "Cmd": config.cmd, "Labels": config.labels, "ExposedPorts": set(&config.exposed_ports),
        "Volumes": set(&config.volumes), "StopSignal": config.stop_signal,
    });
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
    let mut document = json!({
        "architecture": config.architecture, "os": config.os, "variant": config.variant, "created": config.created,
        "author": config.author, "config": full(run), "history": config.history,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    if config.architecture.is_empty() {
        let Platform { os, architecture, variant } = Platform::host();
        document["os"] = os.into();
        document["architecture"] = architecture.into();
        document["variant"] = variant.into();
    }
    full(document)
}

/// An object without what is empty in it.
fn full(value: Value) -> Value {
    let is_empty = |value: &Value| match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(all) => all.is_empty(),
        _ => false,
    };
    match value {
        Value::Object(map) => map.into_iter().filter(|(_, value)| !is_empty(value)).collect(),
        other => other,
    }
}

/// An image's manifest, as it is written and as it is read.
pub(crate) fn manifest(
    config: OciDescriptor,
    layers: Vec<OciDescriptor>,
) -> Result<(Vec<u8>, Manifest), OciError> {
    let malformed = |reason| OciError::Malformed { what: "image's manifest".to_owned(), reason };
    let manifest = OciImageManifest {
        media_type: Some(document::MANIFEST.to_owned()),
        config,
        layers,
        ..OciImageManifest::default()
    };
    let bytes = serde_json::to_vec(&manifest).map_err(|error| malformed(error.to_string()))?;
    match document::parse(&bytes, None)? {
        Document::Image(manifest) => Ok((bytes, manifest)),
        Document::Index(_) => Err(malformed("it is an index".to_owned())),
    }
}

/// A blob, for a manifest.
pub(crate) fn described(media_type: &str, digest: Digest, size: u64) -> Result<OciDescriptor, OciError> {
    let size = i64::try_from(size).map_err(|_| OciError::Malformed {
        what: format!("blob {digest}"),
        reason: format!("{size} bytes are too many"),
    })?;
    Ok(OciDescriptor {
        media_type: media_type.to_owned(),
        digest: digest.to_string(),
        size,
        ..OciDescriptor::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::History;

    #[tokio::test]
    async fn an_image_is_made_of_a_layer_and_is_there_for_good() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let tar: Vec<u8> = (0..2_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 21) as u8).collect();
        let made = async || {
            let mut draft = LayerDraft::begin(&store);
            for piece in tar.chunks(70_000) {
                draft.write(Bytes::copy_from_slice(piece)).await.unwrap();
            }
            let lease = store.lease();
            let layer = draft.finish(&lease).await.unwrap();
            let config = ImageConfig {
                env: vec!["A=b".into()],
                cmd: vec!["run".into()],
                user: "me".into(),
                volumes: vec!["/data".into()],
                labels: [("a".to_owned(), "b".to_owned())].into(),
                history: vec![
                    History { created_by: Some("before".into()), empty_layer: true, ..History::default() },
                    History { created_by: Some("now".into()), ..History::default() },
                ],
                ..ImageConfig::default()
            };
            let image = compose(&store, lease, &config, std::slice::from_ref(&layer)).await.unwrap();
            assert_eq!(image.layers, [layer]);
            let ImageConfig { architecture, os, variant, diff_ids, .. } = image.config.clone();
            assert_eq!((diff_ids.as_slice(), os.as_str()), (&[Digest::of(&tar)][..], "linux"));
            assert_eq!(image.config, ImageConfig { architecture, os, variant, diff_ids, ..config });
            image
        };
        let image = made().await;
        assert_eq!(made().await.manifest_digest, image.manifest_digest, "the same makes the same");
        let blob = store.read("layer", &image.layers[0].digest, 1 << 30).unwrap();
        assert!(zstd::decode_all(blob.as_slice()).unwrap() == tar);
        let opened = Pulled::open(&store, &image.manifest_digest).unwrap();
        assert_eq!((opened.config_digest, &opened.config), (image.config_digest, &image.config));
    }

    #[tokio::test]
    async fn a_layer_that_is_not_finished_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut draft = LayerDraft::begin(&store);
        draft.write(Bytes::from(vec![7; 1 << 20])).await.unwrap();
        drop(draft);
        assert!(store.list().unwrap().is_empty());
        assert_eq!(fs::read_dir(store.scratch()).unwrap().count(), 0);
    }
}
