//! What can go wrong with plugins, beside their calls.

use std::{path::PathBuf, sync::Arc};

use vm_plugin::{LoadError, manifest::ManifestError, order::OrderError};
use vm_store::StoreError;

use super::OciError;

/// A failed operation on plugins.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PluginsError {
    #[error("no plugin is called {name}")]
    Unknown { name: String, there: Vec<String> },
    #[error("plugin {name} {version} is installed already")]
    Installed { name: String, version: String },
    #[error("{text:?} is no place to install a plugin from")]
    Source { text: String },
    #[error("no plugin {name} comes with this daemon")]
    NotBundled { name: String, there: Vec<String> },
    #[error("could not read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("could not write {}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{} is not a plugin's manifest", path.display())]
    Manifest { path: PathBuf, source: ManifestError },
    #[error("the files of the plugin are more than {what}")]
    Large { what: String },
    #[error("the {what} is {found}, and {expected} was asked for")]
    Digest { what: &'static str, found: String, expected: String },
    #[error("there is no grant {given} to give")]
    Grant { given: String, there: String },
    #[error("plugin {name} is named twice in the order")]
    Twice { name: String },
    #[error("plugin {name} was changed by somebody else meanwhile")]
    Changed { name: String },
    #[error(transparent)]
    Engine(#[from] vm_engine::EngineError),
    #[error("what the plugin has planned for VMs could not be undone")]
    Undo(#[source] Arc<vm_engine::EngineError>),
    #[error("no call {id} of plugin {name} is kept")]
    NoCall { name: String, id: u64 },
    #[error("call {id} of plugin {name} cannot be made again: {reason}")]
    NotReplayable { name: String, id: u64, reason: String },
    #[error("the work was broken off")]
    Broken { source: tokio::task::JoinError },
    #[error(transparent)]
    Oci(#[from] OciError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Order(#[from] OrderError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "there is none".to_owned() } else { format!("there is: {}", names.join(", ")) }
}

impl PluginsError {
    pub(crate) fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unknown { there, .. } | Self::NotBundled { there, .. } => listed(there),
            Self::Installed { name, .. } => {
                format!("upgrade it, or remove it first with `vm plugin remove {name}`")
            }
            Self::Source { .. } => {
                "give the absolute path of a directory with plugin.toml, bundled:NAME, oci://HOST/NAME:TAG, or oci-layout:DIR[:TAG]"
                    .into()
            }
            Self::Read { path, source } if source.kind() == std::io::ErrorKind::NotFound => {
                match path.extension() {
                    Some(wasm) if wasm == "wasm" => {
                        "build it first; `component` in plugin.toml names the file beside it".into()
                    }
                    _ => "a plugin is a directory with plugin.toml and the component it names".into(),
                }
            }
            Self::Read { .. } => "the daemon must be able to read it".into(),
            Self::Write { .. } => "is there space on the disk of the daemon's state directory?".into(),
            Self::Manifest { source, .. } => source.hint(),
            Self::Large { .. } => "files for guests belong into an image, or are fetched by the guest".into(),
            Self::Digest { .. } => "it has changed since it was shown: look at it again".into(),
            Self::Grant { there, .. } => format!("it asks for: {there}"),
            Self::Twice { name } => format!("name each once, {name} where it is to be called"),
            Self::Changed { name } => format!("look at it with `vm plugin show {name}` and try again"),
            Self::Engine(error) => return error.hint(),
            Self::Undo(error) => return error.hint(),
            Self::NoCall { name, .. } => format!("`vm plugin replay {name}` lists those that are kept"),
            Self::NotReplayable { .. } | Self::Broken { .. } => return None,
            Self::Oci(error) => error.hint(),
            Self::Load(error) => error.hint(),
            Self::Order(error) => error.hint(),
            Self::Store(error) => return error.hint(),
        })
    }
}
