//! An image whose blobs are all in the store.

use std::sync::Arc;

use crate::{
    Digest, ImageConfig, Layer, Lease, OciError, Platform, Store,
    document::{self, Document, MAX_CONFIG, MAX_DOCUMENT, Manifest},
};

/// An image in the store, whichever way it came: manifest, configuration and layers are there and verified.
///
/// As long as it, or a clone, lives, [`Store::collect`] leaves its blobs alone. Record [`Pulled::digests`] before dropping it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Pulled {
    /// Of the image's own manifest; of one from a Docker archive, of the manifest made for it.
    pub manifest_digest: Digest,
    /// Of the index that the manifest was chosen from. The index itself is not kept.
    pub index_digest: Option<Digest>,
    /// Of the configuration: the image's id, as Docker has it.
    pub config_digest: Digest,
    /// The configuration.
    pub config: ImageConfig,
    /// Lowest first. One blob may be several layers.
    pub layers: Vec<Layer>,
    /// What the source calls it: the registry's reference, a layout's tag, an archive's tags.
    pub names: Vec<String>,
    size: u64,
    digests: Vec<Digest>,
    _lease: Arc<Lease>,
}

impl Pulled {
    /// An image that is in the store, by its manifest's digest.
    ///
    /// # Errors
    /// [`OciError::Gone`] where one of its blobs is not there, or what [`Store::read`] has.
    pub fn open(store: &Store, manifest: &Digest) -> Result<Self, OciError> {
        let lease = store.lease();
        lease.add(*manifest);
        let bytes = store.read("image's manifest", manifest, MAX_DOCUMENT)?;
        let Document::Image(document) = document::parse(&bytes, None)? else {
            let reason = "it is an index".to_owned();
            return Err(OciError::Malformed { what: "image's manifest".to_owned(), reason });
        };
        document.blobs().iter().for_each(|blob| lease.add(blob.digest));
        for blob in document.blobs() {
            match store.size(&blob.digest)? {
                Some(size) if size == blob.size => {}
                Some(found) => {
                    return Err(OciError::Size {
                        what: format!("blob {}", blob.digest),
                        found,
                        expected: blob.size,
                    });
                }
                None => return Err(OciError::Gone { what: "blob", digest: blob.digest }),
            }
        }
        let config = store.read("image's configuration", &document.config.digest, MAX_CONFIG)?;
        let parts = Parts::read(&document, &config)?;
        Ok(parts.pulled(*manifest, bytes.len() as u64, None, &document, Vec::new(), lease))
    }

    /// All blobs of it, each once: what a record of it must keep alive.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }

    /// Bytes of all its blobs, some of which other images may share.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// What the configuration adds to a manifest.
#[derive(Debug)]
pub(crate) struct Parts {
    config: ImageConfig,
    layers: Vec<Layer>,
}

impl Parts {
    /// Reads them, and refuses an image for another platform.
    pub(crate) fn of(manifest: &Manifest, config: &[u8], platform: &Platform) -> Result<Self, OciError> {
        let parts = Self::read(manifest, config)?;
        match parts.config.platform() {
            Some(other) if !platform.suits(&other) => {
                Err(OciError::Platform { wanted: platform.to_string(), there: vec![other.to_string()] })
            }
            _ => Ok(parts),
        }
    }

    fn read(manifest: &Manifest, config: &[u8]) -> Result<Self, OciError> {
        let config = ImageConfig::parse(config)?;
        let layers = manifest.layers(&config)?;
        Ok(Self { config, layers })
    }

    pub(crate) fn pulled(
        self,
        manifest_digest: Digest,
        manifest_size: u64,
        index_digest: Option<Digest>,
        manifest: &Manifest,
        names: Vec<String>,
        lease: Lease,
    ) -> Pulled {
        let blobs = manifest.blobs();
        let mut digests = vec![manifest_digest];
        digests.extend(blobs.iter().map(|blob| blob.digest));
        Pulled {
            manifest_digest,
            index_digest,
            config_digest: manifest.config.digest,
            config: self.config,
            layers: self.layers,
            names,
            size: manifest_size + blobs.iter().map(|blob| blob.size).sum::<u64>(),
            digests,
            _lease: Arc::new(lease),
        }
    }
}
