//! An image layout: a directory with `oci-layout`, `index.json` and the blobs by their digests.
//! <https://github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md>
//!
//! All of it is opened beneath the directory, so that links can lead from one file of the layout to another but not out of it.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};
use oci_distribution::manifest::{ImageIndexEntry, OciImageIndex};
use serde::Deserialize;
use vm_api::PluginSignature;

use super::{
    OciError, Trust,
    artifact::{self, Artifact, Blob, MAX_DOCUMENT, Toml},
    plain,
    signature::{self, Judge, Key},
};
use crate::plugins::{PluginsError, package::Package};

/// Annotation of an entry of the index: its tag.
const TAG: &str = "org.opencontainers.image.ref.name";
/// How often openat2(2) is asked for one file.
const TRIES: u32 = 100;
const INDEX: &str = "index.json";
const MARKER: &str = "oci-layout";

/// A directory that is open.
#[derive(Debug)]
struct Layout {
    path: PathBuf,
    dir: OwnedFd,
}

/// Which artifact of a layout.
#[derive(Debug, PartialEq, Eq)]
struct Place<'a> {
    dir: &'a str,
    tag: Option<&'a str>,
    digest: Option<&'a str>,
}

impl<'a> Place<'a> {
    /// Of `DIR[:TAG][@DIGEST]`. A directory may have a colon in its name.
    fn of(text: &'a str) -> Self {
        let (text, digest) = match text.rsplit_once('@') {
            Some((rest, digest)) if artifact::is_digest(digest) => (rest, Some(digest)),
            _ => (text, None),
        };
        match text.rsplit_once(':') {
            Some((dir, tag)) if !tag.is_empty() && !tag.contains('/') && !Path::new(text).is_dir() => {
                Self { dir, tag: Some(tag), digest }
            }
            _ => Self { dir: text, tag: None, digest },
        }
    }

    fn named(&self, digest: &str) -> String {
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
    let layout = Layout::open(Path::new(place.dir))?;
    let entry = layout.entry(place.tag, place.digest)?;
    let artifact = Artifact::parse(&layout.blob(&entry)?)?;
    let signature = layout.signature(&entry.digest, &keys)?;
    layout.blob(&artifact.config)?;
    let manifest = match artifact.manifest {
        Toml::Layer(layer) => layout.blob(&layer)?,
        Toml::Annotation(text) => text,
    };
    let component = layout.blob(&artifact.component)?;
    let files = match &artifact.files {
        Some(files) => artifact::files(&layout.blob(files)?)?,
        None => BTreeMap::new(),
    };
    let package = Package::of(place.named(&entry.digest), manifest, component, files)?;
    Ok(package.signed(signature))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    image_layout_version: String,
}

impl Layout {
    fn open(path: &Path) -> Result<Self, OciError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = open(path, flags, Mode::empty())
            .map_err(|error| OciError::Layout { path: path.to_owned(), source: error.into() })?;
        let layout = Self { path: path.to_owned(), dir };
        let marker: Marker = json(MARKER, &layout.document(MARKER)?)?;
        if !marker.image_layout_version.starts_with("1.") {
            let reason = format!("version {:?} is none of 1.x", plain(&marker.image_layout_version));
            return Err(OciError::Malformed { what: MARKER, reason });
        }
        Ok(layout)
    }

