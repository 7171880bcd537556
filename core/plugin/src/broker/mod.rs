//! The broker: all that a component can ask of the host during one call, for every version of the interface. What it plans is
//! collected here and leaves only by [`Call::finish`].
//!
//! The handles that a hook gets as parameters carry no data: there is one context, one VM, one plan in a call, and they are
//! fields of [`Call`]. The handles a component makes are entries of a table with an end.

#![expect(unreachable_pub, reason = "the generated bindings re-export the handles' types")]

mod host;
mod live;
mod names;
mod planning;
mod repository;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use sha2::{Digest as _, Sha256};
use vm_types::VmId;
use wasmtime::component::{Resource, ResourceTable};

pub use names::Query;

use crate::{
    bindings::vm::plugin::{log, state, types},
    call::{Finding, Input, LogLevel, LogLine, Offer},
    error::{Excess, PluginError, tame},
    grant::{Grant, Grants},
    hook::Hook,
    limits::{Limits, Totals},
    plan::Plan,
    ports::{Blob, Difference, Directory, GuestCommand, GuestOutput, StateChange, StateScope, StateStore},
    wasi::Wasi,
};

/// Borrowed: the call itself.
pub struct Context;
/// Borrowed: the call's VM.
pub struct Vm;
/// Borrowed: the host's facts.
pub struct Facts;
/// Borrowed: the call's report.
pub struct Report;
/// Borrowed: what is planned for the machine.
pub struct MachineConfig;
/// Borrowed: what is planned for the guest.
pub struct GuestConfig;
/// Borrowed: what is planned for the host.
pub struct HostPlan;
/// Borrowed: the running guest.
pub struct SandboxHandle;
/// Borrowed: the name service's VMs.
pub struct Vms;
/// Borrowed: the question.
pub struct QueryHandle;
/// Borrowed: the repository.
pub struct RepoHandle;
/// How a guest differs from a repository.
pub struct DifferenceHandle(Arc<dyn Difference>);
/// Borrowed: the offers.
pub struct Offers;
/// Borrowed: the job.
pub struct JobHandle;
/// A name for what is not there yet.
pub struct Reference(String);
/// Bytes in the host, with the name they can be planned by.
pub struct BlobHandle(Option<String>, Arc<dyn Blob>);
/// A rule in the making, by its place in the call.
pub struct RuleHandle(usize);
/// A command in the making.
pub struct CommandHandle(GuestCommand);
/// How a command ended.
pub struct OutputHandle(GuestOutput);

/// A method's refusal: an error for the component, or the end of the call.
pub enum Refusal {
    /// The component may go on.
    Error(PluginError),
    /// It may not.
    Trap(wasmtime::Error),
}

impl From<PluginError> for Refusal {
    fn from(error: PluginError) -> Self {
        Self::Error(error)
    }
}

impl From<wasmtime::Error> for Refusal {
    fn from(error: wasmtime::Error) -> Self {
        Self::Trap(error)
    }
}

impl From<Excess> for Refusal {
    fn from(excess: Excess) -> Self {
        Self::Trap(excess.into())
    }
}

impl From<crate::ports::StateError> for Refusal {
    fn from(error: crate::ports::StateError) -> Self {
        Self::Error(PluginError { retryable: true, ..PluginError::new("state.unavailable", error.0) })
    }
}

/// What a method of a resource answers.
type Answer<T = ()> = Result<T, Refusal>;

/// What stays the same for all calls of one plugin.
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) config: String,
    pub(crate) grants: Grants,
    pub(crate) limits: Limits,
}

/// One call's data: the store's.
pub(crate) struct Call {
    pub(crate) identity: Arc<Identity>,
    pub(crate) hook: Hook,
    pub(crate) input: Arc<Input>,
    pub(crate) totals: Totals,
    pub(crate) query: Option<Query>,
    pub(crate) directory: Option<Arc<dyn Directory>>,
    /// Ticks of processor time used.
    pub(crate) ticks: u64,
    /// The last message of level error, which is a panic's if there was one.
    pub(crate) last_words: Option<String>,
    table: ResourceTable,
    planned: planning::Planned,
    findings: Vec<Finding>,
    offers: Vec<Offer>,
    log: Vec<LogLine>,
    log_bytes: usize,
    log_dropped: u64,
    store: Arc<dyn StateStore>,
    changes: BTreeMap<(StateScope, String), Option<Vec<u8>>>,
    sizes: BTreeMap<StateScope, Sizes>,
    drawn: u64,
    pub(crate) wasi: Wasi,
}

