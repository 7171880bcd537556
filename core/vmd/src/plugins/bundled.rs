//! Plugins that come with the daemon: a directory with one for each, and a file that says which of them a new daemon has.
//!
//! Each is installed once. What an operator removes stays removed; a newer version is offered by the doctor and installed by nobody
//! but the operator.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use tokio::task::JoinSet;
use vm_api::{GrantChoice, InstallPlugin};
use vm_plugin::{Granted, Plugin};

use super::{
    PluginsError,
    manager::{Manager, blocking},
    package::{self, Package},
};

/// In the directory: which are installed by themselves.
const DEFAULT: &str = "default.toml";

/// Key of the names that have been installed by themselves once, a JSON list.
const OFFERED: &str = "plugins_offered";

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Default_ {
    /// Names of sub-directories.
    install: Vec<String>,
}

/// The directory: the configuration's, else beside the daemon's program, else where packages put it. None if there is none.
pub(crate) fn directory(configured: Option<&Path>) -> Option<PathBuf> {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.join("plugins"));
    match configured {
        Some(directory) => Some(directory.to_owned()),
        None => {
            beside().into_iter().chain(["/usr/lib/vmd/plugins".into()]).find(|directory| directory.is_dir())
        }
    }
}

/// The directory of a plugin that comes with the daemon.
pub(super) fn find(bundled: Option<&Path>, name: &str) -> Result<PathBuf, PluginsError> {
    let there = bundled.map(list).unwrap_or_default();
    match bundled {
        Some(directory) if there.iter().any(|other| other == name) => Ok(directory.join(name)),
        _ => Err(PluginsError::NotBundled { name: name.to_owned(), there }),
    }
}

/// Names of the sub-directories with a plugin in them.
pub(super) fn list(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let plugins = entries.filter(|entry| entry.path().join(package::MANIFEST).is_file());
    let mut names: Vec<_> = plugins.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Names of those that are installed by themselves.
pub(super) fn default(directory: &Path) -> Result<Vec<String>, PluginsError> {
    let path = directory.join(DEFAULT);
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|source| PluginsError::Read { path: path.clone(), source })?,
    };
    let parsed: Default_ = toml::from_str(&text).map_err(|error| PluginsError::Read {
        path,
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, error.to_string()),
    })?;
    Ok(parsed.install)
}

impl Manager {
    /// Installs what comes with the daemon and has not been installed before. What fails is told in the log, and tried again when the
    /// daemon next starts.
    pub(super) async fn install_bundled(self: &Arc<Self>) {
        if let Err(error) = self.try_install_bundled().await {
            let hint = error.hint().unwrap_or_default();
            tracing::error!(hint, "plugins that come with the daemon: {}", vm_types::report::chain(&error));
        }
    }

    async fn try_install_bundled(self: &Arc<Self>) -> Result<(), PluginsError> {
        let Some(directory) = self.bundled.clone() else { return Ok(()) };
        let meta = self.store.meta();
        let offered = meta.get(OFFERED).await?;
        let mut offered: BTreeSet<String> =
            offered.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        let from = directory.clone();
        let mut names = blocking(move || default(&from)).await?;
        names.retain(|name| !offered.contains(name));
        if names.is_empty() {
            return Ok(());
        }
        self.compile(&directory, &names).await;
        for name in names {
            let params = InstallPlugin {
                source: format!("bundled:{name}"),
                grants: Some(GrantChoice::All),
                ..InstallPlugin::default()
            };
            match self.install(params).await {
                Ok(_) | Err(PluginsError::Installed { .. }) => {
                    offered.insert(name);
                    let text = serde_json::to_string(&offered).unwrap_or_default();
                    meta.set(OFFERED, &text).await?;
                }
                Err(error) => {
                    let hint = error.hint().unwrap_or_default();
                    tracing::error!(
                        plugin = name,
                        hint,
                        "not installed: {}",
                        vm_types::report::chain(&error)
                    );
                }
            }
        }
        Ok(())
    }

    /// Compiles several side by side; installing them one by one then takes no time. What fails here fails there again, and is told
    /// there.
    async fn compile(self: &Arc<Self>, directory: &Path, names: &[String]) {
        let mut compiling = JoinSet::new();
        for name in names {
            let (manager, path) = (self.clone(), directory.join(name));
            compiling.spawn(async move {
                let package = blocking(move || Package::read(&path)).await?;
                let nothing = Granted::These(Vec::new());
                let config = serde_json::json!({});
                Plugin::new(&manager.runtime, package.manifest.clone(), package.component(), nothing, config)
                    .await?;
                Ok::<_, PluginsError>(())
            });
        }
        while compiling.join_next().await.is_some() {}
    }
}
