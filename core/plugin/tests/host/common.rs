//! Components built from `tests/guests`, and what a call of them needs.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, OnceLock},
};

use async_trait::async_trait;
use serde_json::{Value, json};
use vm_plugin::{
    Compiler, Granted, Input, Limits, Manifest, Plugin, PluginError, Runtime, VmFacts,
    ports::{Blob, FileMode, GuestCommand, GuestOutput, MemoryBlob, MemoryState, Sandbox, StateStore},
};

/// Builds all guests once and gives one as a component.
pub(crate) fn component(name: &str) -> Vec<u8> {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let modules = BUILT.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests");
        let output = Command::new(env!("CARGO"))
            .args(["build", "--release", "--locked", "--target", "wasm32-unknown-unknown", "--manifest-path"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guests/Cargo.toml"))
            .arg("--target-dir")
            .arg(&target)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .output()
            .expect("cargo runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "is the target wasm32-unknown-unknown installed? {said}");
        target.join("wasm32-unknown-unknown/release")
    });
    let module = fs::read(modules.join(format!("guest_{}.wasm", name.replace('-', "_")))).unwrap();
    encode(&module)
}

/// Makes a component of a core module that carries its own description.
pub(crate) fn encode(module: &[u8]) -> Vec<u8> {
    wit_component::ComponentEncoder::default().module(module).unwrap().validate(true).encode().unwrap()
}

/// Limits with so much time that no other limit is met later, however slow the machine is.
pub(crate) fn limits() -> Limits {
    let minute = std::time::Duration::from_secs(60);
    Limits { processor: minute, wall: 2 * minute, wall_live: 2 * minute, ..Limits::default() }
}

/// The same, and an endless loop ends soon.
pub(crate) fn brief() -> Limits {
    Limits { processor: std::time::Duration::from_millis(100), ..limits() }
}

/// A cache that stays, so that each component is compiled once on a machine.
pub(crate) fn runtime(limits: Limits) -> Arc<Runtime> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("aot");
    fs::create_dir_all(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    Arc::new(Runtime::new(&dir, Compiler::InProcess, limits).unwrap())
}

/// A manifest that asks for everything the guests do.
pub(crate) fn manifest(name: &str, world: &str) -> Manifest {
    format!(
        r#"
        name = "{name}"
        version = "0.0.1"
        world = "{world}"
        wit = "0.1.0"
        grants = [
            {{ kind = "firewall", chains = ["postrouting", "forward"], reason = "r" }},
            {{ kind = "forwarding", reason = "r" }},
            {{ kind = "publish-port", reason = "r" }},
            {{ kind = "disk", max-bytes = 1073741824, kept = true, reason = "r" }},
            {{ kind = "dns-record", names = ["*.vm"], reason = "r" }},
            {{ kind = "bridge-sysctl", keys = ["ipv4/rp_filter"], reason = "r" }},
            {{ kind = "tool", name = "echo", program = "/bin/echo", arguments = ["*"], undo = [], reason = "r" }},
            {{ kind = "host-file", reason = "r" }},
            {{ kind = "drive", reason = "r" }},
            {{ kind = "nic", reason = "r" }},
            {{ kind = "kernel-argument", arguments = ["quiet"], reason = "r" }},
            {{ kind = "machine-size", max-memory-bytes = 1073741824, max-cpus = 2, reason = "r" }},
            {{ kind = "vsock", reason = "r" }},
            {{ kind = "guest-file", paths = ["/etc/*", "/big*"], reason = "r" }},
            {{ kind = "guest-environment", names = ["V*"], reason = "r" }},
            {{ kind = "guest-hosts", names = ["proxy"], reason = "r" }},
            {{ kind = "guest-mount", targets = ["/work", "/scratch"], reason = "r" }},
            {{ kind = "guest-module", names = ["overlay"], reason = "r" }},
            {{ kind = "guest-unit", names = ["hello.service"], reason = "r" }},
            {{ kind = "guest-command", reason = "r" }},
            {{ kind = "guest-live", reason = "r" }},
            {{ kind = "repository", reason = "r" }},
        ]
        [config]
        type = "object"
        [config.properties.harm]
        type = "string"
        [config.properties.most_cpus]
        type = "integer"
        default = 4
        "#
    )
    .parse()
    .unwrap()
}

/// A capability plugin with everything granted.
pub(crate) async fn plugin(runtime: &Arc<Runtime>, guest: &str, config: Value) -> Plugin {
    plugin_with(runtime, guest, Granted::All, config).await
}

pub(crate) async fn plugin_with(
    runtime: &Arc<Runtime>,
    guest: &str,
    granted: Granted,
    config: Value,
) -> Plugin {
    let name = format!("test-{guest}");
    Plugin::new(runtime, manifest(&name, "capability"), &component(guest), granted, config).await.unwrap()
}

pub(crate) fn vm() -> VmFacts {
    VmFacts {
        id: "0123456789ab".parse().unwrap(),
        name: "box".parse().unwrap(),
        image_reference: "debian:bookworm".to_owned(),
        image_digest: format!("sha256:{}", "a".repeat(64)),
        image_properties: BTreeMap::new(),
        kernel_release: "6.1.0".to_owned(),
        cpus: 2,
        memory_bytes: 512 << 20,
        disk_bytes: 1 << 30,
        network: "nat".to_owned(),
        addresses: vec!["10.0.0.7".parse().unwrap()],
        labels: BTreeMap::new(),
        temporary: false,
    }
}

pub(crate) fn input() -> Input {
    let facts = [("memory.total-bytes", "1073741824"), ("cpu.count", "2")];
    let facts = facts.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let hello: Arc<dyn Blob> = Arc::new(MemoryBlob(b"hello".as_slice().into()));
    Input {
        reason: "start".to_owned(),
        vm: Some(vm()),
        facts: Arc::new(facts.into()),
        blobs: [("hello.txt".to_owned(), hello)].into(),
        now_unix_ms: 1234,
        ..Input::default()
    }
}

pub(crate) fn state() -> Arc<dyn StateStore> {
    Arc::new(MemoryState::default())
}

pub(crate) fn harm(what: &str) -> Value {
    json!({ "harm": what })
}

/// A guest in which every command is `cat`, and `sleep` never ends.
#[derive(Default)]
pub(crate) struct FakeGuest {
    pub(crate) files: Mutex<BTreeMap<String, Vec<u8>>>,
    pub(crate) unpacked: Mutex<Vec<String>>,
    /// Directories cleared and paths removed.
    pub(crate) removed: Mutex<Vec<String>>,
}

/// A stream's error in the words of whoever made it.
fn broken(error: std::io::Error) -> PluginError {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<PluginError>());
    inner.cloned().unwrap_or_else(|| PluginError::new("stream.broken", error.to_string()))
}

