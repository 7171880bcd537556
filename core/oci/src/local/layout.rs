//! An image layout: `oci-layout`, `index.json` and the blobs by their digests, in a directory or a tar archive.
//! <https://github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md>

use std::{collections::HashMap, path::Path};

use serde::Deserialize;

use super::{
    Found, Section,
    tree::{Dir, Tree},
};
use crate::{
    Descriptor, Digest, Entry, MAX_DOCUMENT, OciError, Platform, Select,
    document::{self, Document, Manifest, Understand},
    error::plain,
    image::Parts,
};

const INDEX: &str = "index.json";
const MARKER: &str = "oci-layout";
/// How deep indexes are looked for in indexes.
const MAX_DEPTH: usize = 4;

/// An image layout that is open. It is never written. Its functions read files: call them where that may block.
#[derive(Debug)]
pub struct Layout {
    tree: Box<dyn Tree>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    image_layout_version: String,
}

impl Layout {
    /// The layout in a directory.
    ///
    /// # Errors
    /// [`OciError::Read`], [`OciError::NoPart`] or [`OciError::Malformed`] where there is none.
    pub fn open(dir: &Path) -> Result<Self, OciError> {
        Self::of(Box::new(Dir::open(dir)?))
    }

    pub(super) fn of(tree: Box<dyn Tree>) -> Result<Self, OciError> {
        let bytes = tree.file(MARKER)?.read(MARKER, MAX_DOCUMENT)?;
        let malformed = |reason| OciError::Malformed { what: MARKER.to_owned(), reason };
        let marker: Marker =
            serde_json::from_slice(&bytes).map_err(|error| malformed(plain(&error.to_string())))?;
        if !marker.image_layout_version.starts_with("1.") {
            return Err(malformed(format!(
                "version {:?} is none of 1.x",
                plain(&marker.image_layout_version)
            )));
        }
        Ok(Self { tree })
    }

    /// What the index lists.
    ///
    /// # Errors
    /// [`OciError::Read`], [`OciError::NoPart`] or [`OciError::Malformed`].
    pub fn entries(&self) -> Result<Vec<Entry>, OciError> {
        document::entries(&self.tree.file(INDEX)?.read(INDEX, MAX_DOCUMENT)?)
    }

    /// The one that is asked for; where neither tag nor digest is, the only one. Of several with one tag the one for the platform.
    ///
    /// # Errors
    /// [`OciError::NoEntry`], [`OciError::Ambiguous`], or as [`Layout::entries`].
    pub fn select(&self, select: &Select, platform: Option<&Platform>) -> Result<Descriptor, OciError> {
        let entries = self.entries()?;
        let named = |entry: &&Entry| {
            let by_tag = match &select.tag {
                Some(tag) => entry.tag() == Some(tag),
                // Signatures are found by the tags that they are given; nobody means them who names none.
                None => !entry.tag().is_some_and(is_attachment),
            };
            by_tag && select.digest.is_none_or(|digest| entry.descriptor.digest == digest)
        };
        let found: Vec<Entry> = entries.iter().filter(named).cloned().collect();
        let there = || {
            let names = entries.iter().filter(|entry| !entry.tag().is_some_and(is_attachment));
            names
                .map(|entry| entry.tag().map_or_else(|| entry.descriptor.digest.to_string(), plain))
                .collect()
        };
        match found.as_slice() {
            [] => Err(OciError::NoEntry { asked: select.asked(), there: there() }),
            // One image may have several tags.
            [first, others @ ..]
                if others.iter().all(|other| other.descriptor.digest == first.descriptor.digest) =>
            {
                Ok(first.descriptor.clone())
            }
            several => match platform {
                Some(platform)
                    if several
                        .iter()
                        .all(|entry| entry.platform.is_some() && entry.tag() == several[0].tag()) =>
                {
                    document::choose(several, platform)
                }
                _ => Err(OciError::Ambiguous { there: there() }),
            },
        }
    }

    /// A small blob, verified; `what` is told in errors.
    ///
    /// # Errors
    /// [`OciError::NoPart`], [`OciError::Read`], [`OciError::Outside`], [`OciError::Size`] or [`OciError::Digest`].
    pub fn read(&self, what: &str, blob: &Descriptor) -> Result<Vec<u8>, OciError> {
        let section = self.section(&blob.digest)?;
        if section.size != blob.size {
            return Err(OciError::Size { what: what.to_owned(), found: section.size, expected: blob.size });
        }
        blob.verified(what, section.read(what, blob.size)?)
    }

    pub(super) fn section(&self, digest: &Digest) -> Result<Section, OciError> {
        self.tree.file(&format!("blobs/sha256/{}", digest.hex()))
    }

    /// The image that is asked for, as far as its manifest and configuration tell.
    pub(super) fn image(&self, select: &Select, platform: &Platform) -> Result<Found, OciError> {
        let Manifested { document, manifest, index, descriptor } =
            self.manifest(select, platform, &Manifest::of)?;
        let tag = select.tag.clone().or_else(|| {
            let entries = self.entries().ok()?;
            let mine = entries.iter().find(|entry| entry.descriptor.digest == descriptor.digest)?;
            mine.tag().map(str::to_owned)
        });
        let config = self.read("image's configuration", &manifest.config)?;
        let parts = Parts::of(&manifest, &config, platform)?;
        let mut blobs = HashMap::new();
        for blob in manifest.blobs() {
            blobs.insert(blob.digest, self.section(&blob.digest)?);
        }
        Ok(Found { document, manifest, parts, index, blobs, names: tag.into_iter().collect() })
    }

    /// The manifest that is asked for.
    pub(super) fn manifest<T>(
        &self,
        select: &Select,
        platform: &Platform,
        understand: &Understand<T>,
    ) -> Result<Manifested<T>, OciError> {
        let selected = self.select(select, Some(platform))?;
        let (mut descriptor, mut index) = (selected.clone(), None);
        for _ in 0..MAX_DEPTH {
            let what = "image's manifest";
            let document = self.read(what, &descriptor.clone().at_most(what, MAX_DOCUMENT)?)?;
            match document::parse_as(&document, Some(&descriptor.media_type), understand)? {
                Document::Index(entries) => {
                    index.get_or_insert(descriptor.digest);
                    descriptor = document::choose(&entries, platform)?;
                }
                Document::Image(manifest) => {
                    return Ok(Manifested { document, manifest, index, descriptor: selected });
                }
            }
        }
        let reason = "indexes lead to indexes only".to_owned();
        Err(OciError::Malformed { what: "image's index".to_owned(), reason })
    }
}

/// A manifest of a layout.
pub(super) struct Manifested<T> {
    pub(super) document: Vec<u8>,
    pub(super) manifest: T,
    pub(super) index: Option<Digest>,
    /// What the layout's index has of it, or of the index that it is in.
    descriptor: Descriptor,
}

/// Whether what is under this tag belongs to something else: a signature, an attestation or a bill of materials.
/// <https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md>
fn is_attachment(tag: &str) -> bool {
    tag.split_once('.').is_some_and(|(digest, kind)| {
        matches!(kind, "sig" | "att" | "sbom")
            && digest.strip_prefix("sha256-").is_some_and(|hex| Digest::from_hex(hex).is_some())
    })
}
