//! One plugin: loading it, and calling its hooks. Each call has an instance of its own and holds no lock.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::sync::mpsc;
use wasmtime::{Store, Trap};

use crate::{
    broker::{Call, Identity},
    cache::{MAX_COMPONENT, limited},
    call::{Input, Outcome},
    digest,
    error::{CallError, Excess, LoadError, PluginError, tame},
    grant::{Granted, Grants},
    hook::Hook,
    log::Log,
    manifest::Manifest,
    parts::Parts,
    ports::StateStore,
    runtime::Runtime,
    stats::{Disabled, HookStats, Stats},
};

/// A plugin that is loaded and can be called.
pub struct Plugin {
    manifest: Manifest,
    digest: String,
    pub(crate) identity: Arc<Identity>,
    pub(crate) parts: Parts,
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) stats: Stats,
    pub(crate) log: Log,
    failed: Option<mpsc::UnboundedSender<String>>,
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plugin")
            .field("name", &self.manifest.name)
            .field("version", &self.manifest.version)
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}

impl Plugin {
    /// Loads the plugin in a directory: `plugin.toml` and the component it names.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub async fn load(
        runtime: &Arc<Runtime>,
        dir: &Path,
        granted: Granted,
        config: Value,
    ) -> Result<Self, LoadError> {
        let path = dir.join("plugin.toml");
        let read = |path: &Path, most| {
            limited(path, most).map_err(|source| LoadError::Read { path: path.to_owned(), source })
        };
        let text = String::from_utf8(read(&path, 1 << 20)?);
        let text = text.map_err(|_| LoadError::Read {
            path: path.clone(),
            source: std::io::ErrorKind::InvalidData.into(),
        })?;
        let manifest: Manifest = text.parse().map_err(|source| LoadError::Manifest { path, source })?;
        let wasm = read(&dir.join(&manifest.component), MAX_COMPONENT)?;
        Self::new(runtime, manifest, &wasm, granted, config).await
    }

    /// Loads a plugin from its parts.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub async fn new(
        runtime: &Arc<Runtime>,
        manifest: Manifest,
        wasm: &[u8],
        granted: Granted,
        config: Value,
    ) -> Result<Self, LoadError> {
        let config = manifest
            .config
            .fill(config)
            .map_err(|reason| LoadError::Config { plugin: manifest.name.clone(), reason })?;
        let hex = digest::hex(wasm);
        let component = runtime.cache.load(&runtime.engine, &manifest.name, wasm, &hex).await?;
        let parts = Parts::new(runtime, &manifest.name, manifest.world, &component)?;
        let identity = Identity {
            name: manifest.name.clone(),
            config: config.to_string(),
            grants: Grants::new(manifest.grants.clone(), granted),
            limits: runtime.limits.clone(),
        };
        Ok(Self {
            manifest,
            digest: format!("sha256:{hex}"),
            identity: Arc::new(identity),
            parts,
            runtime: runtime.clone(),
            stats: Stats::default(),
            log: Log::default(),
            failed: None,
        })
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// The component's digest, `sha256:…`.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What it asked for and was granted.
    pub fn grants(&self) -> &Grants {
        &self.identity.grants
    }

    /// Whether it has a hook. One that it has not costs nothing.
    pub fn has(&self, hook: Hook) -> bool {
        self.parts.has(hook)
    }

    /// Its calls so far, by hook.
    pub fn stats(&self) -> BTreeMap<Hook, HookStats> {
        self.stats.hooks()
    }

    /// Its configuration as hooks get it: JSON, with defaults filled in.
    pub fn config(&self) -> &str {
        &self.identity.config
    }

    /// Its messages.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// The same with messages that go to another log: that of the plugin whose place it takes.
    #[must_use]
    pub fn with_log(mut self, log: Log) -> Self {
        self.log = log;
        self
    }

    /// The same, which gives its name to `failed` when it has failed once too often and is not called any more.
    #[must_use]
    pub fn with_failed(mut self, failed: mpsc::UnboundedSender<String>) -> Self {
        self.failed = Some(failed);
        self
    }

    /// Calls it no more, for what it did before it was loaded.
    pub fn disable(&self, disabled: Disabled) {
        self.stats.disable(disabled);
    }

    /// Why it is not called any more, if it is not.
    pub fn disabled(&self) -> Option<Disabled> {
        self.stats.disabled()
    }

    /// Calls it again, whatever it did.
    pub fn enable(&self) {
        self.stats.enable();
    }

    /// Removes its compiled code from the cache.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn forget(&self) -> Result<(), LoadError> {
        self.runtime.cache.forget(&self.digest["sha256:".len()..])
    }

    /// A configuration with defaults filled in, for [`Input::config`].
    ///
    /// # Errors
    /// It does not fit the schema.
    pub fn check_config(&self, config: Value) -> Result<Value, LoadError> {
        let misfit = |reason| LoadError::Config { plugin: self.manifest.name.clone(), reason };
        self.manifest.config.fill(config).map_err(misfit)
    }

    /// Calls a hook. Where the plugin has none, the outcome is empty.
    ///
    /// Cancel-safe: a call that is dropped has changed nothing, except in the running guest.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(
        &self,
        hook: Hook,
        input: Input,
        state: &Arc<dyn StateStore>,
    ) -> Result<Outcome, CallError> {
        if !self.has(hook) {
            return Ok(Outcome::default());
        }
        self.callable()?;
        let needs = |there: bool, what| {
            let incomplete = || CallError::Incomplete { plugin: self.name().to_owned(), hook, what };
            there.then_some(()).ok_or_else(incomplete)
        };
        needs(input.vm.is_some() || matches!(hook, Hook::Doctor | Hook::Probe), "a VM")?;
        needs(input.sandbox.is_some() || !matches!(hook, Hook::PostStart | Hook::Import), "a running guest")?;
        needs(input.repository.is_some() || !matches!(hook, Hook::Probe | Hook::Import), "a repository")?;
        needs(input.job.is_some() || hook != Hook::Import, "a job")?;
        needs(!matches!(hook, Hook::Zones | Hook::Resolve), "a resolver of its own")?;
        let begin = Instant::now();
        let mut result = Box::pin(self.once(hook, Arc::new(input), state)).await;
        let took = begin.elapsed();
        if let Ok(outcome) = &mut result {
            outcome.took = took;
        }
        self.count(hook, took, result.as_ref().err());
        result
    }

    pub(crate) fn callable(&self) -> Result<(), CallError> {
        self.disabled().map_or(Ok(()), |Disabled { failures, last }| {
            Err(CallError::Disabled { plugin: self.name().to_owned(), failures, last })
        })
    }

    pub(crate) fn count(&self, hook: Hook, took: Duration, error: Option<&CallError>) {
        if self.stats.count(hook, took, error, self.identity.limits.failures) {
            tracing::error!(
                plugin = self.name(),
                "disabled: it failed {} times in a row",
                self.identity.limits.failures
            );
            if let Some(failed) = &self.failed {
                // Nobody who would have to know is left otherwise.
                let _ = failed.send(self.name().to_owned());
            }
        }
    }

    async fn once(
        &self,
        hook: Hook,
        input: Arc<Input>,
        state: &Arc<dyn StateStore>,
    ) -> Result<Outcome, CallError> {
        let dry_run = input.dry_run;
        let _running = self.runtime.running();
        let mut store = self.runtime.store(Call::new(self.identity.clone(), hook, input, state.clone()));
        let limit = store.data().patience();
        let ended = tokio::time::timeout(limit, async {
            let instance = self.parts.pre.instantiate_async(&mut store).await?;
            self.parts.call(&mut store, &instance, hook).await
        })
        .await;
        let (log, log_dropped) = store.data_mut().take_log();
        self.log.add(hook, &log);
        let said = self.ended(hook, limit, &mut store, ended)?;
        let plugin = || self.name().to_owned();
        let change = said.map_err(|error| CallError::Failed { plugin: plugin(), hook, error })?;
        let left = store.into_data().finish();
        let left = left.map_err(|reason| CallError::Impossible { plugin: plugin(), hook, reason })?;
        let granted = self.identity.grants.check(&left.plan);
        granted.map_err(|denial| CallError::Denied { plugin: plugin(), hook, denial })?;
        if !dry_run && !left.state.is_empty() {
            let kept = state.commit(self.name(), &left.state).await;
            kept.map_err(|source| CallError::State { plugin: plugin(), hook, source })?;
        }
        Ok(Outcome {
            plan: left.plan,
            findings: left.findings,
            offers: left.offers,
            change,
            state: left.state,
            log,
            log_dropped,
            took: Duration::ZERO,
        })
    }

    /// How a call ended, in words where it did not end well.
    pub(crate) fn ended<T>(
        &self,
        hook: Hook,
        limit: Duration,
        store: &mut Store<Call>,
        ended: Result<wasmtime::Result<T>, tokio::time::error::Elapsed>,
    ) -> Result<T, CallError> {
        let plugin = self.name().to_owned();
        let error = match ended {
            Ok(Ok(said)) => return Ok(said),
            Ok(Err(error)) => error,
            Err(_) => return Err(CallError::TimedOut { plugin, hook, limit }),
        };
        // What the host could not do, in a function that has no other way to say so.
        if let Some(error) = error.downcast_ref::<PluginError>() {
            return Err(CallError::Failed { plugin, hook, error: error.clone() });
        }
        let call = store.data_mut();
        let root = error.root_cause().to_string();
        let excess = if let Some(excess) = error.downcast_ref::<Excess>() {
            Some(*excess)
        } else if error.downcast_ref::<Trap>() == Some(&Trap::StackOverflow) {
            Some(Excess::Stack)
        } else if root.contains("fuel allocated for hostcalls") {
            Some(Excess::Transfer(self.identity.limits.transfer))
        } else {
            // What a component does when it gets no memory is to break off.
            call.totals.refused
        };
        if let Some(excess) = excess {
            return Err(CallError::Excess { plugin, hook, excess });
        }
        // A panic's message, where the SDK's panic hook has logged it.
        let reason = call.last_words.take().unwrap_or_else(|| tame(&root, 500));
        Err(CallError::Trapped { plugin, hook, reason, source: error })
    }
}
