//! The set of plugins: loaded when the daemon starts, swapped as a whole at each change. How they are changed is in `change`.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jsonrpsee::core::async_trait;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use vm_api::PluginCall;
use vm_engine::ports::{self, Hooks};
use vm_plugin::{
    Compiler, Disabled, Granted, Limits, Plugin, Plugins, Runtime, World, log::Log, order::OrderError,
    ports::StateStore,
};
use vm_store::{PluginFailures, PluginRecord, Store};
use vm_types::VmId;

use super::{
    PluginsError, Trust,
    calls::Calls,
    entry::{Entry, Fault, Shared, Status},
    facts::Facts,
    package::{self, FILES},
    state::Kept,
};

/// How long a daemon that comes up waits for plugins. What is compiled already takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(8);

/// Compiled components. No plugin's name begins with a dot.
const CACHE: &str = ".cache";

/// What a manager is made of.
#[derive(Debug)]
pub(crate) struct Setup {
    /// The plugins' directory.
    pub(crate) dir: PathBuf,
    pub(crate) store: Store,
    pub(crate) facts: Facts,
    /// With it the daemon logs in to guests.
    pub(crate) client_key: PathBuf,
    pub(crate) compiler: Compiler,
    pub(crate) limits: Limits,
    /// The directory of plugins that come with the daemon.
    pub(crate) bundled: Option<PathBuf>,
    pub(crate) trust: Trust,
}

/// The plugins of a daemon.
pub(crate) struct Manager {
    pub(super) shared: Arc<Shared>,
    pub(super) store: Store,
    pub(super) runtime: Arc<Runtime>,
    pub(super) bundled: Option<PathBuf>,
    pub(super) trust: Trust,
    /// One change at a time.
    pub(super) changing: tokio::sync::Mutex<()>,
    set: RwLock<Arc<Set>>,
    changed: watch::Sender<u64>,
    /// Names of plugins that have failed once too often.
    failed: mpsc::UnboundedSender<String>,
}

impl std::fmt::Debug for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manager").field("dir", &self.shared.dir).finish_non_exhaustive()
    }
}

/// All that are installed: first those that are called, in order, then the others by name.
#[derive(Debug, Default)]
pub(crate) struct Set(pub(super) Vec<Arc<Entry>>);

impl Set {
    /// Brings entries into order. Where none fits, one of those in the way is broken.
    pub(super) fn arrange(mut entries: Vec<Entry>) -> Self {
        let order = loop {
            match order(entries.iter()) {
                Ok(order) => break order,
                Err(error) => {
                    let among = |name: &String| match &error {
                        OrderError::Cycle(names) => names.is_empty() || names.contains(name),
                        OrderError::Twice(twice) => twice == name,
                    };
                    let culprit = entries
                        .iter_mut()
                        .rfind(|entry| entry.loaded().is_some() && among(&entry.record.name));
                    let Some(culprit) = culprit else { break Vec::new() };
                    let fault = Fault { reason: error.to_string(), hint: Some(error.hint()) };
                    culprit.status = Status::Broken(fault);
                }
            }
        };
        let place = |entry: &Entry| order.iter().position(|name| *name == entry.record.name);
        entries.sort_by_key(|entry| (place(entry).unwrap_or(usize::MAX), entry.record.name.clone()));
        Self(entries.into_iter().map(Arc::new).collect())
    }
}

/// The names of those that are loaded, in the order in which they are called.
pub(super) fn order<'a>(entries: impl Iterator<Item = &'a Entry>) -> Result<Vec<String>, OrderError> {
    let (mut loaded, mut explicit) = (Vec::new(), Vec::new());
    for entry in entries {
        if let Some(plugin) = entry.loaded() {
            loaded.push(plugin.clone());
        }
        if let Some(position) = entry.record.position {
            explicit.push((position, entry.record.name.clone()));
        }
    }
    explicit.sort();
    let explicit: Vec<_> = explicit.into_iter().map(|(_, name)| name).collect();
    let plugins = Plugins::new(loaded, &explicit)?;
    Ok(plugins.iter().map(|plugin| plugin.name().to_owned()).collect())
}

/// Runs what blocks, and takes its panic for its error.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PluginsError> + Send + 'static,
) -> Result<T, PluginsError> {
    tokio::task::spawn_blocking(work).await.map_err(|source| PluginsError::Broken { source })?
}

