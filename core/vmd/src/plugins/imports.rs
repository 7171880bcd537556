//! Bringing workspaces into guests: the engine asks here, importers decide, and this does it.
//!
//! ```text
//!   engine ── probe ──> each importer ──> offers, the best first
//!          ── import ─> one importer ── Host: Repository ──> vm_workspace      on threads that block
//!                            │            archive, history ═══ Made ═══╗ streamed, never kept
//!                            └─────────── Watched: Sandbox ────────────╨──> the guest's agent
//!                                             │ what was unpacked at the destination counts as sent
//!          <── Imported: Baseline <───────────┘ with how the guest has it then
//! ```
//!
//! An importer sees neither the host's paths nor its bytes, unless it asks for a file's: archives go from the workspace to the guest
//! while they are made.

mod difference;
mod host;
mod made;
mod meter;
#[cfg(test)]
mod tests;
mod watched;

use std::sync::Arc;

use jsonrpsee::core::async_trait;
use vm_engine::ports::{
    ImportFailure, ImportOffer, ImportRequest, ImportSource, Imported, Importers, Probed,
};
use vm_plugin::{CallError, Hook, Input, PluginError, World, call::Job};
use vm_workspace::WorkspaceError;

use self::{host::Host, meter::Meter, watched::Watched};
use super::{
    calls::told,
    entry::{Entry, Status},
    manager::Manager,
    sandbox::{self, GuestFiles},
};

/// What the engine is told of an error that a plugin had, or gave on.
fn failure(plugin: &str, error: &CallError) -> ImportFailure {
    let (code, message) = match error {
        // Words for people already; that it was a hook of a plugin says nothing to them.
        CallError::Failed { error, .. } => {
            (error.code.as_str(), format!("importer {plugin}: {}", error.message))
        }
        CallError::Disabled { .. } => ("plugin.disabled", told(error)),
        CallError::Trapped { .. } => ("plugin.broke-off", told(error)),
        CallError::Excess { .. } => ("plugin.limit", told(error)),
        CallError::TimedOut { .. } => ("workspace.time-limit", told(error)),
        CallError::Impossible { .. }
        | CallError::Denied { .. }
        | CallError::State { .. }
        | CallError::Incomplete { .. } => ("plugin.failed", told(error)),
    };
    ImportFailure { plugin: plugin.to_owned(), code: code.to_owned(), message, hint: Some(error.hint()) }
}

/// What the engine is told of an error that no plugin has to do with.
fn own_failure(plugin: &str, error: PluginError) -> ImportFailure {
    ImportFailure { plugin: plugin.to_owned(), code: error.code, message: error.message, hint: error.hint }
}

/// What a plugin is told of an error with the workspace.
fn of_workspace(error: &WorkspaceError) -> PluginError {
    let code = match error {
        WorkspaceError::Read { .. } => "workspace.unreadable",
        WorkspaceError::NoSuchFile { .. } => "workspace.no-such-file",
        WorkspaceError::Changing { .. } => "workspace.changing",
        WorkspaceError::NotARepository { .. } => "workspace.not-a-repository",
        WorkspaceError::NoCommit { .. } => "workspace.no-commit",
        WorkspaceError::BaseGone { .. } => "workspace.base-gone",
        WorkspaceError::Cancelled => "workspace.cancelled",
        _ => "workspace.failed",
    };
    let mut told = PluginError::new(code, vm_types::report::chain(error));
    told.hint = error.hint();
    told
}

/// Work with a workspace, which blocks.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, WorkspaceError> + Send + 'static,
) -> Result<T, PluginError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| of_workspace(&error)),
        Err(_) => Err(made::broke_off()),
    }
}

impl Entry {
    fn is_importer(&self) -> bool {
        self.manifest.as_ref().is_some_and(|manifest| manifest.world == World::WorkspaceImporter)
    }

