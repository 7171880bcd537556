//! What the engine needs of the plugins that bring workspaces into guests.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use vm_types::{
    VmPaths,
    plugin::{Finding, VmFacts},
};
use vm_workspace::{Baseline, Workspace};

/// The plugins that bring workspaces into guests.
#[async_trait]
pub trait Importers: fmt::Debug + Send + Sync {
    /// What each of them offers for a workspace. Looks at nothing but the host's side.
    async fn probe(&self, source: &ImportSource) -> Probed;

    /// Has one of them bring a workspace into a guest; no lock may be held. The destination then has what the workspace has, and the
    /// outcome says what that was.
    ///
    /// Cancel-safe: one that is dropped goes no further; what it has brought by then stays in the guest, see
    /// [`ImportWatch::begins`]. Work on the host that blocks ends with the workspace's own cancellation.
    async fn import(&self, request: ImportRequest) -> Result<Imported, ImportFailure>;
}

/// What is to be brought.
#[derive(Debug, Clone)]
pub struct ImportSource {
    /// It.
    pub workspace: Arc<Workspace>,
    /// What was brought to the same place in the same VM before, where that was done to its end.
    pub former: Option<Arc<Baseline>>,
    /// A directory of the host for what has to be made beforehand; nothing stays there.
    pub scratch: PathBuf,
}

/// What importers offer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Probed {
    /// The best first; of those with the same score, in the plugins' order.
    pub offers: Vec<ImportOffer>,
    /// Plugins that could not say.
    pub failures: Vec<ImportFailure>,
}

/// A way to bring a workspace into a guest. People name it `PLUGIN/STRATEGY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportOffer {
    /// The plugin that would do it.
    pub plugin: String,
    /// Its name for the way.
    pub strategy: String,
    /// 0 is a last resort, 100 a perfect fit.
    pub score: u32,
    /// What would be brought, for people.
    pub description: String,
    /// What people should know before.
    pub warnings: Vec<String>,
}

/// What is to be done.
#[derive(Clone)]
pub struct ImportRequest {
    /// The plugin that does it.
    pub plugin: String,
    /// One of the strategies that it offers.
    pub strategy: String,
    /// What.
    pub source: ImportSource,
    /// The VM.
    pub vm: VmFacts,
    /// How its guest is reached.
    pub guest: VmPaths,
    /// Where to: an absolute path in the guest.
    pub destination: String,
    /// Whose it shall be there, as at a login: name or number, with or without `:GROUP`.
    pub user: String,
    /// What is at the destination may be thrown away: somebody said so, or an earlier import broke off after
    /// [`ImportWatch::begins`].
    pub replace: bool,
    /// How long it may take in all.
    pub time_limit: Duration,
    /// Who is told how it goes.
    pub watch: Arc<dyn ImportWatch>,
}

/// Who is told how an import goes.
#[async_trait]
pub trait ImportWatch: Send + Sync {
    /// Something is about to be removed from the destination or written there, other than bringing what is known up to date. What
    /// is there from now on is this import's, and where that breaks off, [`ImportSource::former`] is no longer true and the next
    /// one may [replace](ImportRequest::replace) it. Called once, if at all; an error ends the import before anything is changed.
    async fn begins(&self) -> Result<(), ImportFailure>;

    /// A step, and how many bytes of it are done, of how many where that is known. Called often, so it must be quick.
    fn progress(&self, step: &str, done: u64, total: Option<u64>);
}

/// What an import came to.
#[derive(Debug, Clone)]
pub struct Imported {
    /// What the guest was given, and how it had it right then.
    pub baseline: Baseline,
    /// What the plugin has to say.
    pub findings: Vec<Finding>,
    /// Bytes of archives that were sent.
    pub bytes: u64,
}

/// Why an importer did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ImportFailure {
    /// The plugin.
    pub plugin: String,
    /// For programs: dotted lower-case words, e.g. `workspace.guest-changed`; some are the plugin's own.
    pub code: String,
    /// For people; names the plugin.
    pub message: String,
    /// For people: what to do.
    pub hint: Option<String>,
}

/// No importers.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoImporters;

#[async_trait]
impl Importers for NoImporters {
    async fn probe(&self, _: &ImportSource) -> Probed {
        Probed::default()
    }

    async fn import(&self, request: ImportRequest) -> Result<Imported, ImportFailure> {
        Err(ImportFailure {
            message: format!("there is no plugin {}", request.plugin),
            plugin: request.plugin,
            code: "plugin.unknown".to_owned(),
            hint: None,
        })
    }
}