/// What a call leaves behind.
pub(crate) struct Left {
    pub(crate) plan: Plan,
    pub(crate) findings: Vec<Finding>,
    pub(crate) offers: Vec<Offer>,
    pub(crate) state: Vec<StateChange>,
}

impl Call {
    pub(crate) fn new(
        identity: Arc<Identity>,
        hook: Hook,
        input: Arc<Input>,
        store: Arc<dyn StateStore>,
    ) -> Self {
        let limits = &identity.limits;
        let mut table = ResourceTable::new();
        table.set_max_capacity(limits.handles);
        Self {
            totals: Totals::new(limits),
            identity,
            hook,
            input,
            query: None,
            directory: None,
            ticks: 0,
            last_words: None,
            table,
            planned: planning::Planned::default(),
            findings: Vec::new(),
            offers: Vec::new(),
            log: Vec::new(),
            log_bytes: 0,
            log_dropped: 0,
            store,
            changes: BTreeMap::new(),
            sizes: BTreeMap::new(),
            drawn: 0,
            wasi: Wasi::default(),
        }
    }

    fn limits(&self) -> &Limits {
        &self.identity.limits
    }

    /// How long the call may take in all.
    pub(crate) fn patience(&self) -> Duration {
        self.input.time_limit.unwrap_or_else(|| self.limits().wall_of(self.hook))
    }

    /// The messages, and how many were dropped.
    pub(crate) fn take_log(&mut self) -> (Vec<LogLine>, u64) {
        self.end_lines();
        self.log_bytes = 0;
        (std::mem::take(&mut self.log), std::mem::take(&mut self.log_dropped))
    }

    /// The changes of state since the last time.
    pub(crate) fn take_state(&mut self) -> Vec<StateChange> {
        self.sizes.clear();
        let changes = std::mem::take(&mut self.changes).into_iter();
        changes.map(|((scope, key), value)| StateChange { scope, key, value }).collect()
    }

    /// All that was planned, in order.
    ///
    /// # Errors
    /// A rule that is not one.
    pub(crate) fn finish(mut self) -> Result<Left, String> {
        let state = self.take_state();
        Ok(Left { plan: self.planned.finish()?, findings: self.findings, offers: self.offers, state })
    }

    /// Something a component made itself.
    fn push<T: Send + 'static>(&mut self, entry: T) -> Result<Resource<T>, wasmtime::Error> {
        let most = self.limits().handles;
        self.table.push(entry).map_err(|_| Excess::Handles(most).into())
    }

    /// Text of the component, if it is not too long.
    fn text(&self, text: &str) -> Result<(), PluginError> {
        let most = self.limits().text;
        if text.len() <= most {
            return Ok(());
        }
        Err(PluginError::new("bad.length", format!("a text of {} bytes; the most is {most}", text.len())))
    }

    /// Whether something that acts at once was granted.
    fn permit(&self, need: &Grant) -> Result<(), PluginError> {
        self.identity
            .grants
            .permit(need)
            .map_err(|denial| PluginError::new("grant.missing", denial.to_string()).hint(denial.hint()))
    }

    pub(crate) fn random(&mut self, length: usize) -> Vec<u8> {
        let seed = self.input.seed;
        self.random_from(&seed, length)
    }

    pub(crate) fn random_from(&mut self, seed: &[u8; 32], length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let mut block = Sha256::new();
            block.update(seed);
            block.update(self.drawn.to_le_bytes());
            self.drawn += 1;
            let block = block.finalize();
            bytes.extend_from_slice(&block[..block.len().min(length - bytes.len())]);
        }
        bytes
    }

    fn scope(&self, scope: state::Scope) -> Result<StateScope, PluginError> {
        let vm = || -> Option<VmId> { Some(self.input.vm.as_ref()?.id.clone()) };
        match scope {
            state::Scope::Plugin => Ok(StateScope::Plugin),
            state::Scope::Vm => {
                let none = || PluginError::new("state.no-vm", format!("{} is not about one VM", self.hook));
                vm().map(StateScope::Vm).ok_or_else(none)
            }
        }
    }

    /// What is in a scope, counted once in a call and kept up to date.
    async fn sizes(&mut self, scope: &StateScope) -> Result<&mut Sizes, Refusal> {
        if !self.sizes.contains_key(scope) {
            let stored = self.store.sizes(&self.identity.name, scope).await?;
            let bytes = stored.iter().map(|(key, size)| key.len() + size).sum();
            self.sizes.insert(scope.clone(), Sizes { now: stored.clone(), stored, bytes });
        }
        Ok(self.sizes.entry(scope.clone()).or_default())
    }
}

