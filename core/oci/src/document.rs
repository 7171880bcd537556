//! Manifests and indexes: what an image is made of, checked before anything of it is fetched.
//! <https://github.com/opencontainers/image-spec/blob/v1.1.0/manifest.md>

use std::{collections::BTreeMap, fmt};

use oci_distribution::manifest::{
    IMAGE_CONFIG_MEDIA_TYPE, IMAGE_DOCKER_CONFIG_MEDIA_TYPE, IMAGE_MANIFEST_LIST_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE, ImageIndexEntry, OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE,
    OciDescriptor, OciImageIndex, OciImageManifest,
};
use serde::Deserialize;

use crate::{Digest, ImageConfig, OciError, error::plain};

/// The most that registries have to take of a manifest or index, in bytes, and so the most that there is.
/// <https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md#pushing-manifests>
pub const MAX_DOCUMENT: u64 = 4 << 20;
/// Of an image's configuration, in bytes.
pub(crate) const MAX_CONFIG: u64 = 1 << 20;
/// Docker makes at most 127; nobody stacks this many.
const MAX_LAYERS: usize = 1024;

/// What a client says it takes as manifest.
pub(crate) const ACCEPT: [&str; 4] = [
    OCI_IMAGE_MEDIA_TYPE,
    OCI_IMAGE_INDEX_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE,
];

pub(crate) use oci_distribution::manifest::{
    IMAGE_CONFIG_MEDIA_TYPE as CONFIG, IMAGE_LAYER_MEDIA_TYPE as LAYER, OCI_IMAGE_INDEX_MEDIA_TYPE as INDEX,
    OCI_IMAGE_MEDIA_TYPE as MANIFEST,
};

/// A blob as a manifest or index describes it; digest and size are well-formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// What it says it is.
    pub media_type: String,
    /// What it is verified by.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// By key.
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// Checks what a document says of a blob; `what` is told in errors.
    ///
    /// # Errors
    /// [`OciError::Malformed`] for a digest or a size that is none.
    pub fn new(
        what: &str,
        media_type: &str,
        digest: &str,
        size: i64,
        annotations: Option<BTreeMap<String, String>>,
    ) -> Result<Self, OciError> {
        let malformed = |reason: String| OciError::Malformed { what: what.to_owned(), reason };
        let digest = digest.parse().map_err(|error: crate::DigestError| {
            malformed(format!("{:?} is no digest: {}", plain(digest), error.rule()))
        })?;
        let size = u64::try_from(size).map_err(|_| malformed(format!("{size} is no size")))?;
        Ok(Self { media_type: plain(media_type), digest, size, annotations: annotations.unwrap_or_default() })
    }

    pub(crate) fn of(what: &str, descriptor: &OciDescriptor) -> Result<Self, OciError> {
        let OciDescriptor { media_type, digest, size, annotations, .. } = descriptor;
        Self::new(what, media_type, digest, *size, annotations.clone())
    }

    /// Refuses a blob that is larger than what it is for can be.
    ///
    /// # Errors
    /// [`OciError::Large`].
    pub fn at_most(self, what: &str, most: u64) -> Result<Self, OciError> {
        if self.size <= most {
            return Ok(self);
        }
        Err(OciError::Large { what: what.to_owned(), bytes: self.size, most })
    }

    /// The bytes, if they are the blob.
    ///
    /// # Errors
    /// [`OciError::Size`] or [`OciError::Digest`].
    pub fn verified(&self, what: &str, bytes: Vec<u8>) -> Result<Vec<u8>, OciError> {
        let (what, size) = (what.to_owned(), bytes.len() as u64);
        if size != self.size {
            return Err(OciError::Size { what, found: size, expected: self.size });
        }
        match Digest::of(&bytes) {
            found if found == self.digest => Ok(bytes),
            found => Err(OciError::Digest { what, found, expected: self.digest }),
        }
    }
}

