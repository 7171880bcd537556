//! `[images]`: where images come from.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};
use vm_engine::Registries;
use vm_oci::{CredentialStore, OciError, ReferenceDefaults, Settings};

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
}

impl Default for ImagesConfig {
    fn default() -> Self {
        Self {
            registry: "docker.io".into(),
            insecure: BTreeSet::new(),
            mirrors: BTreeMap::new(),
            parallel: Settings::default().parallel,
        }
    }
}

impl ImagesConfig {
    /// Key and rule of what cannot be.
    pub(super) fn mistake(&self) -> Option<(&'static str, String)> {
        if let Err(error) = ReferenceDefaults::registry(&self.registry) {
            return Some(("images.registry", format!("cannot be used: {error}")));
        }
        if !PARALLEL.contains(&self.parallel) {
            let (least, most) = PARALLEL.into_inner();
            let rule = format!("is {}; {least} to {most} are possible", self.parallel);
            return Some(("images.parallel", rule));
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
        Ok(Registries { settings, defaults: ReferenceDefaults::registry(&self.registry)? })
    }
}
