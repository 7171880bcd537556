//! What loading and calling a bundled component needs.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::{Value, json};
use vm_plugin::{
    Compiler, Granted, Input, Limits, Plugin, PluginError, Runtime,
    ports::{Blob, FileMode, GuestCommand, GuestOutput, MemoryBlob, MemoryState, Sandbox, StateStore},
};

pub(crate) fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

pub(crate) fn built(command: &mut Command) {
    let command = command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    let output = command.env("CARGO", env!("CARGO")).output().expect("the build starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "is the target wasm32-unknown-unknown installed? {said}");
}

pub(crate) fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Where components come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source {
    /// From the sources as they are.
    Fresh,
    /// From `tests/corpus`: as they were when the interface was new.
    Corpus,
}

/// What must go on working, see there.
pub(crate) fn corpus() -> PathBuf {
    workspace().join("../tests/corpus/vm-plugin-0.1.0")
}

impl Source {
    /// The directory of a plugin. Those that are fresh are built once, all of them.
    pub(crate) fn directory(self, name: &str) -> PathBuf {
        static BUILT: OnceLock<PathBuf> = OnceLock::new();
        let fresh = || {
            let out = scratch().join("plugins");
            built(Command::new(workspace().join("build")).arg(&out).env_remove("PLUGINS_TARGET"));
            out
        };
        match self {
            Self::Fresh => BUILT.get_or_init(fresh).join(name),
            Self::Corpus => corpus().join(name),
        }
    }
}

/// A component that is only for tests, with a manifest.
pub(crate) async fn fixture(name: &str, manifest: &str, config: Value) -> Plugin {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let release = BUILT.get_or_init(|| {
        let target = scratch().join("plugins/build");
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([
            "build",
            "--locked",
            "--release",
            "--target",
            "wasm32-unknown-unknown",
            "-p",
            "every",
            "-p",
            "bring",
        ]);
        built(cargo.arg("--target-dir").arg(&target).current_dir(workspace()));
        target.join("wasm32-unknown-unknown/release")
    });
    let wasm = fs::read(release.join(format!("{name}.wasm"))).expect("a component");
    let manifest = manifest.parse().expect("a manifest");
    let loaded = Plugin::new(&runtime(), manifest, &wasm, Granted::All, config).await;
    loaded.unwrap_or_else(|error| panic!("{name}: {error}: {}", vm_plugin::error::chain(&error)))
}

fn runtime() -> Arc<Runtime> {
    // As much time as a busy machine may need: no bundled plugin is at fault for that.
    runtime_with(Duration::from_secs(60))
}

fn runtime_with(processor: Duration) -> Arc<Runtime> {
    let cache = scratch().join("plugins-aot");
    fs::DirBuilder::new().mode(0o700).recursive(true).create(&cache).expect("a cache");
    let wall = Duration::from_secs(120);
    let limits = Limits { wall, wall_live: wall, processor, ..Limits::default() };
    Arc::new(Runtime::new(&cache, Compiler::InProcess, limits).expect("a runtime"))
}

/// The plugin in a directory.
pub(crate) async fn load_from(directory: &Path, config: Value, granted: Granted) -> Plugin {
    let loaded = Plugin::load(&runtime(), directory, granted, config).await;
    loaded.unwrap_or_else(|error| {
        panic!("{}: {error}: {}", directory.display(), vm_plugin::error::chain(&error))
    })
}

/// The plugin in a directory, with little processor time: for one that never ends.
pub(crate) async fn brief(directory: &Path, config: Value) -> Plugin {
    let runtime = runtime_with(Duration::from_millis(100));
    Plugin::load(&runtime, directory, Granted::All, config).await.expect("it loads")
}

/// A plugin with what the operator granted.
pub(crate) async fn granted(source: Source, name: &str, config: Value, granted: Granted) -> Plugin {
    load_from(&source.directory(name), config, granted).await
}

/// A plugin with all it asks for.
pub(crate) async fn load(source: Source, name: &str, config: Value) -> Plugin {
    granted(source, name, config, Granted::All).await
}

pub(crate) fn input() -> Input {
    let vm = json!({
        "id": "0123456789ab",
        "name": "dev",
        "image_reference": "debian:bookworm",
        "image_digest": format!("sha256:{}", "a".repeat(64)),
        "image_properties": {},
        "kernel_release": "6.1.0",
        "cpus": 2,
        "memory_bytes": 512 << 20,
        "disk_bytes": 1_u64 << 30,
        "network": "nat",
        "addresses": ["192.0.2.7"],
        "labels": {},
        "temporary": false,
    });
    let key: Arc<dyn Blob> = Arc::new(MemoryBlob(b"secret".as_slice().into()));
    Input {
        reason: "start".to_owned(),
        vm: Some(serde_json::from_value(vm).expect("a VM")),
        facts: Arc::new([("bridge.subnet".to_owned(), "192.0.2.0/24".to_owned())].into()),
        blobs: [("key.pem".to_owned(), key)].into(),
        ..Input::default()
    }
}

pub(crate) fn state() -> Arc<dyn StateStore> {
    Arc::new(MemoryState::default())
}

/// A guest in which every command ends the same way.
#[derive(Default)]
pub(crate) struct Guest {
    pub(crate) answer: GuestOutput,
    pub(crate) ran: Mutex<Vec<GuestCommand>>,
}

impl Guest {
    /// The commands so far.
    pub(crate) fn ran(&self) -> Vec<GuestCommand> {
        self.ran.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn no_files() -> PluginError {
    PluginError::new("guest.no-files", "this guest has no files")
}

#[async_trait]
impl Sandbox for Guest {
    async fn run(&self, command: GuestCommand, _: usize) -> Result<GuestOutput, PluginError> {
        self.ran.lock().unwrap_or_else(PoisonError::into_inner).push(command);
        Ok(self.answer.clone())
    }

    async fn write_file(&self, _: &str, _: Arc<dyn Blob>, _: FileMode) -> Result<(), PluginError> {
        Err(no_files())
    }

    async fn read_file(&self, _: &str, _: usize) -> Result<Vec<u8>, PluginError> {
        Err(no_files())
    }

    async fn fetch_file(&self, _: &str) -> Result<Arc<dyn Blob>, PluginError> {
        Err(no_files())
    }

    async fn unpack(&self, _: Arc<dyn Blob>, _: &str, _: u32, _: u32) -> Result<(), PluginError> {
        Err(no_files())
    }

    async fn is_empty(&self, _: &str) -> Result<bool, PluginError> {
        Err(no_files())
    }

    async fn clear(&self, _: &str) -> Result<(), PluginError> {
        Err(no_files())
    }

    async fn remove(&self, _: &str) -> Result<(), PluginError> {
        Err(no_files())
    }
}
