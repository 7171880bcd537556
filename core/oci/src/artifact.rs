//! Artifacts: what registries and layouts have besides images. Of what kind one is, and of what its layers may be, its user says.

use std::{path::PathBuf, sync::Arc};

use oci_distribution::manifest::OciImageManifest;

use crate::{Descriptor, Digest, Lease, OciError, Store, error::plain};

/// More than an artifact of few files needs.
const MAX_LAYERS: usize = 64;

/// A kind of artifacts.
#[derive(Debug, Clone, Copy)]
pub struct ArtifactKind {
    /// What it is, for people, e.g. `kernel`.
    pub name: &'static str,
    /// Its `artifactType`, or its configuration's media type where it has none.
    pub media_type: &'static str,
    /// The media types that its layers may have, and how many bytes.
    pub layers: &'static [(&'static str, u64)],
}

/// An artifact whose layers are all in the store, verified. They stay there as long as it lives.
#[derive(Debug)]
pub struct Artifact {
    /// Of its manifest.
    pub digest: Digest,
    /// In the manifest's order.
    pub layers: Vec<Descriptor>,
    pub(crate) store: Store,
    pub(crate) _lease: Arc<Lease>,
}

impl Artifact {
    /// The file of its only layer of a media type; `None` where it has none.
    ///
    /// # Errors
    /// [`OciError::Malformed`] where there are several.
    pub fn layer(&self, media_types: &[&str]) -> Result<Option<PathBuf>, OciError> {
        let mut found = self.layers.iter().filter(|layer| media_types.contains(&layer.media_type.as_str()));
        match (found.next(), found.next()) {
            (Some(layer), None) => Ok(Some(self.store.path(&layer.digest))),
            (None, _) => Ok(None),
            (Some(layer), Some(_)) => Err(OciError::Malformed {
                what: format!("artifact {}", self.digest),
                reason: format!("it has more than one layer of type {}", layer.media_type),
            }),
        }
    }
}

impl ArtifactKind {
    /// The layers of a manifest of this kind.
    pub(crate) fn layers(&self, manifest: &OciImageManifest) -> Result<Vec<Descriptor>, OciError> {
        let stated = manifest.artifact_type.as_deref().filter(|stated| !stated.is_empty());
        let found = stated.unwrap_or(&manifest.config.media_type);
        if found != self.media_type {
            return Err(OciError::ArtifactType {
                wanted: self.name,
                media_type: self.media_type,
                found: plain(found),
            });
        }
        if manifest.layers.len() > MAX_LAYERS {
            let reason = format!("it has {} layers; the most is {MAX_LAYERS}", manifest.layers.len());
            return Err(OciError::Malformed { what: "artifact's manifest".to_owned(), reason });
        }
        let layer = |(number, layer)| {
            let what = format!("layer {} of the {}", number + 1, self.name);
            let layer = Descriptor::of(&what, layer)?;
            match self.layers.iter().find(|(media_type, _)| *media_type == layer.media_type) {
                Some((_, most)) => layer.at_most(&what, *most),
                None => Err(OciError::MediaType { what, found: layer.media_type }),
            }
        };
        manifest.layers.iter().enumerate().map(layer).collect()
    }
}