    /// A regular file beneath the directory, and its size.
    fn file(&self, path: &str) -> Result<(File, u64), OciError> {
        let failed = |source: io::Error| OciError::Layout { path: self.path.join(path), source };
        // Not blocking: a named pipe would wait for its other end.
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        // The kernel asks for another try where something was renamed while it went up by `..`.
        let mut tries = (0..TRIES).map(|_| openat2(&self.dir, path, how));
        let opened = tries.find(|opened| !matches!(opened, Err(Errno::EAGAIN)));
        let file = match opened.unwrap_or(Err(Errno::EAGAIN)) {
            Err(Errno::EXDEV | Errno::ELOOP) => return Err(OciError::Outside { path: path.to_owned() }),
            file => File::from(file.map_err(|error| failed(error.into()))?),
        };
        let about = file.metadata().map_err(failed)?;
        if !about.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")));
        }
        Ok((file, about.len()))
    }

    /// At most `most` bytes and one more.
    fn read(&self, path: &str, file: File, most: u64) -> Result<Vec<u8>, OciError> {
        let mut bytes = Vec::new();
        file.take(most + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| OciError::Layout { path: self.path.join(path), source })?;
        Ok(bytes)
    }

    fn document(&self, path: &'static str) -> Result<Vec<u8>, OciError> {
        let (file, _) = self.file(path)?;
        let bytes = self.read(path, file, MAX_DOCUMENT)?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(OciError::Large { what: path, bytes: bytes.len() as u64, most: MAX_DOCUMENT });
        }
        Ok(bytes)
    }

    /// The image manifest that is asked for; without tag and digest the only one.
    fn entry(&self, tag: Option<&str>, digest: Option<&str>) -> Result<Blob, OciError> {
        let index: OciImageIndex = json(INDEX, &self.document(INDEX)?)?;
        // Signatures are found by the tags that they are given; nobody means them who names none.
        let meant = |entry: &ImageIndexEntry| !tag_of(entry).is_some_and(signature::is_tag);
        let mut found = index.manifests.iter().filter(|entry| {
            tag.map_or_else(|| meant(entry), |tag| tag_of(entry) == Some(tag))
                && digest.is_none_or(|digest| entry.digest == digest)
        });
        let there = || index.manifests.iter().filter(|entry| meant(entry)).map(name).collect();
        let Some(first) = found.next() else {
            let asked = [tag, digest].into_iter().flatten().collect::<Vec<_>>().join(" with ");
            return Err(OciError::NoEntry { asked, there: there() });
        };
        // One artifact may have several tags.
        if found.any(|other| other.digest != first.digest) {
            return Err(OciError::Ambiguous { there: there() });
        }
        Blob::new("artifact's manifest", &first.digest, first.size, MAX_DOCUMENT)
    }

    /// Who has signed the artifact of this digest.
    fn signature(&self, digest: &str, keys: &[Key]) -> Result<PluginSignature, OciError> {
        if keys.is_empty() {
            return Ok(PluginSignature::Unchecked);
        }
        let manifest = match self.entry(Some(&signature::tag(digest)), None) {
            Err(OciError::NoEntry { .. }) => return Ok(PluginSignature::Unsigned),
            manifest => self.blob(&manifest?)?,
        };
        let mut judge = Judge::new(digest, keys);
        for claim in signature::claims(&manifest)? {
            if let Some(good) = judge.look(&claim, &self.blob(&claim.payload)?) {
                return Ok(good);
            }
        }
        Ok(judge.end())
    }

    fn blob(&self, blob: &Blob) -> Result<Vec<u8>, OciError> {
        let path = format!("blobs/sha256/{}", blob.hex());
        let (file, bytes) = self.file(&path)?;
        blob.check_size(bytes)?;
        blob.verified(self.read(&path, file, blob.size)?)
    }
}

fn json<T: serde::de::DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, OciError> {
    serde_json::from_slice(bytes)
        .map_err(|error| OciError::Malformed { what, reason: plain(&error.to_string()) })
}

fn tag_of(entry: &ImageIndexEntry) -> Option<&str> {
    entry.annotations.as_ref()?.get(TAG).map(String::as_str)
}

fn name(entry: &ImageIndexEntry) -> String {
    plain(tag_of(entry).unwrap_or(&entry.digest))
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
        let digest = format!("sha256:{}", "0".repeat(64));
        assert_eq!(Place::of(odd), Place { dir: odd, tag: None, digest: None });
        let (tagged, both) = (format!("{odd}:v1"), format!("{odd}:v1@{digest}"));
        assert_eq!(Place::of(&tagged), Place { dir: odd, tag: Some("v1"), digest: None });
        let place = Place::of(&both);
        assert_eq!(place, Place { dir: odd, tag: Some("v1"), digest: Some(&digest) });
        assert_eq!(place.named(&digest), format!("oci-layout:{both}"));
    }
}