/// The sizes of a scope's values.
#[derive(Default)]
struct Sizes {
    /// Before this call.
    stored: BTreeMap<String, usize>,
    /// After it, as things stand.
    now: BTreeMap<String, usize>,
    /// Of keys and values, as things stand.
    bytes: usize,
}

impl Sizes {
    fn remove(&mut self, key: &str) {
        if let Some(size) = self.now.remove(key) {
            self.bytes -= key.len() + size;
        }
    }
}

impl types::Host for Call {
    fn convert_error(&mut self, refusal: Refusal) -> wasmtime::Result<types::Error> {
        match refusal {
            Refusal::Error(error) => Ok(error.into()),
            Refusal::Trap(trap) => Err(trap),
        }
    }
}

impl From<PluginError> for types::Error {
    fn from(PluginError { code, message, hint, retryable }: PluginError) -> Self {
        Self { code, message, hint, retryable }
    }
}

impl From<types::Error> for PluginError {
    fn from(types::Error { code, message, hint, retryable }: types::Error) -> Self {
        crate::error::tamed(Self { code, message, hint, retryable })
    }
}

impl log::Host for Call {
    fn write(&mut self, level: log::Level, message: String) -> wasmtime::Result<()> {
        let message = tame(message.trim_end(), self.limits().text);
        if level == log::Level::Error {
            self.last_words = Some(message.clone());
        }
        self.log_bytes += message.len();
        if self.log.len() >= self.limits().log_messages || self.log_bytes > self.limits().log_bytes {
            self.log_dropped += 1;
            return Ok(());
        }
        let (plugin, hook) = (&self.identity.name, self.hook);
        let level = match level {
            log::Level::Debug => {
                tracing::debug!(target: "plugin", plugin, %hook, "{message}");
                LogLevel::Debug
            }
            log::Level::Info => {
                tracing::info!(target: "plugin", plugin, %hook, "{message}");
                LogLevel::Info
            }
            log::Level::Warn => {
                tracing::warn!(target: "plugin", plugin, %hook, "{message}");
                LogLevel::Warn
            }
            log::Level::Error => {
                tracing::error!(target: "plugin", plugin, %hook, "{message}");
                LogLevel::Error
            }
        };
        self.log.push(LogLine { level, message });
        Ok(())
    }
}

impl state::Host for Call {
    async fn get(&mut self, scope: state::Scope, key: String) -> Answer<Option<Vec<u8>>> {
        self.text(&key)?;
        let scope = self.scope(scope)?;
        if let Some(value) = self.changes.get(&(scope.clone(), key.clone())) {
            return Ok(value.clone());
        }
        Ok(self.store.get(&self.identity.name, &scope, &key).await?)
    }

    async fn set(&mut self, scope: state::Scope, key: String, value: Vec<u8>) -> Answer {
        self.text(&key)?;
        if key.is_empty() {
            return Err(PluginError::new("bad.key", "a key is not empty").into());
        }
        let scope = self.scope(scope)?;
        let (most_keys, most_bytes) = (self.limits().state_keys, self.limits().state_bytes);
        let sizes = self.sizes(&scope).await?;
        let before = sizes.now.get(&key).map(|size| key.len() + size);
        let keys = sizes.now.len() + usize::from(before.is_none());
        let bytes = sizes.bytes - before.unwrap_or_default() + key.len() + value.len();
        if keys > most_keys || bytes > most_bytes {
            let most = format!("at most {most_keys} keys and {} KiB are kept for it", most_bytes >> 10);
            return Err(PluginError::new("state.full", most).hint("delete what is not needed").into());
        }
        sizes.now.insert(key.clone(), value.len());
        sizes.bytes = bytes;
        self.changes.insert((scope, key), Some(value));
        Ok(())
    }

    async fn delete(&mut self, scope: state::Scope, key: String) -> Answer {
        self.text(&key)?;
        let scope = self.scope(scope)?;
        let sizes = self.sizes(&scope).await?;
        sizes.remove(&key);
        // What was never there needs no change, so that deleting cannot fill the memory.
        if sizes.stored.contains_key(&key) {
            self.changes.insert((scope, key), None);
        } else {
            self.changes.remove(&(scope, key));
        }
        Ok(())
    }

    async fn keys(&mut self, scope: state::Scope, prefix: String) -> Answer<Vec<String>> {
        let scope = self.scope(scope)?;
        let sizes = self.sizes(&scope).await?;
        Ok(sizes.now.keys().filter(|key| key.starts_with(&prefix)).cloned().collect())
    }
}
