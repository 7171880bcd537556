//! A Docker archive: `manifest.json`, which names the configuration and the layers by their paths in the archive.
//! <https://github.com/moby/docker-image-spec/blob/v1.3.1/v1.2.md#combined-image-json--filesystem-changeset-format>

use std::collections::HashMap;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{
    Found, PIECE, Section,
    tree::{Tar, Tree},
};
use crate::{
    Digest, ImageConfig, MAX_DOCUMENT, OciError, Platform, Reference, Select,
    compose::{described, manifest},
    document::{self, MAX_CONFIG},
    error::plain,
    image::Parts,
};

const LIST: &str = "manifest.json";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Item {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }

    /// Whether it goes by this name: in full, as Docker shortens it, or by its tag alone.
    fn is(&self, name: &str) -> bool {
        let full = name.parse::<Reference>().ok();
        self.tags().iter().any(|own| {
            own == name
                || own.rsplit_once(':').is_some_and(|(_, tag)| tag == name)
                || full.as_ref().is_some_and(|full| own.parse::<Reference>().is_ok_and(|own| own == *full))
        })
    }
}

/// The image that is asked for. A manifest is made for it; the same image gets the same one each time.
pub(super) fn image(tar: &Tar, select: &Select, platform: &Platform) -> Result<Found, OciError> {
    let malformed = |what: &str, reason: String| OciError::Malformed { what: what.to_owned(), reason };
    let list = tar.file(LIST)?.read(LIST, MAX_DOCUMENT)?;
    let items: Vec<Item> =
        serde_json::from_slice(&list).map_err(|error| malformed(LIST, plain(&error.to_string())))?;
    let there = || {
        let tags = items.iter().flat_map(Item::tags).map(|tag| plain(tag));
        tags.collect::<Vec<_>>()
    };
    let named = |item: &&Item| select.tag.as_ref().is_none_or(|tag| item.is(tag));
    let mut found = items.iter().filter(named);
    let item = match (found.next(), found.next(), select.digest) {
        // Its manifest's digest is none that anybody else has.
        (_, _, Some(_)) | (None, ..) => {
            return Err(OciError::NoEntry { asked: select.asked(), there: there() });
        }
        (Some(item), None, None) => item,
        (Some(_), Some(_), None) => return Err(OciError::Ambiguous { there: there() }),
    };
    let config = tar.file(&item.config)?;
    let bytes = config.read("image's configuration", MAX_CONFIG)?;
    let understood = ImageConfig::parse(&bytes)?;
    if understood.diff_ids.len() != item.layers.len() {
        let reason = format!("it has {} layers, {LIST} {}", understood.diff_ids.len(), item.layers.len());
        return Err(malformed("image's configuration", reason));
    }
    let mut blobs = HashMap::new();
    let mut layers = Vec::new();
    for (path, diff_id) in item.layers.iter().zip(&understood.diff_ids) {
        let section = tar.file(path)?;
        let (digest, suffix) = match packed(&section)? {
            // As it is, it is what the configuration says; that is seen when it is copied.
            None => (*diff_id, ""),
            Some(suffix) => (hash(&section)?, suffix),
        };
        layers.push(described(&format!("{}{suffix}", document::LAYER), digest, section.size)?);
        blobs.insert(digest, section);
    }
    let digest = Digest::of(&bytes);
    let descriptor = described(document::CONFIG, digest, bytes.len() as u64)?;
    blobs.insert(digest, config);
    let (document, manifest) = manifest(descriptor, layers)?;
    let parts = Parts::of(&manifest, &bytes, platform)?;
    Ok(Found { document, manifest, parts, index: None, blobs, names: item.tags().to_vec() })
}

/// How the media type of a layer ends that is compressed, which Docker does not do, but others.
fn packed(section: &Section) -> Result<Option<&'static str>, OciError> {
    let mut magic = [0; 4];
    let known = section.read_at(&mut magic, 0)?;
    Ok(match &magic[..known] {
        [0x1f, 0x8b, ..] => Some("+gzip"),
        [0x28, 0xb5, 0x2f, 0xfd] => Some("+zstd"),
        _ => None,
    })
}

fn hash(section: &Section) -> Result<Digest, OciError> {
    let (mut hasher, mut piece, mut at) = (Sha256::new(), vec![0; PIECE], 0);
    loop {
        match section.read_at(&mut piece, at)? {
            0 => return Ok(Digest::finished(hasher)),
            n => {
                hasher.update(&piece[..n]);
                at += n as u64;
            }
        }
    }
}
