//! Plugins' state in the daemon's database, and what a call read of it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use vm_plugin::ports::{StateChange, StateError, StateScope, StateStore};
use vm_store::Store;
use vm_types::{VmId, report::chain};

/// More than this is not kept of what one call reads, in bytes.
const TRACE_MAX: usize = 256 << 10;

/// The database.
#[derive(Debug)]
pub(crate) struct Kept(pub(crate) Store);

fn vm(scope: &StateScope) -> Option<&VmId> {
    match scope {
        StateScope::Plugin => None,
        StateScope::Vm(vm) => Some(vm),
    }
}

fn failed(error: impl std::error::Error + 'static) -> StateError {
    StateError(chain(&error))
}

#[jsonrpsee::core::async_trait]
impl StateStore for Kept {
    async fn get(&self, plugin: &str, scope: &StateScope, key: &str) -> Result<Option<Vec<u8>>, StateError> {
        self.0.plugins().state(plugin, vm(scope), key).await.map_err(failed)
    }

    async fn sizes(&self, plugin: &str, scope: &StateScope) -> Result<BTreeMap<String, usize>, StateError> {
        self.0.plugins().state_sizes(plugin, vm(scope)).await.map_err(failed)
    }

    async fn commit(&self, plugin: &str, changes: &[StateChange]) -> Result<(), StateError> {
        let changes: Vec<_> = changes
            .iter()
            .map(|change| vm_store::plugins::StateChange {
                vm: vm(&change.scope).cloned(),
                key: change.key.clone(),
                value: change.value.clone(),
            })
            .collect();
        self.0.plugins().change_state(plugin, &changes).await.map_err(failed)
    }
}

/// What one call read: all that it can have learned from the state.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Trace {
    values: Vec<(Option<VmId>, String, Option<Vec<u8>>)>,
    sizes: Vec<(Option<VmId>, BTreeMap<String, usize>)>,
    bytes: usize,
}

impl Trace {
    /// Whether it has all that was read.
    pub(crate) fn is_whole(&self) -> bool {
        self.bytes <= TRACE_MAX
    }

    fn add(&mut self, bytes: usize) -> bool {
        self.bytes = self.bytes.saturating_add(bytes);
        self.is_whole()
    }
}

/// A state that notes what is read of it.
pub(crate) struct Traced {
    inner: Arc<dyn StateStore>,
    trace: Mutex<Trace>,
}

impl Traced {
    pub(crate) fn new(inner: Arc<dyn StateStore>) -> Arc<Self> {
        Arc::new(Self { inner, trace: Mutex::default() })
    }

    pub(crate) fn take(&self) -> Trace {
        std::mem::take(&mut *self.trace.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note(&self, bytes: usize, entry: impl FnOnce(&mut Trace)) {
        let mut trace = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
        if trace.add(bytes) {
            entry(&mut trace);
        }
    }
}

#[jsonrpsee::core::async_trait]
impl StateStore for Traced {
    async fn get(&self, plugin: &str, scope: &StateScope, key: &str) -> Result<Option<Vec<u8>>, StateError> {
        let value = self.inner.get(plugin, scope, key).await?;
        let bytes = key.len() + value.as_ref().map_or(0, Vec::len);
        self.note(bytes, |trace| {
            trace.values.push((vm(scope).cloned(), key.to_owned(), value.clone()));
        });
        Ok(value)
    }

    async fn sizes(&self, plugin: &str, scope: &StateScope) -> Result<BTreeMap<String, usize>, StateError> {
        let sizes = self.inner.sizes(plugin, scope).await?;
        let bytes = sizes.keys().map(|key| key.len() + 8).sum();
        self.note(bytes, |trace| trace.sizes.push((vm(scope).cloned(), sizes.clone())));
        Ok(sizes)
    }

    async fn commit(&self, plugin: &str, changes: &[StateChange]) -> Result<(), StateError> {
        self.inner.commit(plugin, changes).await
    }
}

/// The state as a recorded call read it. What that call did not ask for is not there.
#[jsonrpsee::core::async_trait]
impl StateStore for Trace {
    async fn get(&self, _: &str, scope: &StateScope, key: &str) -> Result<Option<Vec<u8>>, StateError> {
        let mut found = self.values.iter().filter(|(of, name, _)| of.as_ref() == vm(scope) && name == key);
        Ok(found.next().and_then(|(_, _, value)| value.clone()))
    }

    async fn sizes(&self, _: &str, scope: &StateScope) -> Result<BTreeMap<String, usize>, StateError> {
        let found = self.sizes.iter().find(|(of, _)| of.as_ref() == vm(scope));
        Ok(found.map(|(_, sizes)| sizes.clone()).unwrap_or_default())
    }

    async fn commit(&self, _: &str, _: &[StateChange]) -> Result<(), StateError> {
        Ok(())
    }
}