/// An operating system and a processor, as images name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// As Go names it: `amd64`, `arm64`.
    pub architecture: String,
    /// E.g. `v8`; `None` where there is one only.
    pub variant: Option<String>,
}

impl Platform {
    /// Linux on this host's processor: what a microVM of this host can run.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// Whether what is for `other` runs here, the lower the better; `None` where it does not.
    fn rank(&self, other: &Self) -> Option<u8> {
        if (&self.os, &self.architecture) != (&other.os, &other.architecture) {
            return None;
        }
        match (self.variant.as_deref(), other.variant.as_deref()) {
            (mine, theirs) if mine == theirs => Some(0),
            // The variant that every processor of the kind is.
            (None, Some("v1" | "v8")) | (Some("v1" | "v8"), None) => Some(1),
            (Some(_), None) => Some(2),
            _ => None,
        }
    }

    pub(crate) fn suits(&self, other: &Self) -> bool {
        self.rank(other).is_some()
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// How a layer's tar archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Of the blob.
    pub digest: Digest,
    /// Of the tar archive in it. Nothing here unpacks layers: who does must compare.
    pub diff_id: Digest,
    /// Of the blob, in bytes.
    pub size: u64,
    /// As the manifest says.
    pub media_type: String,
    /// As the media type says.
    pub compression: Compression,
}

/// A manifest of what is looked for, an image if nothing else is said, or an index of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document<T = Manifest> {
    Image(T),
    Index(Vec<Entry>),
}

/// How a manifest is understood.
pub(crate) type Understand<T> = dyn Fn(&OciImageManifest) -> Result<T, OciError> + Send + Sync;

/// What an image is made of, as far as its manifest knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<(Descriptor, Compression)>,
}

/// One of several in an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The manifest.
    pub descriptor: Descriptor,
    /// What it is for.
    pub platform: Option<Platform>,
}

/// Annotation of an index's entry in a layout: its tag.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

impl Entry {
    fn of(entry: &ImageIndexEntry) -> Result<Self, OciError> {
        let ImageIndexEntry { media_type, digest, size, platform, annotations, .. } = entry;
        let platform = platform.as_ref().map(|platform| Platform {
            os: plain(&platform.os.to_string()),
            architecture: plain(&platform.architecture.to_string()),
            variant: platform.variant.as_deref().map(plain).filter(|variant| !variant.is_empty()),
        });
        let descriptor = Descriptor::new("index's entry", media_type, digest, *size, annotations.clone())?;
        Ok(Self { descriptor, platform })
    }

    /// The tag that a layout's index gives it.
    pub fn tag(&self) -> Option<&str> {
        self.descriptor.annotations.get(REF_NAME).map(String::as_str)
    }
}

