//! Where plugins come from: a directory, those that came with the daemon, or an OCI artifact.

use std::path::Path;

use super::{PluginsError, Trust, bundled, manager::blocking, oci, package::Package};

/// A plugin of this source.
pub(super) async fn package(
    text: &str,
    bundled: Option<&Path>,
    trust: &Trust,
) -> Result<Package, PluginsError> {
    if let Some(name) = text.strip_prefix("bundled:") {
        let found = bundled::find(bundled, name)?;
        let mut package = blocking(move || Package::read(&found)).await?;
        text.clone_into(&mut package.source);
        return Ok(package);
    }
    if let Some(reference) = text.strip_prefix("oci://") {
        return oci::from_registry(reference, trust).await;
    }
    if let Some(layout) = text.strip_prefix("oci-layout:") {
        return oci::from_layout(layout, trust).await;
    }
    let path = Path::new(text).to_owned();
    if !path.is_absolute() {
        return Err(PluginsError::Source { text: text.to_owned() });
    }
    blocking(move || Package::read(&path)).await
}