async fn all(blob: &Arc<dyn Blob>) -> Result<Vec<u8>, PluginError> {
    blob.read(0, usize::MAX).await
}

#[async_trait]
impl Sandbox for FakeGuest {
    async fn run(&self, command: GuestCommand, _: usize) -> Result<GuestOutput, PluginError> {
        if command.command[0] == "sleep" {
            std::future::pending::<()>().await;
        }
        let stdout = match &command.input {
            Some(input) => all(input).await?,
            None => Vec::new(),
        };
        Ok(GuestOutput { code: Some(0), stdout, ..GuestOutput::default() })
    }

    async fn write_file(&self, path: &str, content: Arc<dyn Blob>, _: FileMode) -> Result<(), PluginError> {
        let content = all(&content).await?;
        self.files.lock().unwrap().insert(path.to_owned(), content);
        Ok(())
    }

    async fn read_file(&self, path: &str, limit: usize) -> Result<Vec<u8>, PluginError> {
        let files = self.files.lock().unwrap();
        let file = files.get(path).ok_or_else(|| PluginError::new("guest.no-file", path))?;
        Ok(file[..file.len().min(limit)].to_vec())
    }

    async fn fetch_file(&self, path: &str) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(Arc::new(MemoryBlob(self.read_file(path, usize::MAX).await?.into())))
    }

    async fn unpack(
        &self,
        archive: Arc<dyn Blob>,
        directory: &str,
        _: u32,
        _: u32,
    ) -> Result<(), PluginError> {
        let size = match archive.stream() {
            Some(mut stream) => tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.map_err(broken)?,
            None => archive.size().await?,
        };
        self.unpacked.lock().unwrap().push(format!("{directory}: {size}"));
        archive.unpacked(directory);
        Ok(())
    }

    async fn is_empty(&self, directory: &str) -> Result<bool, PluginError> {
        Ok(!self.unpacked.lock().unwrap().iter().any(|line| line.starts_with(&format!("{directory}: "))))
    }

    async fn clear(&self, directory: &str) -> Result<(), PluginError> {
        self.removed.lock().unwrap().push(format!("{directory}/*"));
        self.unpacked.lock().unwrap().clear();
        Ok(())
    }

    async fn remove(&self, path: &str) -> Result<(), PluginError> {
        self.removed.lock().unwrap().push(path.to_owned());
        Ok(())
    }
}