impl Manager {
    /// Loads what is installed; a daemon whose state has never had them first gets those that come with it. Waits a while, not for
    /// ever: the rest is loaded as it is ready.
    ///
    /// # Errors
    /// The plugins' directory or the database cannot be used, or this host cannot run components. A plugin that is broken is shown as
    /// that and is no error.
    pub(crate) async fn open(setup: Setup) -> Result<Arc<Self>, PluginsError> {
        let Setup { dir, store, facts, client_key, compiler, limits, bundled, trust } = setup;
        package::make_dir(&dir).map_err(|source| PluginsError::Write { path: dir.clone(), source })?;
        let runtime = Arc::new(Runtime::new(&dir.join(CACHE), compiler, limits)?);
        let state: Arc<dyn StateStore> = Arc::new(Kept(store.clone()));
        let (failed, mut failures) = mpsc::unbounded_channel::<String>();
        let manager = Arc::new(Self {
            shared: Arc::new(Shared { dir, state, facts, client_key }),
            store,
            runtime,
            bundled,
            trust,
            changing: tokio::sync::Mutex::new(()),
            set: RwLock::default(),
            changed: watch::Sender::new(0),
            failed,
        });
        let keeper = Arc::downgrade(&manager);
        tokio::spawn(async move {
            while let Some(name) = failures.recv().await {
                let Some(manager) = keeper.upgrade() else { return };
                manager.keep_failures(&name).await;
            }
        });
        let records = manager.store.plugins().list().await?;
        let (dir, kept) = (manager.shared.dir.clone(), records.clone());
        blocking(move || {
            clean(&dir, &kept);
            Ok(())
        })
        .await?;
        manager.clone().load_all(records).await;
        let work = manager.clone();
        let first = tokio::spawn(async move { work.install_bundled().await });
        if tokio::time::timeout(PATIENCE, first).await.is_err() {
            tracing::info!("the plugins that come with the daemon are still being compiled");
        }
        Ok(manager)
    }

    async fn load_all(self: Arc<Self>, records: Vec<PluginRecord>) {
        let mut loading = JoinSet::new();
        let waiting: Vec<_> = records.into_iter().map(|record| self.unloaded(record)).collect();
        for entry in &waiting {
            let (manager, record) = (self.clone(), entry.record.clone());
            let (log, calls) = (entry.log.clone(), entry.calls.clone());
            loading.spawn(async move { manager.load(record, log, calls).await });
        }
        self.swap(Set::arrange(waiting));
        let work = self.clone();
        let all = tokio::spawn(async move {
            while let Some(loaded) = loading.join_next().await {
                match loaded {
                    Ok(entry) => work.replace_unless_changed(entry).await,
                    Err(error) => tracing::error!(%error, "loading a plugin broke off"),
                }
            }
        });
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            tracing::info!("some plugins are still being compiled");
        }
    }

    /// Writes down whether a plugin has failed too often, so that also a daemon that comes up later does not call it.
    async fn keep_failures(&self, name: &str) {
        let _one = self.changing.lock().await;
        let Ok(entry) = self.find(name) else { return };
        let failures = entry.loaded().and_then(|plugin| plugin.disabled());
        let failures = failures.map(|Disabled { failures, last }| PluginFailures { failures, last });
        if let Err(error) = self.store.plugins().set_failures(name, failures).await {
            let error = vm_types::report::chain(&error);
            tracing::warn!(plugin = name, error, "that it failed too often could not be written down");
        }
    }

    /// Has a plugin that failed too often before the daemon came up be that still.
    pub(super) async fn recall_failures(&self, plugin: &Plugin) -> Result<(), PluginsError> {
        if let Some(PluginFailures { failures, last }) = self.store.plugins().failures(plugin.name()).await? {
            plugin.disable(Disabled { failures, last });
        }
        Ok(())
    }

    /// Tells of something in the current set that has changed.
    pub(super) fn tell(&self) {
        self.changed.send_modify(|generation| *generation += 1);
    }

    /// What stands for a plugin until it is loaded.
    fn unloaded(&self, record: PluginRecord) -> Entry {
        let home = self.shared.home(&record.name);
        let status = if record.enabled {
            Status::Broken(Fault {
                reason: "it is still being compiled".to_owned(),
                hint: Some("try again in a moment".to_owned()),
            })
        } else {
            Status::Disabled
        };
        Entry {
            manifest: package::manifest(&home.join(package::directory(&record.files))).ok(),
            status,
            log: Log::default(),
            calls: Arc::new(Calls::open(home.join("calls"))),
            shared: self.shared.clone(),
            record,
        }
    }

    /// Puts a loaded one in the place of what stands for it, unless somebody has changed it meanwhile.
    async fn replace_unless_changed(&self, entry: Entry) {
        let _one = self.changing.lock().await;
        let current = self.set();
        let same = current.0.iter().any(|other| other.record == entry.record);
        if same {
            self.put(entry);
        }
    }

    /// A plugin as it is installed, loaded if it is enabled.
    pub(super) async fn load(&self, record: PluginRecord, log: Log, calls: Arc<Calls>) -> Entry {
        let dir = self.shared.home(&record.name).join(package::directory(&record.files));
        let read = {
            let enabled = record.enabled;
            blocking(move || {
                let manifest = package::manifest(&dir)?;
                let wasm = if enabled { package::component(&dir, &manifest)? } else { Vec::new() };
                Ok((manifest, wasm))
            })
            .await
        };
        let (manifest, status) = match read {
            Err(error) => (None, Err(error)),
            Ok((manifest, _)) if !record.enabled => (Some(manifest), Ok(Status::Disabled)),
            Ok((manifest, wasm)) => {
                let loaded = async {
                    let plugin = self.plugin(manifest.clone(), &wasm, &record).await?;
                    self.recall_failures(&plugin).await?;
                    Ok(Status::Loaded(Arc::new(plugin.with_log(log.clone()))))
                };
                let status = loaded.await;
                (Some(manifest), status)
            }
        };
        let status = status.unwrap_or_else(|error| {
            let hint = match &error {
                // It was there once.
                PluginsError::Read { .. } | PluginsError::Digest { .. } => {
                    Some(format!("install it again: vm plugin install {}", record.source))
                }
                _ => error.hint(),
            };
            let fault = Fault { reason: vm_types::report::chain(&error), hint };
            tracing::error!(plugin = %record.name, "broken: {}", fault.reason);
            Status::Broken(fault)
        });
        Entry { record, manifest, status, log, calls, shared: self.shared.clone() }
    }

    /// A component with what the operator has granted and configured.
    pub(super) async fn plugin(
        &self,
        manifest: vm_plugin::Manifest,
        wasm: &[u8],
        record: &PluginRecord,
    ) -> Result<Plugin, PluginsError> {
        let found = package::digest(wasm);
        if found != record.digest {
            return Err(PluginsError::Digest { what: "component", found, expected: record.digest.clone() });
        }
        // What cannot be read grants nothing.
        let granted = serde_json::from_value(record.granted.clone()).unwrap_or(Granted::These(Vec::new()));
        let plugin = Plugin::new(&self.runtime, manifest, wasm, granted, record.config.clone()).await?;
        Ok(plugin.with_failed(self.failed.clone()))
    }

    /// The current set.
    pub(crate) fn set(&self) -> Arc<Set> {
        self.set.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One of it.
    pub(crate) fn find(&self, name: &str) -> Result<Arc<Entry>, PluginsError> {
        let set = self.set();
        set.0.iter().find(|entry| entry.record.name == name).cloned().ok_or_else(|| PluginsError::Unknown {
            name: name.to_owned(),
            there: set.0.iter().map(|entry| entry.record.name.clone()).collect(),
        })
    }

    /// Puts another set in the place of the current one. Whoever has that goes on with it.
    pub(super) fn swap(&self, set: Set) {
        *self.set.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(set);
        self.tell();
    }

    /// The current set with another entry in the place of the one of its name. Under `changing`.
    pub(super) fn put(&self, entry: Entry) {
        let name = entry.record.name.clone();
        self.swap(Set::arrange(self.others(&name).chain([entry]).collect()));
    }

    /// Copies of all entries but one.
    pub(super) fn others<'a>(&self, name: &'a str) -> impl Iterator<Item = Entry> + use<'a> {
        let entries = self.set().0.clone();
        entries.into_iter().filter(move |entry| entry.record.name != name).map(|entry| entry.copied())
    }

    /// The loaded plugins of a world, in order.
    pub(crate) fn of(&self, world: World) -> Vec<Arc<Plugin>> {
        let set = self.set();
        let loaded = set.0.iter().filter_map(|entry| entry.loaded());
        loaded.filter(|plugin| plugin.manifest().world == world).cloned().collect()
    }

    /// A plugin's messages.
    pub(crate) fn log(&self, name: &str) -> Result<Log, PluginsError> {
        Ok(self.find(name)?.log.clone())
    }

    /// A plugin's last calls, newest first.
    pub(crate) fn calls(&self, name: &str) -> Result<Vec<PluginCall>, PluginsError> {
        Ok(self.find(name)?.calls.list().iter().map(|recorded| recorded.show()).collect())
    }

    /// Tells of each change of the set.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Where plugins' state is.
    pub(crate) fn state(&self) -> Arc<dyn StateStore> {
        self.shared.state.clone()
    }

    /// What hooks are told of the host.
    pub(crate) fn facts(&self) -> &Facts {
        &self.shared.facts
    }
}