    /// Why it cannot bring anything, in the words of `vm plugin`.
    fn unavailable(&self) -> ImportFailure {
        let name = &self.record.name;
        let (code, message, hint) = match &self.status {
            Status::Loaded(_) => (
                "plugin.no-importer",
                format!("plugin {name} is no importer"),
                "`vm workspace plan` shows what there is".to_owned(),
            ),
            Status::Disabled => (
                "plugin.disabled",
                format!("plugin {name} is disabled"),
                format!("`vm plugin enable {name}`"),
            ),
            Status::Broken(fault) => {
                let hint = fault.hint.clone().unwrap_or_else(|| format!("`vm plugin show {name}`"));
                ("plugin.broken", format!("plugin {name} cannot be called: {}", fault.reason), hint)
            }
        };
        ImportFailure { plugin: name.clone(), code: code.to_owned(), message, hint: Some(hint) }
    }

    async fn offers(&self, source: &ImportSource) -> Result<Vec<ImportOffer>, ImportFailure> {
        let plugin = self.loaded().ok_or_else(|| self.unavailable())?;
        let host = Host::new(source.clone(), Arc::default());
        let input =
            Input { repository: Some(Arc::new(host)), ..self.bare_input(plugin, "probe".to_owned()).await };
        let outcome = self.recorded(plugin, Hook::Probe, input).await;
        let outcome = outcome.map_err(|error| failure(&self.record.name, &error))?;
        let offer = |offer: vm_plugin::call::Offer| ImportOffer {
            plugin: self.record.name.clone(),
            strategy: offer.strategy,
            score: offer.score,
            description: offer.description,
            warnings: offer.warnings,
        };
        Ok(outcome.offers.into_iter().map(offer).collect())
    }
}

impl Manager {
    /// Has an importer do its work in a guest.
    async fn bring(
        &self,
        request: ImportRequest,
        guest: Arc<dyn GuestFiles>,
    ) -> Result<Imported, ImportFailure> {
        let name = request.plugin.as_str();
        let entry = self.find(name).map_err(|error| ImportFailure {
            plugin: name.to_owned(),
            code: "plugin.unknown".to_owned(),
            message: error.to_string(),
            hint: error.hint(),
        })?;
        let plugin = entry.loaded().filter(|_| entry.is_importer()).ok_or_else(|| entry.unavailable())?;
        let account = guest.account(&request.user).await.map_err(|error| own_failure(name, error))?;
        let job = Job {
            strategy: request.strategy.clone(),
            destination: request.destination.clone(),
            user: request.user.clone(),
            uid: account.uid,
            gid: account.gid,
            replace: request.replace,
        };
        let meter = Arc::new(Meter::new(request.watch.clone()));
        let host = Arc::new(
            Host::new(request.source.clone(), meter.clone()).with_guest(guest.clone(), &request.destination),
        );
        let sandbox =
            Watched::new(guest.clone(), request.watch.clone(), &request.destination, request.replace);
        let input = Input {
            vm: Some(request.vm.clone()),
            sandbox: Some(Arc::new(sandbox)),
            repository: Some(host.clone()),
            job: Some(job),
            progress: Some(meter.clone()),
            time_limit: Some(request.time_limit),
            ..entry.bare_input(plugin, "import".to_owned()).await
        };
        let outcome =
            entry.recorded(plugin, Hook::Import, input).await.map_err(|error| failure(name, &error))?;
        let by = format!("{name}/{}", request.strategy);
        let guest = guest.survey(&request.destination).await.map_err(|error| own_failure(name, error))?;
        Ok(Imported { baseline: host.baseline(&by, guest), findings: outcome.findings, bytes: meter.sum() })
    }
}

#[async_trait]
impl Importers for Manager {
    async fn probe(&self, source: &ImportSource) -> Probed {
        let mut probed = Probed::default();
        for entry in &self.set().0 {
            if !entry.is_importer() || matches!(entry.status, Status::Disabled) {
                continue;
            }
            match entry.offers(source).await {
                Ok(offers) => probed.offers.extend(offers),
                Err(failure) => probed.failures.push(failure),
            }
        }
        // Stable: who comes first in the plugins' order stays first.
        probed.offers.sort_by_key(|offer| std::cmp::Reverse(offer.score));
        probed
    }

    async fn import(&self, request: ImportRequest) -> Result<Imported, ImportFailure> {
        let guest = sandbox::lazily(request.guest.clone(), &self.shared.client_key, &request.source.scratch);
        self.bring(request, guest).await
    }
}
