//! One installed plugin, as it is in one set: what it is, whether it can be called, and calling it.

use std::{
    collections::BTreeMap,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use jsonrpsee::core::async_trait;
use tokio::sync::OnceCell;
use vm_engine::ports::{self, HookFailure, HookInput, HookOutcome, Tool};
use vm_plugin::{
    CallError, Grant, Hook, Input, Manifest, Outcome, PluginError, World,
    log::Log,
    ports::{Blob, Sandbox, StateStore},
};
use vm_store::PluginRecord;

use super::{
    calls::{Calls, Recorded, told},
    facts::Facts,
    package::{self, FILES, digest},
    state::Traced,
};

/// What all plugins have in common.
pub(crate) struct Shared {
    /// The plugins' directory.
    pub(crate) dir: PathBuf,
    pub(crate) state: Arc<dyn StateStore>,
    pub(crate) facts: Facts,
    /// With it the daemon logs in to guests.
    pub(crate) client_key: PathBuf,
}

impl Shared {
    /// The directory of all that is a plugin's.
    pub(crate) fn home(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// Why an enabled plugin is not called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) reason: String,
    pub(crate) hint: Option<String>,
}

/// Whether it can be called.
#[derive(Debug, Clone)]
pub(crate) enum Status {
    Loaded(Arc<vm_plugin::Plugin>),
    Disabled,
    Broken(Fault),
}

/// An installed plugin. Never changed: a change puts another in its place.
pub(crate) struct Entry {
    pub(crate) record: PluginRecord,
    /// None where it cannot be read.
    pub(crate) manifest: Option<Manifest>,
    pub(crate) status: Status,
    pub(crate) log: Log,
    pub(crate) calls: Arc<Calls>,
    pub(crate) shared: Arc<Shared>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry")
            .field("name", &self.record.name)
            .field("digest", &self.record.digest)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn seed() -> [u8; 32] {
    let mut seed = [0; 32];
    // Never fails on Linux; a plugin with a seed of zeros still gets bytes, and those of a replay are the same.
    if let Err(error) = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut seed)) {
        tracing::warn!(%error, "no random bytes for plugins");
    }
    seed
}

/// Configuration in its text form as data.
pub(crate) fn parsed(config: &str) -> serde_json::Value {
    serde_json::from_str(config).unwrap_or_default()
}

impl Entry {
    /// The same for another set.
    pub(super) fn copied(&self) -> Self {
        Self {
            record: self.record.clone(),
            manifest: self.manifest.clone(),
            status: self.status.clone(),
            log: self.log.clone(),
            calls: self.calls.clone(),
            shared: self.shared.clone(),
        }
    }

    /// Where its files are.
    pub(crate) fn dir(&self) -> PathBuf {
        self.shared.home(&self.record.name).join(package::directory(&self.record.files))
    }

    /// Its plugin, if it is loaded.
    pub(crate) fn loaded(&self) -> Option<&Arc<vm_plugin::Plugin>> {
        match &self.status {
            Status::Loaded(plugin) => Some(plugin),
            Status::Disabled | Status::Broken(_) => None,
        }
    }

    /// Its blobs: files that came with it, and the operator's.
    pub(crate) fn blobs(&self) -> Result<BTreeMap<String, PathBuf>, super::PluginsError> {
        let mut blobs = package::blobs(&self.dir().join(FILES))?;
        blobs.extend(package::blobs(&self.shared.home(&self.record.name).join(FILES))?);
        Ok(blobs)
    }

    /// The same to be read.
    pub(super) fn file_blobs(&self) -> BTreeMap<String, Arc<dyn Blob>> {
        let blobs = self.blobs().unwrap_or_else(|error| {
            tracing::warn!(plugin = %self.record.name, "no files for it: {error}");
            BTreeMap::new()
        });
        let open = |(name, path)| {
            let blob: Arc<dyn Blob> = Arc::new(FileBlob::open(path)?);
            Some((name, blob))
        };
        blobs.into_iter().filter_map(open).collect()
    }

    /// What a call is told.
    async fn input(&self, plugin: &vm_plugin::Plugin, input: HookInput) -> Input {
        let Shared { client_key, dir, .. } = &*self.shared;
        let sandbox =
            input.guest.map(|paths| super::sandbox::lazily(paths, client_key, dir) as Arc<dyn Sandbox>);
        Input {
            vm: input.vm,
            references: input.references,
            config: input.config,
            former_config: input.former_config,
            sandbox,
            dry_run: input.dry_run,
            ..self.bare_input(plugin, input.reason).await
        }
    }

    /// What every call is told.
    pub(super) async fn bare_input(&self, plugin: &vm_plugin::Plugin, reason: String) -> Input {
        let random = plugin.grants().permit(&Grant::Random {}).is_ok();
        Input {
            reason,
            facts: self.shared.facts.now().await,
            blobs: self.file_blobs(),
            now_unix_ms: now_ms(),
            seed: if random { seed() } else { [0; 32] },
            ..Input::default()
        }
    }

    /// Calls a hook of the loaded plugin and records the call.
    pub(crate) async fn recorded(
        &self,
        plugin: &vm_plugin::Plugin,
        hook: Hook,
        input: Input,
    ) -> Result<Outcome, CallError> {
        let state = Traced::new(self.shared.state.clone());
        let mut recorded = Recorded::begin(hook, &input, plugin.config(), plugin.digest(), now_ms());
        let begin = Instant::now();
        let store: Arc<dyn StateStore> = state.clone();
        let result = plugin.call(hook, input, &store).await;
        let took = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        // That it is not called any more is no call.
        if !matches!(result, Err(CallError::Disabled { .. })) {
            recorded.end(&result, state.take(), took);
            self.calls.keep(recorded).await;
        }
        result
    }

    /// Whether the engine is to be told of it.
    pub(crate) fn is_called(&self) -> bool {
        match &self.status {
            Status::Loaded(plugin) => plugin.manifest().world == World::Capability,
            // One of unknown kind may be one that has to be asked.
            Status::Broken(_) => {
                self.manifest.as_ref().is_none_or(|manifest| manifest.world == World::Capability)
            }
            Status::Disabled => false,
        }
    }

    fn failure(&self, hook: Hook, fault: &Fault) -> HookFailure {
        let name = &self.record.name;
        HookFailure {
            message: format!("plugin {name} cannot be called in {hook}: {}", fault.reason),
            hint: fault
                .hint
                .clone()
                .or_else(|| Some(format!("`vm plugin show {name}`, or `vm plugin disable {name}`"))),
        }
    }
}

/// What a call came to, in the engine's words.
fn failed(error: &CallError) -> HookFailure {
    HookFailure { message: told(error), hint: Some(error.hint()) }
}

/// `{1}` in what undoes a tool stands for the first argument of what it undoes. Left as it is where there is no such argument.
fn fill(undo: &str, arguments: &[String]) -> String {
    let (mut text, mut rest) = (String::with_capacity(undo.len()), undo);
    while let Some((before, after)) = rest.split_once('{') {
        text.push_str(before);
        let argument = after.split_once('}').and_then(|(number, after)| {
            let index = number.parse::<usize>().ok()?.checked_sub(1)?;
            Some((arguments.get(index)?, after))
        });
        match argument {
            Some((argument, after)) => {
                text.push_str(argument);
                rest = after;
            }
            None => {
                text.push('{');
                rest = after;
            }
        }
    }
    text + rest
}

#[async_trait]
impl ports::Plugin for Entry {
    fn name(&self) -> &str {
        &self.record.name
    }

    fn required(&self) -> bool {
        // One whose manifest cannot be read may have been: what it would have refused must not start unseen.
        self.manifest.as_ref().is_none_or(|manifest| manifest.required)
    }

    fn has(&self, hook: Hook) -> bool {
        match &self.status {
            Status::Loaded(plugin) => plugin.has(hook),
            // Once in a start is enough to tell that it is broken.
            Status::Broken(_) => hook == Hook::Preflight,
            Status::Disabled => false,
        }
    }

    fn tool(&self, name: &str, arguments: &[String]) -> Option<Tool> {
        let Grant::Tool { program, undo, .. } = self.loaded()?.grants().tool(name, arguments)? else {
            return None;
        };
        let undo = undo.iter().map(|undo| fill(undo, arguments)).collect();
        Some(Tool { program: program.into(), undo })
    }

    async fn blob(&self, name: &str) -> Result<Vec<u8>, HookFailure> {
        let failed = |reason: String| HookFailure {
            message: format!("plugin {} has no file {name:?}: {reason}", self.record.name),
            hint: Some(format!("`vm plugin show {}` lists its files", self.record.name)),
        };
        let blobs = self.blobs().map_err(|error| failed(vm_types::report::chain(&error)))?;
        let path = blobs.get(name).ok_or_else(|| failed("there is none".to_owned()))?;
        tokio::fs::read(path).await.map_err(|error| failed(error.to_string()))
    }

    async fn call(&self, hook: Hook, input: HookInput) -> Result<HookOutcome, HookFailure> {
        let plugin = match &self.status {
            Status::Loaded(plugin) if plugin.has(hook) => plugin,
            Status::Broken(fault) if hook == Hook::Preflight => return Err(self.failure(hook, fault)),
            _ => return Ok(HookOutcome::default()),
        };
        let input = self.input(plugin, input).await;
        let outcome = self.recorded(plugin, hook, input).await.map_err(|error| failed(&error))?;
        Ok(HookOutcome { plan: outcome.plan, findings: outcome.findings, change: outcome.change })
    }
}

/// A file as a blob. Its content is looked at when it is asked for; installed ones never change, and the operator's only by the operator.
#[derive(Debug)]
struct FileBlob {
    path: PathBuf,
    size: u64,
    digest: OnceCell<String>,
}

impl FileBlob {
    fn open(path: PathBuf) -> Option<Self> {
        let size = std::fs::metadata(&path).ok()?.len();
        Some(Self { path, size, digest: OnceCell::new() })
    }
}

fn read_at(path: &Path, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open(path)?;
    let rest = usize::try_from(file.metadata()?.len().saturating_sub(offset)).unwrap_or(usize::MAX);
    let mut bytes = vec![0; length.min(rest)];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

#[async_trait]
impl Blob for FileBlob {
    async fn size(&self) -> Result<u64, PluginError> {
        Ok(self.size)
    }

    async fn digest(&self) -> Result<String, PluginError> {
        let of = || async {
            let bytes = tokio::fs::read(&self.path).await.map_err(unreadable)?;
            Ok(digest(&bytes))
        };
        self.digest.get_or_try_init(of).await.cloned()
    }

    async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, PluginError> {
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || read_at(&path, offset, length)).await;
        read.map_err(std::io::Error::other).flatten().map_err(unreadable)
    }
}

fn unreadable(error: std::io::Error) -> PluginError {
    PluginError::new("blob.unreadable", error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_undoes_a_tool_has_the_arguments_of_its_call() {
        let arguments: Vec<_> = ["add", "192.0.2.1", "{1}"].map(str::to_owned).into();
        for (undo, filled) in [
            ("{2}", "192.0.2.1"),
            ("dev={2}/24,{1}", "dev=192.0.2.1/24,add"),
            ("{3}", "{1}"),
            ("{0}{4}{x}{", "{0}{4}{x}{"),
        ] {
            assert_eq!(fill(undo, &arguments), filled);
        }
    }

    #[tokio::test]
    async fn a_file_is_read_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"0123456789").unwrap();
        let blob = FileBlob::open(path.clone()).unwrap();
        assert_eq!((blob.size().await, blob.digest().await), (Ok(10), Ok(digest(b"0123456789"))));
        assert_eq!(blob.read(8, 100).await.unwrap(), b"89");
        assert_eq!(blob.read(11, 1).await.unwrap(), b"");
        std::fs::remove_file(path).unwrap();
        assert_eq!(blob.read(0, 1).await.unwrap_err().code, "blob.unreadable");
    }
}
