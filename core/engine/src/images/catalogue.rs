//! Catalogues: lists of images by name that an operator trusts, each with the address and the digest of its file.
//!
//! What a catalogue has is named `catalogue:NAME` everywhere, so that no registry's name changes its meaning when a catalogue does. Of
//! several catalogues the first that has a name for this host's processor counts; one that cannot be read is an error and not passed
//! over, for another might then be believed in its place.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use vm_host::files;
use vm_locks::{Ctx, Unlocked};
use vm_oci::{Address, Platform};
use vm_types::image::{CatalogueImage, ImageRecord};

use super::bundle::{WantedFile, digest};
use crate::{Engine, EngineError, ops::OpContext};

/// What stands before a name of a catalogue.
pub(super) const PREFIX: &str = "catalogue:";
/// The format that is read.
const VERSION: u32 = 1;
/// The most that is read of one, in bytes.
const MOST: u64 = 4 << 20;
/// As long as a tag, which it becomes.
const NAME_MAX: usize = 128;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[expect(dead_code, reason = "it has been looked at")]
    version: u32,
    #[serde(default)]
    image: Vec<Item>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Item {
    name: String,
    #[serde(default)]
    description: String,
    platform: String,
    url: String,
    sha256: String,
}

/// One that was read.
struct Catalogue {
    /// As it is configured.
    text: String,
    place: Place,
    items: Vec<Item>,
}

enum Place {
    Directory(PathBuf),
    Address(Address),
}

impl Engine {
    /// What the configured catalogues have for this host.
    ///
    /// # Errors
    /// A catalogue that cannot be read.
    pub async fn catalogue(&self) -> Result<Vec<CatalogueImage>, EngineError> {
        let (mut entries, mut seen) = (Vec::new(), HashSet::new());
        for text in &self.inner.content.catalogues {
            let catalogue = self.read_catalogue(text).await?;
            for item in catalogue.items.iter().filter(|item| item.platform == host()) {
                let (wanted, digest) = self.file_of(&catalogue, item)?;
                if seen.insert(item.name.clone()) {
                    entries.push(CatalogueImage {
                        name: item.name.clone(),
                        description: item.description.clone(),
                        platform: item.platform.clone(),
                        sha256: digest.hex(),
                        source: wanted.to_string(),
                        catalogue: catalogue.text.clone(),
                    });
                }
            }
        }
        Ok(entries)
    }

    /// Acquires an image of a catalogue; what is here already, and still what the catalogue says, is not fetched again.
    pub(super) async fn pull_of_catalogue(
        &self,
        ctx: &mut Ctx<Unlocked>,
        wanted: &str,
        name: Option<String>,
        context: &OpContext,
    ) -> Result<ImageRecord, EngineError> {
        context.progress(format!("{PREFIX}{wanted}: reading the catalogue"), 0, None);
        let (file, sha256) = self.entry(wanted).await?;
        // With the digest of the file, by which it is known again.
        let from = format!("{file} sha256:{}", sha256.hex());
        let reference = name.unwrap_or_else(|| format!("{PREFIX}{wanted}"));
        let images = self.inner.store.images();
        // A tarball's has a word more in front.
        let tarballs = format!("import {from}");
        let mut known = images.list().await?.into_iter();
        let known = known.find(|image| image.source == from || image.source == tarballs);
        if let Some(known) = known {
            let _catalogue = ctx.lock(&self.inner.catalogue).await;
            if self.is_whole(&known.digest).await? {
                images.put(ImageRecord { references: vec![reference], ..known.clone() }).await?;
                return Ok(images.by_digest(known.digest.hex()).await?.unwrap_or(known));
            }
        }
        let import = async |ctx: &mut Ctx<Unlocked>, path: &Path| {
            self.import_now(ctx, path, &from, Some(reference), context).await
        };
        self.with_file(ctx, &file, context, import).await
    }

    async fn entry(&self, name: &str) -> Result<(WantedFile, vm_oci::Digest), EngineError> {
        let mut others = Vec::new();
        for text in &self.inner.content.catalogues {
            let catalogue = self.read_catalogue(text).await?;
            for item in catalogue.items.iter().filter(|item| item.name == name) {
                if item.platform == host() {
                    return self.file_of(&catalogue, item);
                }
                others.push(item.platform.clone());
            }
        }
        let hint = if self.inner.content.catalogues.is_empty() {
            "no catalogue is configured: images.catalogues in config.toml names them".to_owned()
        } else if others.is_empty() {
            "`vm image catalogue` lists what there is".to_owned()
        } else {
            format!("it is there for {} only; this host is {}", others.join(", "), host())
        };
        Err(EngineError::NotFound { what: "image in the catalogues", name: name.to_owned(), hint })
    }