/// The one of them that suits a platform best.
pub(crate) fn choose(entries: &[Entry], wanted: &Platform) -> Result<Descriptor, OciError> {
    let suits = |entry: &Entry| entry.platform.as_ref().and_then(|platform| wanted.rank(platform));
    let best = entries.iter().filter_map(|entry| Some((suits(entry)?, entry))).min_by_key(|(rank, _)| *rank);
    if let Some((_, entry)) = best {
        return Ok(entry.descriptor.clone());
    }
    // An index of one that says nothing: its configuration will say.
    if let [entry] = entries
        && entry.platform.is_none()
    {
        return Ok(entry.descriptor.clone());
    }
    let mut there: Vec<String> = entries
        .iter()
        .filter_map(|entry| entry.platform.as_ref())
        // Attestations of the builder, not images.
        .filter(|platform| platform.os != "unknown")
        .map(Platform::to_string)
        .collect();
    there.dedup();
    Err(OciError::Platform { wanted: wanted.to_string(), there })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kind {
    #[serde(default)]
    schema_version: i64,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

/// Reads an image's manifest. Its type is what it says itself, else what came with it (a header, a descriptor), else what it looks
/// like.
pub(crate) fn parse(bytes: &[u8], media_type: Option<&str>) -> Result<Document, OciError> {
    parse_as(bytes, media_type, &Manifest::of)
}

/// Reads a manifest as [`parse`] does, and understands it in another way.
pub(crate) fn parse_as<T>(
    bytes: &[u8],
    media_type: Option<&str>,
    understand: &Understand<T>,
) -> Result<Document<T>, OciError> {
    let malformed = |error: serde_json::Error| OciError::Malformed {
        what: "image's manifest".to_owned(),
        reason: plain(&error.to_string()),
    };
    let kind: Kind = serde_json::from_slice(bytes).map_err(malformed)?;
    let unsupported =
        |found: &str| OciError::MediaType { what: "image's manifest".to_owned(), found: plain(found) };
    if kind.schema_version == 1 {
        return Err(unsupported("application/vnd.docker.distribution.manifest.v1+json"));
    }
    let outer = media_type.filter(|text| text.starts_with("application/vnd."));
    let index = match kind.media_type.as_deref().or(outer) {
        Some(OCI_IMAGE_INDEX_MEDIA_TYPE | IMAGE_MANIFEST_LIST_MEDIA_TYPE) => true,
        Some(OCI_IMAGE_MEDIA_TYPE | IMAGE_MANIFEST_MEDIA_TYPE) => false,
        Some(other) => return Err(unsupported(other)),
        None => kind.manifests.is_some(),
    };
    // A document that can be read in two ways is one that two tools would read in two ways.
    if index != kind.manifests.is_some() {
        let reason = "its type and its content contradict each other".to_owned();
        return Err(OciError::Malformed { what: "image's manifest".to_owned(), reason });
    }
    if index {
        let index: OciImageIndex = serde_json::from_slice(bytes).map_err(malformed)?;
        return Ok(Document::Index(index.manifests.iter().map(Entry::of).collect::<Result<_, _>>()?));
    }
    let manifest: OciImageManifest = serde_json::from_slice(bytes).map_err(malformed)?;
    understand(&manifest).map(Document::Image)
}

/// The entries of a layout's `index.json`.
pub(crate) fn entries(bytes: &[u8]) -> Result<Vec<Entry>, OciError> {
    let index: OciImageIndex = serde_json::from_slice(bytes).map_err(|error| OciError::Malformed {
        what: "index.json".to_owned(),
        reason: plain(&error.to_string()),
    })?;
    index.manifests.iter().map(Entry::of).collect()
}

impl Manifest {
    pub(crate) fn of(manifest: &OciImageManifest) -> Result<Self, OciError> {
        let config = &manifest.config;
        if !matches!(config.media_type.as_str(), IMAGE_CONFIG_MEDIA_TYPE | IMAGE_DOCKER_CONFIG_MEDIA_TYPE) {
            let found = manifest.artifact_type.as_ref().unwrap_or(&config.media_type);
            return Err(OciError::MediaType {
                what: "image's configuration".to_owned(),
                found: plain(found),
            });
        }
        if manifest.layers.len() > MAX_LAYERS {
            let reason = format!("it has {} layers; the most is {MAX_LAYERS}", manifest.layers.len());
            return Err(OciError::Malformed { what: "image's manifest".to_owned(), reason });
        }
        let config =
            Descriptor::of("image's configuration", config)?.at_most("image's configuration", MAX_CONFIG)?;
        let layer = |(number, layer): (usize, &OciDescriptor)| {
            let descriptor = Descriptor::of(&format!("layer {}", number + 1), layer)?;
            let compression = compression(&descriptor)?;
            Ok((descriptor, compression))
        };
        let layers = manifest.layers.iter().enumerate().map(layer).collect::<Result<_, OciError>>()?;
        let manifest = Self { config, layers };
        manifest.total()?;
        Ok(manifest)
    }

    /// Config and layers, each blob once, in order.
    pub(crate) fn blobs(&self) -> Vec<&Descriptor> {
        let mut seen = std::collections::HashSet::new();
        let layers = self.layers.iter().map(|(layer, _)| layer);
        std::iter::once(&self.config).chain(layers).filter(|blob| seen.insert(blob.digest)).collect()
    }

    /// Bytes of all blobs.
    pub(crate) fn total(&self) -> Result<u64, OciError> {
        self.blobs().iter().try_fold(0_u64, |sum, blob| sum.checked_add(blob.size)).ok_or_else(|| {
            let reason = "its layers' sizes are impossible".to_owned();
            OciError::Malformed { what: "image's manifest".to_owned(), reason }
        })
    }

    /// The layers, with what the configuration knows of them.
    pub(crate) fn layers(&self, config: &ImageConfig) -> Result<Vec<Layer>, OciError> {
        if config.diff_ids.len() != self.layers.len() {
            let reason =
                format!("it has {} layers, the manifest {}", config.diff_ids.len(), self.layers.len());
            return Err(OciError::Malformed { what: "image's configuration".to_owned(), reason });
        }
        let layers = self.layers.iter().zip(&config.diff_ids);
        Ok(layers
            .map(|((descriptor, compression), diff_id)| Layer {
                digest: descriptor.digest,
                diff_id: *diff_id,
                size: descriptor.size,
                media_type: descriptor.media_type.clone(),
                compression: *compression,
            })
            .collect())
    }
}

/// How a layer of this type is compressed; an error where layers of this type are not for us.
fn compression(layer: &Descriptor) -> Result<Compression, OciError> {
    let foreign = || OciError::Foreign { digest: layer.digest, media_type: layer.media_type.clone() };
    let unsupported =
        || OciError::MediaType { what: format!("layer {}", layer.digest), found: layer.media_type.clone() };
    let form = if let Some(form) = layer.media_type.strip_prefix("application/vnd.oci.image.layer.") {
        if form.starts_with("nondistributable.") {
            return Err(foreign());
        }
        form.strip_prefix("v1.tar").ok_or_else(unsupported)?.replace('+', ".")
    } else if let Some(form) = layer.media_type.strip_prefix("application/vnd.docker.image.rootfs.") {
        if form.starts_with("foreign.") {
            return Err(foreign());
        }
        form.strip_prefix("diff.tar").ok_or_else(unsupported)?.to_owned()
    } else {
        return Err(unsupported());
    };
    match form.as_str() {
        "" => Ok(Compression::None),
        ".gzip" => Ok(Compression::Gzip),
        ".zstd" => Ok(Compression::Zstd),
        _ => Err(unsupported()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn descriptor(media_type: &str, content: &[u8]) -> Value {
        json!({ "mediaType": media_type, "digest": Digest::of(content), "size": content.len() })
    }

    fn manifest(layer: &str) -> Value {
        json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(CONFIG, b"c"), "layers": [descriptor(layer, b"l")] })
    }

    fn read(value: &Value) -> Result<Document, OciError> {
        parse(&serde_json::to_vec(value).unwrap(), None)
    }

    #[test]
    fn layers_of_every_kind_in_use_are_understood_and_others_refused_by_name() {
        for (media_type, expected) in [
            ("application/vnd.oci.image.layer.v1.tar", Compression::None),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Compression::Gzip),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Compression::Zstd),
            ("application/vnd.docker.image.rootfs.diff.tar", Compression::None),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Compression::Gzip),
            ("application/vnd.docker.image.rootfs.diff.tar.zstd", Compression::Zstd),
        ] {
            let Document::Image(image) = read(&manifest(media_type)).unwrap() else { panic!("{media_type}") };
            assert_eq!(image.layers[0].1, expected, "{media_type}");
        }
        for media_type in [
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        ] {
            let error = read(&manifest(media_type)).unwrap_err();
            assert!(
                matches!(error, OciError::Foreign { .. }) && error.to_string().contains(media_type),
                "{error}"
            );
        }
        for media_type in ["application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "application/wasm", ""] {
            let error = read(&manifest(media_type)).unwrap_err();
            assert!(matches!(&error, OciError::MediaType { found, .. } if found == media_type), "{error}");
        }
    }

    #[test]
    fn what_is_no_image_is_refused_with_what_it_is() {
        let mut helm = manifest(LAYER);
        helm["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
        assert!(read(&helm).unwrap_err().to_string().contains("helm"));
        let old = json!({ "schemaVersion": 1, "name": "x", "fsLayers": [] });
        assert!(read(&old).unwrap_err().to_string().contains("manifest.v1+json"));
        let mut both = manifest(LAYER);
        both["manifests"] = json!([]);
        assert!(read(&both).unwrap_err().to_string().contains("contradict"));
        let mut negative = manifest(LAYER);
        negative["layers"][0]["size"] = (-1).into();
        assert!(read(&negative).unwrap_err().to_string().contains("layer 1"));
        let mut large = manifest(LAYER);
        large["config"]["size"] = (9 << 20).into();
        assert!(matches!(read(&large), Err(OciError::Large { .. })));
        let mut many = manifest(LAYER);
        many["layers"] = Value::Array(vec![descriptor(LAYER, b"l"); 1025]);
        assert!(read(&many).unwrap_err().to_string().contains("1025 layers"));
        let mut impossible = manifest(LAYER);
        impossible["layers"] = ["x", "y", "z"]
            .iter()
            .map(|name| {
                let mut layer = descriptor(LAYER, name.as_bytes());
                layer["size"] = i64::MAX.into();
                layer
            })
            .collect();
        assert!(read(&impossible).unwrap_err().to_string().contains("impossible"));
        assert!(matches!(parse(b"<html>", None), Err(OciError::Malformed { .. })));
    }

    #[test]
    fn an_index_gives_what_suits_the_host_or_says_what_there_is() {
        let entry = |content: &[u8], os: &str, architecture: &str, variant: Option<&str>| {
            let mut entry = descriptor(MANIFEST, content);
            entry["platform"] = json!({ "os": os, "architecture": architecture });
            if let Some(variant) = variant {
                entry["platform"]["variant"] = variant.into();
            }
            entry
        };
        let index = |manifests: Vec<Value>| {
            let value = json!({ "schemaVersion": 2, "mediaType": OCI_IMAGE_INDEX_MEDIA_TYPE, "manifests": manifests });
            let Document::Index(entries) = read(&value).unwrap() else { panic!("no index") };
            entries
        };
        let entries = index(vec![
            entry(b"v3", "linux", "amd64", Some("v3")),
            entry(b"windows", "windows", "amd64", None),
            entry(b"any", "linux", "amd64", None),
            entry(b"arm", "linux", "arm64", Some("v8")),
            entry(b"proof", "unknown", "unknown", None),
        ]);
        let platform = |architecture: &str| Platform {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
        };
        assert_eq!(choose(&entries, &platform("amd64")).unwrap().digest, Digest::of(b"any"));
        assert_eq!(choose(&entries, &platform("arm64")).unwrap().digest, Digest::of(b"arm"));
        let error = choose(&entries, &platform("riscv64")).unwrap_err();
        assert_eq!(error.hint(), "there is: linux/amd64/v3, windows/amd64, linux/amd64, linux/arm64/v8");
        // A processor of any kind cannot be sure of running what was built for a newer one.
        let newer = index(vec![entry(b"v3", "linux", "amd64", Some("v3"))]);
        assert!(choose(&newer, &platform("amd64")).is_err());
        let silent = index(vec![descriptor(MANIFEST, b"one")]);
        assert_eq!(choose(&silent, &platform("amd64")).unwrap().digest, Digest::of(b"one"));
    }
}
