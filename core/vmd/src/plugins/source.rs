//! Where plugins come from: a directory, or those that came with the daemon.

use std::path::Path;

use super::{PluginsError, bundled, manager::blocking, package::Package};

/// A plugin of this source.
pub(super) async fn package(text: &str, bundled: Option<&Path>) -> Result<Package, PluginsError> {
    if let Some(name) = text.strip_prefix("bundled:") {
        let found = bundled::find(bundled, name)?;
        let mut package = blocking(move || Package::read(&found)).await?;
        text.clone_into(&mut package.source);
        return Ok(package);
    }
    let path = Path::new(text).to_owned();
    if !path.is_absolute() {
        return Err(PluginsError::Source { text: text.to_owned() });
    }
    blocking(move || Package::read(&path)).await
}