    async fn read_catalogue(&self, text: &str) -> Result<Catalogue, EngineError> {
        let client = &self.inner.content.client;
        let (place, bytes) = if Address::is_meant(text) {
            let address = client.address(text)?;
            let bytes = client.document(&address, MOST).await?;
            (Place::Address(address), bytes)
        } else {
            let path = PathBuf::from(text);
            let failed = |source| EngineError::File { action: "read", path: path.clone(), source };
            let bytes = files::read_at_most(&path, MOST).map_err(failed)?;
            (Place::Directory(path.parent().unwrap_or(Path::new("/")).to_owned()), bytes)
        };
        let items =
            parse(&bytes).map_err(|reason| EngineError::Catalogue { catalogue: text.to_owned(), reason })?;
        Ok(Catalogue { text: text.to_owned(), place, items })
    }

    /// An entry's file; where it says no whole address, beside the catalogue.
    fn file_of(
        &self,
        catalogue: &Catalogue,
        item: &Item,
    ) -> Result<(WantedFile, vm_oci::Digest), EngineError> {
        let sha256 = digest(&item.sha256)?;
        let wanted = match &catalogue.place {
            Place::Address(address) => {
                self.wanted_at(address.join(&item.url, &self.inner.content.client)?, sha256)
            }
            Place::Directory(_) if Address::is_meant(&item.url) => {
                self.wanted_file(&item.url, Some(&item.sha256))?
            }
            Place::Directory(directory) => {
                let path = directory.join(&item.url);
                self.wanted_file(&path.to_string_lossy(), Some(&item.sha256))?
            }
        };
        Ok((wanted, sha256))
    }
}

fn host() -> String {
    Platform::host().to_string()
}

/// Whether this can be the name of an image in a catalogue: what can be a tag.
pub(super) fn is_name(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len())
        && !name.starts_with(['.', '-'])
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// The entries of a catalogue; an error says in words what is wrong with it.
fn parse(bytes: &[u8]) -> Result<Vec<Item>, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let plain = |error: toml::de::Error| error.message().to_owned();
    // A later version may say more than is known here.
    let Version { version } = toml::from_str(text).map_err(plain)?;
    if version != VERSION {
        return Err(format!("it is of version {version}; {VERSION} is supported"));
    }
    let File { image, .. } = toml::from_str(text).map_err(plain)?;
    let mut seen = HashSet::new();
    for item in &image {
        let Item { name, platform, .. } = item;
        if !is_name(name) {
            return Err(format!("{name:?} is no name: 1 to {NAME_MAX} of letters, digits, '_', '.' and '-'"));
        }
        if digest(&item.sha256).is_err() {
            return Err(format!("the sha256 of {name} is not 64 hexadecimal digits"));
        }
        if !seen.insert((name, platform)) {
            return Err(format!("{name} is in it twice for {platform}"));
        }
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, platform: &str) -> String {
        let digits = "0a".repeat(32);
        format!("[[image]]\nname = {name:?}\nplatform = {platform:?}\nurl = \"x\"\nsha256 = \"{digits}\"\n")
    }

    #[test]
    fn a_catalogue_is_read_or_told_what_is_wrong() {
        let two = entry("tool-1.2", "linux/amd64") + &entry("tool-1.2", "linux/arm64");
        let items = parse(format!("version = 1\n{two}").as_bytes()).unwrap();
        assert_eq!(items.len(), 2);
        assert!(parse(b"version = 1").unwrap().is_empty());
        for (text, part) in [
            ("version = 2\nnews = true".to_owned(), "version 2; 1 is supported"),
            ("version = 1\nimages = []".to_owned(), "unknown field"),
            (entry("x", "linux/amd64"), "version"),
            (format!("version = 1\n{}", entry("../x", "linux/amd64")), "no name"),
            (format!("version = 1\n{}", entry("a:b", "linux/amd64")), "no name"),
            (format!("version = 1\n{two}{two}"), "twice for linux/amd64"),
            (format!("version = 1\n{}", entry("x", "p").replace("0a0a", "0a")), "64 hexadecimal"),
            (format!("version = 1\n{}", entry("x", "p").replace("sha256", "sha512")), "unknown field"),
        ] {
            let reason = parse(text.as_bytes()).unwrap_err();
            assert!(reason.contains(part), "{part}: {reason}");
        }
        assert!(parse(b"\xff").is_err());
    }
}
