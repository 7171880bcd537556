//! What the engine needs of plugins and of the name service. The daemon implements both; the engine knows neither components
//! nor DNS.

mod imports;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::Arc,
};

use async_trait::async_trait;
pub use imports::{
    ImportFailure, ImportOffer, ImportRequest, ImportSource, ImportWatch, Imported, Importers, NoImporters,
    Probed,
};
use ipnet::Ipv4Net;
use vm_types::{
    Hook, VmId, VmPaths,
    plan::{Plan, RefName},
    plugin::{Change, Finding, VmFacts},
};

/// The plugins whose hooks are called around VMs.
#[async_trait]
pub trait Hooks: fmt::Debug + Send + Sync {
    /// Those that are enabled now, in the order in which they are called. Whoever starts a VM keeps the list for all of the start;
    /// plugins that are replaced meanwhile go on until it is dropped.
    fn enabled(&self) -> Vec<Arc<dyn Plugin>>;

    /// Removes what plugins have kept for a VM that is deleted.
    async fn forget(&self, vm: &VmId);
}

/// One plugin.
#[async_trait]
pub trait Plugin: fmt::Debug + Send + Sync {
    /// Its name.
    fn name(&self) -> &str;

    /// Whether a start fails when it does.
    fn required(&self) -> bool;

    /// Whether it has a hook. Calling an absent one gives an empty [`HookOutcome`].
    fn has(&self, hook: Hook) -> bool;

    /// The host's tool that it calls by this name, for these arguments; none where its grants have no such.
    fn tool(&self, name: &str, arguments: &[String]) -> Option<Tool>;

    /// The bytes of a blob that a plan names.
    async fn blob(&self, name: &str) -> Result<Vec<u8>, HookFailure>;

    /// Calls a hook; no lock may be held. All that is planned was granted.
    ///
    /// Cancel-safe: a call that is dropped has changed nothing, except in the running guest.
    async fn call(&self, hook: Hook, input: HookInput) -> Result<HookOutcome, HookFailure>;
}

/// A program of the host as a manifest has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    /// Absolute path.
    pub program: PathBuf,
    /// The arguments that undo the call.
    pub undo: Vec<String>,
}

/// What a hook is told.
#[derive(Debug, Clone, Default)]
pub struct HookInput {
    /// Why: `create` (a preflight before anything is made), `start`, `stopped`, `deleted`, `start-failed`, `plugin-removed`,
    /// `configured`, `doctor`. Whoever only wants to know what would be done says the same and asks for a dry run.
    pub reason: String,
    /// The VM; none for doctor.
    pub vm: Option<VmFacts>,
    /// What this plugin's earlier effects for this VM came to.
    pub references: BTreeMap<RefName, String>,
    /// The running guest, for hooks that act in it.
    pub guest: Option<VmPaths>,
    /// The plugin's configuration before a change.
    pub former_config: Option<serde_json::Value>,
    /// The new one, where it is not the plugin's own yet.
    pub config: Option<serde_json::Value>,
    /// Changes of the plugin's state are thrown away.
    pub dry_run: bool,
}

/// What a hook gave.
#[derive(Debug, Clone, Default)]
pub struct HookOutcome {
    /// Effects, all of them granted.
    pub plan: Plan,
    /// What it has to say.
    pub findings: Vec<Finding>,
    /// Its answer to a change of its configuration.
    pub change: Option<Change>,
}

/// Why a hook gave nothing; names plugin and hook.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct HookFailure {
    /// For people.
    pub message: String,
    /// For people: what to do.
    pub hint: Option<String>,
}

/// No plugins.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHooks;

#[async_trait]
impl Hooks for NoHooks {
    fn enabled(&self) -> Vec<Arc<dyn Plugin>> {
        Vec::new()
    }

    async fn forget(&self, _: &VmId) {}
}

/// The name service, as far as the engine has to do with it.
#[async_trait]
pub trait Names: fmt::Debug + Send + Sync {
    /// The bridge is up: serve on its address. The name servers that guests shall ask, and the domains they may leave out;
    /// `None` where it does not serve there. Called at each start of a VM, so it must be quick where nothing has changed.
    async fn bridge_up(&self, gateway: Ipv4Addr, subnet: Ipv4Net) -> Option<GuestNames>;

    /// The domains that the host's own resolver may ask the gateway about.
    fn domains(&self) -> Vec<String>;

    /// The bridge is about to go, if it is there.
    async fn bridge_down(&self);
}

/// What guests are told of the name service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestNames {
    /// Name servers.
    pub servers: Vec<IpAddr>,
    /// Search domains.
    pub search: Vec<String>,
}

/// No name service: guests ask the host's name servers themselves.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoNames;

#[async_trait]
impl Names for NoNames {
    async fn bridge_up(&self, _: Ipv4Addr, _: Ipv4Net) -> Option<GuestNames> {
        None
    }

    fn domains(&self) -> Vec<String> {
        Vec::new()
    }

    async fn bridge_down(&self) {}
}
