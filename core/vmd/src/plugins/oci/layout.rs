//! A plugin of an image layout: a directory with `oci-layout`, `index.json` and the blobs by their digests.
//! <https://github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md>

use std::{collections::BTreeMap, path::Path};

use vm_api::PluginSignature;
use vm_oci::{Descriptor, Digest, Layout, MAX_DOCUMENT, Select};

use super::{
    OciError, Trust,
    artifact::{self, Artifact, Blob, Toml},
    signature::{self, Judge, Key},
};
use crate::plugins::{PluginsError, package::Package};

/// Which artifact of a layout.
#[derive(Debug, PartialEq, Eq)]
struct Place<'a> {
    dir: &'a str,
    tag: Option<&'a str>,
    digest: Option<Digest>,
}

impl<'a> Place<'a> {
    /// Of `DIR[:TAG][@DIGEST]`. A directory may have a colon in its name.
    fn of(text: &'a str) -> Self {
        let pinned = text.rsplit_once('@').and_then(|(rest, digest)| Some((rest, digest.parse().ok()?)));
        let (text, digest) = pinned.map_or((text, None), |(rest, digest)| (rest, Some(digest)));
        match text.rsplit_once(':') {
            Some((dir, tag)) if !tag.is_empty() && !tag.contains('/') && !Path::new(text).is_dir() => {
                Self { dir, tag: Some(tag), digest }
            }
            _ => Self { dir: text, tag: None, digest },
        }
    }

    fn named(&self, digest: &Digest) -> String {
        let tag = self.tag.map(|tag| format!(":{tag}")).unwrap_or_default();
        format!("oci-layout:{}{tag}@{digest}", self.dir)
    }
}

/// The plugin of `DIR[:TAG][@DIGEST]`.
pub(super) fn package(text: &str, trust: &Trust) -> Result<Package, PluginsError> {
    let place = Place::of(text);
    if !Path::new(place.dir).is_absolute() {
        return Err(PluginsError::Source { text: format!("oci-layout:{text}") });
    }
    let keys = trust.read()?;
    let what = "artifact's manifest";
    let layout = Layout::open(Path::new(place.dir)).map_err(|error| OciError::of("oci-layout", error))?;
    let entry = entry(&layout, what, place.tag, place.digest)?;
    let bytes = layout.read(what, &entry).map_err(|error| OciError::of(what, error))?;
    let artifact = Artifact::parse(&bytes)?;
    let signature = signature(&layout, &entry.digest, &keys)?;
    blob(&layout, &artifact.config)?;
    let manifest = match artifact.manifest {
        Toml::Layer(layer) => blob(&layout, &layer)?,
        Toml::Annotation(text) => text,
    };
    let component = blob(&layout, &artifact.component)?;
    let files = match &artifact.files {
        Some(files) => artifact::files(&blob(&layout, files)?)?,
        None => BTreeMap::new(),
    };
    let package = Package::of(place.named(&entry.digest), manifest, component, files)?;
    Ok(package.signed(signature))
}

/// The manifest that is asked for; without tag and digest the only one.
fn entry(
    layout: &Layout,
    what: &'static str,
    tag: Option<&str>,
    digest: Option<Digest>,
) -> Result<Descriptor, OciError> {
    let select = Select { tag: tag.map(str::to_owned), digest };
    let found = layout.select(&select, None).and_then(|entry| entry.at_most(what, MAX_DOCUMENT));
    found.map_err(|error| OciError::of(what, error))
}

/// Who has signed the artifact of this digest.
fn signature(layout: &Layout, digest: &Digest, keys: &[Key]) -> Result<PluginSignature, OciError> {
    if keys.is_empty() {
        return Ok(PluginSignature::Unchecked);
    }
    let (what, digest) = ("manifest of the signatures", digest.to_string());
    let manifest = match entry(layout, what, Some(&signature::tag(&digest)), None) {
        Err(OciError::NoEntry { .. }) => return Ok(PluginSignature::Unsigned),
        entry => layout.read(what, &entry?).map_err(|error| OciError::of(what, error))?,
    };
    let mut judge = Judge::new(&digest, keys);
    for claim in signature::claims(&manifest)? {
        if let Some(good) = judge.look(&claim, &blob(layout, &claim.payload)?) {
            return Ok(good);
        }
    }
    Ok(judge.end())
}

fn blob(layout: &Layout, blob: &Blob) -> Result<Vec<u8>, OciError> {
    layout.read(blob.what(), &blob.descriptor).map_err(|error| OciError::of(blob.what(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_in_a_directorys_name_begins_no_tag() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a:b");
        std::fs::create_dir(&odd).unwrap();
        let odd = odd.to_str().unwrap();
        let digest = Digest::of(b"x");
        assert_eq!(Place::of(odd), Place { dir: odd, tag: None, digest: None });
        let (tagged, both) = (format!("{odd}:v1"), format!("{odd}:v1@{digest}"));
        assert_eq!(Place::of(&tagged), Place { dir: odd, tag: Some("v1"), digest: None });
        let place = Place::of(&both);
        assert_eq!(place, Place { dir: odd, tag: Some("v1"), digest: Some(digest) });
        assert_eq!(place.named(&digest), format!("oci-layout:{both}"));
    }
}