/// Removes what no plugin is made of: half-written directories and former contents. The operator's files and kept calls stay.
fn clean(dir: &std::path::Path, records: &[PluginRecord]) {
    let kept: BTreeSet<_> =
        records.iter().map(|record| dir.join(&record.name).join(package::directory(&record.files))).collect();
    let subdirectories = |dir: &std::path::Path| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
    };
    let homes = subdirectories(dir).filter(|home| !home.ends_with(CACHE));
    for old in homes.flat_map(|home| subdirectories(&home).collect::<Vec<_>>()) {
        if is_content(&old)
            && !kept.contains(&old)
            && let Err(error) = package::remove_dir(&old)
        {
            tracing::warn!("{}", vm_types::report::chain(&error));
        }
    }
}

/// Whether a directory is of a plugin's content, whole or half written.
pub(super) fn is_content(path: &std::path::Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let whole = name.len() == 16 && name.bytes().all(|b| b.is_ascii_hexdigit());
    name != FILES && (whole || name.starts_with("new-"))
}

#[async_trait]
impl Hooks for Manager {
    fn enabled(&self) -> Vec<Arc<dyn ports::Plugin>> {
        let set = self.set();
        let called = set.0.iter().filter(|entry| entry.is_called());
        called.map(|entry| entry.clone() as Arc<dyn ports::Plugin>).collect()
    }

    /// Their state is gone with the VM's row.
    async fn forget(&self, _: &VmId) {}
}
