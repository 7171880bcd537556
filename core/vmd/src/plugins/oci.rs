//! Plugins that are OCI artifacts: in a registry, or in an image layout on disk.
//!
//! ```text
//!   image manifest ── config                                         application/vnd.wasm.config.v0+json
//!                  ├─ application/wasm                               the component
//!                  ├─ application/vnd.vm.plugin.manifest.v1+toml     plugin.toml; or in an annotation of the manifest
//!                  └─ application/vnd.vm.plugin.files.v1.tar         what is in files/; may be absent
//! ```
//!
//! That is the layout of WASM components in registries, with two layers of ours. Sizes are judged by the manifest before a blob is
//! read; everything is read into memory and compared with its digest before the package exists, so nothing is written of what is not
//! what it says it is. The package's source names the digest, so the same text installs the same plugin or none. Where the operator
//! trusts keys, the artifact's signatures are looked at, too: in [`signature`].

mod artifact;
mod error;
mod layout;
mod registry;
mod signature;
#[cfg(test)]
mod tests;

use super::{PluginsError, manager::blocking, package::Package};

pub(crate) use self::{error::OciError, signature::Trust};

/// A plugin of a registry, by `HOST[:PORT]/NAME[:TAG][@DIGEST]`.
pub(super) async fn from_registry(text: &str, trust: &Trust) -> Result<Package, PluginsError> {
    registry::package(text, registry::Settings::default(), trust).await
}

/// A plugin of an image layout, by `DIR[:TAG][@DIGEST]`.
pub(super) async fn from_layout(text: &str, trust: &Trust) -> Result<Package, PluginsError> {
    let (text, trust) = (text.to_owned(), trust.clone());
    blocking(move || layout::package(&text, &trust)).await
}

/// Text of a registry or an artifact, fit for terminals and logs.
fn plain(text: &str) -> String {
    const MOST: usize = 300;
    let mut plain: String = text.chars().take(MOST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(MOST).is_some() {
        plain.push('…');
    }
    plain.trim().to_owned()
}
