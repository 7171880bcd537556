//! `[images]`: where images come from.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use vm_engine::Registries;
use vm_oci::{Address, CredentialStore, OciError, ReferenceDefaults, Settings};

const PARALLEL: std::ops::RangeInclusive<usize> = 1..=32;

/// Registries.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ImagesConfig {
    /// Whose images short names are, `HOST[:PORT]`.
    registry: String,
    /// Registries that are spoken with in plain HTTP, besides those on loopback.
    insecure: BTreeSet<String>,
    /// Places to ask first for a registry's images: `HOST[:PORT][/PATH]`.
    mirrors: BTreeMap<String, Vec<String>>,
    /// How many layers are transferred at once.
    parallel: usize,
    /// Catalogues of images, by absolute path or address; the first one that has a name counts.
    catalogues: Vec<String>,
}

impl Default for ImagesConfig {
    fn default() -> Self {
        Self {
            registry: "docker.io".into(),
            insecure: BTreeSet::new(),
            mirrors: BTreeMap::new(),
            parallel: Settings::default().parallel,
            catalogues: Vec::new(),
        }
    }
}

impl ImagesConfig {
    /// Key and rule of what cannot be.
    pub(super) fn mistake(&self) -> Option<(&'static str, String)> {
        if let Err(error) = ReferenceDefaults::registry(&self.registry) {
            return Some(("images.registry", format!("cannot be used: {error}")));
        }
        let is_host = |text: &str| !text.contains("://") && ReferenceDefaults::registry(text).is_ok();
        if let Some(bad) = self.insecure.iter().find(|text| !is_host(text)) {
            return Some((
                "images.insecure",
                format!("has {bad:?}; write HOST or HOST:PORT, without http://"),
            ));
        }
        if let Some(bad) = self.mirrors.keys().find(|text| !is_host(text)) {
            let rule = format!("is about {bad:?}; write the registry's HOST or HOST:PORT, without https://");
            return Some(("images.mirrors", rule));
        }
        let is_place = |text: &str| {
            let host = text.split_once('/').map_or(text, |(host, _)| host);
            is_host(host) && !text.contains(|c: char| c.is_whitespace() || c.is_control())
        };
        if let Some(bad) = self.mirrors.values().flatten().find(|text| !is_place(text)) {
            let rule = format!("has {bad:?}; write HOST[:PORT][/PATH], without https://");
            return Some(("images.mirrors", rule));
        }
        if !PARALLEL.contains(&self.parallel) {
            let (least, most) = PARALLEL.into_inner();
            let rule = format!("is {}; {least} to {most} are possible", self.parallel);
            return Some(("images.parallel", rule));
        }
        for catalogue in &self.catalogues {
            if !Path::new(catalogue).is_absolute() && !Address::is_meant(catalogue) {
                let rule =
                    format!("has {catalogue:?}, which is neither an absolute path nor an https address");
                return Some(("images.catalogues", rule));
            }
        }
        None
    }

    /// What the engine is given. `logins` is the daemon's own file of names and passwords; docker's comes after it.
    pub(crate) fn registries(&self, logins: PathBuf) -> Result<Registries, OciError> {
        let settings = Settings {
            credentials: CredentialStore::new([logins].into_iter().chain(CredentialStore::docker())),
            insecure: self.insecure.clone(),
            mirrors: self.mirrors.clone(),
            parallel: self.parallel,
            ..Settings::default()
        };
        let defaults = ReferenceDefaults::registry(&self.registry)?;
        Ok(Registries { settings, defaults, catalogues: self.catalogues.clone() })
    }
}
