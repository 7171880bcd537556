//! What an artifact must be to be a plugin, and what its blobs are.

use std::{collections::BTreeMap, io::Read};

use oci_distribution::manifest::{OciDescriptor, OciImageIndex, OciImageManifest};
use vm_oci::Descriptor;
use vm_plugin::MAX_COMPONENT;

use super::{OciError, plain};
use crate::plugins::package::{self, MAX_FILE_BYTES, MAX_FILES, MAX_MANIFEST};

/// Type of the config of WASM artifacts, also as their `artifactType`. <https://tag-runtime.cncf.io/wgs/wasm/deliverables/wasm-oci-artifact/>
pub(super) const CONFIG: &str = "application/vnd.wasm.config.v0+json";
const COMPONENT: &str = "application/wasm";
const MANIFEST: &str = "application/vnd.vm.plugin.manifest.v1+toml";
/// Key of the annotation that has it as well: artifacts of one layer, which is all that other tools for components take.
const ANNOTATION: &str = "vnd.vm.plugin.manifest.v1+toml";
const FILES: &str = "application/vnd.vm.plugin.files.v1.tar";

/// What the layer of the plugin's manifest is called.
pub(super) const TOML: &str = package::MANIFEST;

const MAX_CONFIG: u64 = 1 << 20;
/// Of all files together, which are in memory at once.
const MAX_FILES_LAYER: u64 = 256 << 20;

/// A blob as somebody describes it, of a size that is accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blob {
    what: &'static str,
    pub(super) descriptor: Descriptor,
}

impl Blob {
    pub(super) fn new(what: &'static str, digest: &str, size: i64, most: u64) -> Result<Self, OciError> {
        let descriptor = Descriptor::new(what, "", digest, size, None);
        match descriptor.and_then(|descriptor| descriptor.at_most(what, most)) {
            Ok(descriptor) => Ok(Self { what, descriptor }),
            Err(error) => Err(OciError::of(what, error)),
        }
    }

    pub(super) fn what(&self) -> &'static str {
        self.what
    }
}

/// Where the plugin's manifest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Toml {
    /// In a layer.
    Layer(Blob),
    /// In an annotation: this.
    Annotation(Vec<u8>),
}

/// The blobs of a plugin, none of them read yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Artifact {
    /// Of no use here; an artifact whose config is not its config is refused all the same.
    pub(super) config: Blob,
    pub(super) manifest: Toml,
    pub(super) component: Blob,
    pub(super) files: Option<Blob>,
}

impl Artifact {
    /// What an image manifest describes.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, OciError> {
        let document: OciImageManifest = serde_json::from_slice(bytes).map_err(|error| {
            if serde_json::from_slice::<OciImageIndex>(bytes).is_ok() {
                return OciError::Index;
            }
            OciError::Malformed { what: "artifact's manifest", reason: plain(&error.to_string()) }
        })?;
        let kind = document.artifact_type.as_deref().filter(|kind| !kind.is_empty());
        if document.config.media_type != CONFIG && kind != Some(CONFIG) {
            let found = plain(kind.unwrap_or(&document.config.media_type));
            return Err(OciError::NotWasm { found });
        }
        let layer = |what: &'static str, media_type: &'static str, most: u64| {
            let mut layers = document.layers.iter().filter(|layer| layer.media_type == media_type);
            match (layers.next(), layers.next()) {
                (None, _) => Ok(None),
                (Some(_), Some(_)) => Err(OciError::Several { media_type }),
                (Some(layer), None) => blob(what, layer, most).map(Some),
            }
        };
        let missing = |what: &'static str, media_type: &'static str| OciError::Missing { what, media_type };
        let annotation = document.annotations.as_ref().and_then(|all| all.get(ANNOTATION));
        let manifest = match (layer(TOML, MANIFEST, MAX_MANIFEST)?, annotation) {
            (Some(_), Some(_)) => return Err(OciError::Several { media_type: MANIFEST }),
            (Some(layer), None) => Toml::Layer(layer),
            (None, Some(text)) if text.len() as u64 > MAX_MANIFEST => {
                return Err(OciError::Large { what: TOML, bytes: text.len() as u64, most: MAX_MANIFEST });
            }
            (None, Some(text)) => Toml::Annotation(text.clone().into_bytes()),
            (None, None) => return Err(missing(TOML, MANIFEST)),
        };
        Ok(Self {
            component: layer("component", COMPONENT, MAX_COMPONENT)?
                .ok_or_else(|| missing("component", COMPONENT))?,
            manifest,
            files: layer("layer with files", FILES, MAX_FILES_LAYER)?,
            config: blob("config", &document.config, MAX_CONFIG)?,
        })
    }
}

fn blob(what: &'static str, descriptor: &OciDescriptor, most: u64) -> Result<Blob, OciError> {
    Blob::new(what, &descriptor.digest, descriptor.size, most)
}

/// The plugin's files of their layer. As in a directory, links, directories and hidden files do not count; a file in a directory is an
/// error, for then the whole layer may be one directory too deep.
pub(super) fn files(layer: &[u8]) -> Result<BTreeMap<String, Vec<u8>>, OciError> {
    let refused = |reason: String| OciError::Files { reason };
    let failed = |error: std::io::Error| refused(plain(&error.to_string()));
    if layer.starts_with(&[0x1f, 0x8b]) || layer.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return Err(refused("it is compressed".to_owned()));
    }
    let mut files = BTreeMap::new();
    let mut archive = tar::Archive::new(layer);
    for entry in archive.entries().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = String::from_utf8(entry.path_bytes().into_owned())
            .map_err(|error| refused(format!("a name in it is no text: {error}")))?;
        let name = path.strip_prefix("./").unwrap_or(&path);
        if name.is_empty() || name.len() > 255 || name.contains(['/', '\0']) {
            return Err(refused(format!("{:?} is no plain name", plain(name))));
        }
        if name.starts_with('.') {
            continue;
        }
        let bytes = entry.size();
        if bytes > MAX_FILE_BYTES {
            return Err(OciError::Large {
                what: "file in the layer with files",
                bytes,
                most: MAX_FILE_BYTES,
            });
        }
        if files.len() == MAX_FILES {
            return Err(refused(format!("it has more than {MAX_FILES} files")));
        }
        let mut content = Vec::new();
        entry.take(bytes).read_to_end(&mut content).map_err(failed)?;
        if content.len() as u64 != bytes {
            return Err(refused(format!("it ends within {:?}", plain(name))));
        }
        if files.insert(name.to_owned(), content).is_some() {
            return Err(refused(format!("{:?} is in it twice", plain(name))));
        }
    }
    Ok(files)
}
