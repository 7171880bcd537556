//! The manager with real components, and no VM.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
    time::Duration,
};

use serde_json::{Value, json};
use vm_api::{GrantChoice, InstallPlugin, PluginState, Severity};
use vm_engine::ports::{HookInput, HookOutcome, Hooks, Plugin as _};
use vm_plugin::{Compiler, Hook, Limits, VmFacts};
use vm_store::Store;
use vm_types::plugin::Change;

use super::{Facts, Manager, PluginsError, Setup, Trust, entry::Entry};

/// A component of the host's own tests, all built once.
pub(super) fn component(name: &str) -> Vec<u8> {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let modules = BUILT.get_or_init(|| {
        let own = std::env::current_exe().unwrap();
        // Where cargo keeps what tests make, beside `deps`.
        let target = own.ancestors().nth(3).unwrap().join("tmp/guests");
        let output = Command::new(env!("CARGO"))
            .args(["build", "--release", "--locked", "--target", "wasm32-unknown-unknown", "--manifest-path"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../plugin/tests/guests/Cargo.toml"))
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
    wit_component::ComponentEncoder::default().module(&module).unwrap().validate(true).encode().unwrap()
}

const GRANTS: &str = r#"
    { kind = "firewall", chains = ["postrouting"], reason = "r" },
    { kind = "forwarding", reason = "r" },
    { kind = "publish-port", reason = "r" },
    { kind = "disk", max-bytes = 1073741824, kept = true, reason = "r" },
    { kind = "dns-record", names = ["*.vm"], reason = "r" },
    { kind = "bridge-sysctl", keys = ["ipv4/rp_filter"], reason = "r" },
    { kind = "tool", name = "echo", program = "/bin/echo", arguments = ["*"], undo = ["not", "{1}"], reason = "r" },
    { kind = "host-file", reason = "r" },
"#;

pub(super) struct Bench {
    dir: tempfile::TempDir,
    store: Store,
    pub(super) trust: Trust,
}

impl Bench {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        Self { dir, store, trust: Trust::default() }
    }

    pub(super) async fn open(&self) -> Arc<Manager> {
        let minute = Duration::from_secs(60);
        // As much time as a busy machine may need.
        let limits =
            Limits { processor: minute, wall: minute, wall_live: minute, failures: 3, ..Limits::default() };
        let bundled = self.dir.path().join("bundled");
        let setup = Setup {
            dir: self.dir.path().join("plugins"),
            store: self.store.clone(),
            facts: Facts::new(self.store.clone(), "fake", None),
            client_key: self.dir.path().join("key"),
            compiler: Compiler::InProcess,
            limits,
            bundled: bundled.is_dir().then_some(bundled),
            trust: self.trust.clone(),
        };
        Manager::open(setup).await.unwrap()
    }

    /// Where the daemon keeps a plugin.
    pub(super) fn home(&self, name: &str) -> PathBuf {
        self.dir.path().join("plugins").join(name)
    }

    /// A directory with a plugin that has defaults for all it can be configured with.
    pub(super) fn source(&self, parent: &str, name: &str, guest: &str, more: &str) -> String {
        let dir = self.dir.path().join(parent).join(name);
        fs::create_dir_all(dir.join("files")).unwrap();
        let manifest = format!(
            "name = \"{name}\"\nversion = \"0.1.0\"\nworld = \"capability\"\nwit = \"0.1.0\"\n{more}\ngrants = [{GRANTS}]\n\
             [config]\ntype = \"object\"\n\
             [config.properties.most_cpus]\ntype = \"integer\"\ndefault = 4\n\
             [config.properties.harm]\ntype = \"string\"\n",
        );
        fs::write(dir.join("plugin.toml"), manifest).unwrap();
        fs::write(dir.join("plugin.wasm"), component(guest)).unwrap();
        dir.to_str().unwrap().to_owned()
    }
}

pub(super) fn params(source: &str) -> InstallPlugin {
    InstallPlugin { source: source.to_owned(), grants: Some(GrantChoice::All), ..InstallPlugin::default() }
}

fn vm(cpus: u32) -> VmFacts {
    serde_json::from_value(json!({
        "id": "0123456789ab", "name": "dev", "image_reference": "debian:bookworm", "image_digest": "sha256:00",
        "image_properties": {}, "kernel_release": "6.1.0", "cpus": cpus, "memory_bytes": 1 << 20, "disk_bytes": 1,
        "network": "nat", "addresses": ["192.0.2.7"], "labels": {}, "temporary": false,
    }))
    .unwrap()
}

fn input(reason: &str, cpus: u32) -> HookInput {
    HookInput { reason: reason.to_owned(), vm: Some(vm(cpus)), ..HookInput::default() }
}

async fn call(entry: &Entry, hook: Hook) -> HookOutcome {
    entry.call(hook, input("start", 8)).await.unwrap()
}

fn names(manager: &Manager) -> Vec<String> {
    manager.enabled().iter().map(|plugin| plugin.name().to_owned()).collect()
}

fn state(manager: &Manager, name: &str) -> PluginState {
    manager.list().into_iter().find(|summary| summary.name == name).unwrap().state
}

#[tokio::test]
async fn a_plugin_is_installed_called_recorded_and_made_to_do_it_again() {
    let bench = Bench::new();
    let manager = bench.open().await;
    let entry = manager.install(params(&bench.source("from", "a", "full", ""))).await.unwrap();
    assert_eq!(names(&manager), ["a"]);
    let outcome = call(&entry, Hook::Preflight).await;
    assert_eq!(outcome.findings[0].subject, "cpus", "8 are more than the default of 4");
    let planned = call(&entry, Hook::PrepareHost).await;
    assert!(planned.plan.len() > 5);
    let tool = entry.tool("echo", &["hello".to_owned()]).unwrap();
    assert_eq!(
        (tool.program.to_str().unwrap(), tool.undo),
        ("/bin/echo", vec!["not".to_owned(), "hello".to_owned()])
    );
    // State lands in the database, and goes with the plugin.
    entry.call(Hook::Cleanup, input("stopped", 8)).await.unwrap();
    let kept = bench.store.plugins().state("a", None, "last-end").await.unwrap();
    assert_eq!(kept.as_deref(), Some(&b"stopped"[..]));
    let dry = HookInput { dry_run: true, ..input("deleted", 8) };
    entry.call(Hook::Cleanup, dry).await.unwrap();
    assert_eq!(bench.store.plugins().state("a", None, "last-end").await.unwrap(), kept);

    let calls = manager.calls("a").unwrap();
    assert_eq!(calls.len(), 4);
    let prepared = calls.iter().find(|call| call.hook == "prepare-host").unwrap();
    assert_eq!((prepared.effects, prepared.vm.as_deref()), (planned.plan.len(), Some("dev")));
    for recorded in &calls {
        let replay = manager.replay("a", recorded.id).await.unwrap();
        assert!(replay.same && replay.same_component, "{replay:?}");
    }
    assert_eq!(manager.info("a").await.unwrap().stats.iter().map(|stats| stats.calls).sum::<u64>(), 4);
    let log = manager.log("a").unwrap().lines();
    assert_eq!(log[0].line.message, "dev at start");

    manager.remove("a", false).await.unwrap();
    assert!(names(&manager).is_empty() && manager.list().is_empty());
    assert!(!bench.dir.path().join("plugins/a").exists());
    assert_eq!(fs::read_dir(bench.dir.path().join("plugins/.cache")).unwrap().count(), 0);
    assert_eq!(bench.store.plugins().state("a", None, "last-end").await.unwrap(), None);
}

#[tokio::test]
async fn what_is_installed_outlives_the_daemon_and_damage_is_told() {
    let bench = Bench::new();
    let manager = bench.open().await;
    let entry = manager.install(params(&bench.source("from", "a", "full", "required = true"))).await.unwrap();
    manager.install(params(&bench.source("from", "b", "only-preflight", ""))).await.unwrap();
    manager.set_enabled("b", false).await.unwrap();
    assert_eq!(names(&manager), ["a"]);
    assert!(manager.verify("a").await.unwrap().iter().all(|check| check.ok));
    let wasm = entry.dir().join("plugin.wasm");
    drop(manager);

    let manager = bench.open().await;
    assert_eq!(names(&manager), ["a"]);
    assert_eq!(state(&manager, "b"), PluginState::Disabled);
    let mode = fs::metadata(bench.dir.path().join("plugins/.cache")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let mut bytes = fs::read(&wasm).unwrap();
    bytes.extend_from_slice(b"\0\x01x");
    fs::write(&wasm, bytes).unwrap();
    let bad: Vec<_> = manager.verify("a").await.unwrap().into_iter().filter(|check| !check.ok).collect();
    assert_eq!((bad.len(), bad[0].check.as_str()), (1, "plugin.wasm"));
    drop(manager);

    // The daemon comes up; what the plugin would have said no to does not start.
    let manager = bench.open().await;
    let PluginState::Broken { reason, .. } = state(&manager, "a") else { panic!("it is another component") };
    assert!(reason.contains("component"), "{reason}");
    let called = manager.enabled();
    assert!(called[0].required() && called[0].has(Hook::Preflight) && !called[0].has(Hook::PrepareHost));
    let failure = called[0].call(Hook::Preflight, input("start", 1)).await.unwrap_err();
    assert!(failure.message.contains("plugin a cannot be called"), "{}", failure.message);
    let findings = manager.doctor().await;
    let about = findings.iter().find(|finding| finding.check == "plugin.a").unwrap();
    assert_eq!(about.severity, Severity::Error);
    manager
        .install(InstallPlugin { upgrade: true, ..params(&bench.source("from", "a", "full", "")) })
        .await
        .unwrap();
    assert_eq!(state(&manager, "a"), PluginState::Enabled);
}

#[tokio::test]
async fn an_upgrade_keeps_what_was_said_and_those_under_way() {
    let bench = Bench::new();
    let manager = bench.open().await;
    let source = bench.source("from", "a", "only-preflight", "");
    let first = InstallPlugin {
        grants: Some(GrantChoice::Kinds(vec!["forwarding".to_owned()])),
        config: Some(json!({ "most_cpus": 9 })),
        ..params(&source)
    };
    let old = manager.install(first).await.unwrap();
    let again = manager.install(params(&source)).await.unwrap_err();
    assert!(matches!(again, PluginsError::Installed { .. }), "{again}");
    let source = bench.source("newer", "a", "full", "");
    let shown = manager.inspect(&source).await.unwrap();
    let asked: Vec<_> =
        shown.grants.iter().filter(|grant| grant.granted).map(|grant| grant.kind.as_str()).collect();
    assert_eq!(asked, ["forwarding"]);
    let changed = InstallPlugin { digest: Some(old.record.digest.clone()), upgrade: true, ..params(&source) };
    assert!(matches!(manager.install(changed).await.unwrap_err(), PluginsError::Digest { .. }));
    let upgrade = InstallPlugin {
        upgrade: true,
        grants: None,
        digest: Some(shown.digest.clone()),
        manifest_digest: Some(shown.manifest_digest.clone()),
        ..params(&source)
    };
    let new = manager.install(upgrade).await.unwrap();
    let info = manager.info("a").await.unwrap();
    assert_eq!((info.summary.granted, &info.config["most_cpus"]), (1, &json!(9)));
    // Whoever began with the one before goes on with it.
    assert!(old.has(Hook::Preflight) && !old.has(Hook::Doctor) && new.has(Hook::Doctor));
    old.call(Hook::Preflight, input("start", 1)).await.unwrap();
    let failure = new.call(Hook::PrepareHost, input("start", 1)).await.unwrap_err();
    assert!(failure.message.contains("not granted"), "{}", failure.message);
}

#[tokio::test]
async fn a_configuration_is_tried_before_it_is_in_force() {
    let bench = Bench::new();
    let manager = bench.open().await;
    manager.install(params(&bench.source("from", "a", "full", ""))).await.unwrap();
    let misfit = manager.candidate("a", json!({ "most_cpus": "many" })).await.unwrap_err();
    assert!(misfit.to_string().contains("most_cpus"), "{misfit}");
    let (old, new) = manager.candidate("a", json!({ "most_cpus": 9 })).await.unwrap();
    let new = Arc::new(new);
    let former = Some(json!({ "most_cpus": 4 }));
    let answer =
        new.call(Hook::ConfigChange, HookInput { former_config: former, ..input("configured", 1) }).await;
    assert_eq!(answer.unwrap().change, Some(Change::NeedsRestart));
    assert_eq!(manager.info("a").await.unwrap().config["most_cpus"], 4);
    manager.put_candidate(&old, &new).await.unwrap();
    let late = manager.put_candidate(&old, &new).await.unwrap_err();
    assert!(matches!(late, PluginsError::Changed { .. }), "{late}");
    drop(manager);
    let manager = bench.open().await;
    assert_eq!(manager.info("a").await.unwrap().config_given, json!({ "most_cpus": 9 }));
    let calls = call(&manager.find("a").unwrap(), Hook::Preflight).await;
    assert!(calls.findings.is_empty(), "8 are not more than 9");
}

#[tokio::test]
async fn a_plugin_that_fails_is_kept_from_it_visibly() {
    let bench = Bench::new();
    let manager = bench.open().await;
    let config = Some(json!({ "harm": "panic" }));
    let source = bench.source("from", "a", "hostile", "");
    let entry = manager.install(InstallPlugin { config, ..params(&source) }).await.unwrap();
    for _ in 0..3 {
        let failure = entry.call(Hook::Preflight, input("start", 1)).await.unwrap_err();
        assert!(failure.message.starts_with("plugin a broke off in preflight"), "{}", failure.message);
        assert_eq!(failure.message.lines().count(), 1, "{}", failure.message);
    }
    let PluginState::Failed { failures: 3, reason } = state(&manager, "a") else {
        panic!("it failed thrice")
    };
    assert!(reason.contains("preflight"), "{reason}");
    let refused = entry.call(Hook::Preflight, input("start", 1)).await.unwrap_err();
    assert!(refused.message.contains("is disabled"), "{}", refused.message);
    let findings = manager.doctor().await;
    assert_eq!(
        findings.iter().find(|finding| finding.check == "plugin.a").unwrap().severity,
        Severity::Warning
    );
    let calls = manager.calls("a").unwrap();
    assert!(calls.len() == 3 && calls.iter().all(|call| call.error.is_some()));
    let written = async || bench.store.plugins().failures("a").await.unwrap();
    let soon = async {
        while written().await.is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), soon).await.expect("it is written down");
    drop(manager);

    // Recorded failures are there after a crash, and can be made again though it is not called any more.
    let manager = bench.open().await;
    let calls = manager.calls("a").unwrap();
    let replay = manager.replay("a", calls[0].id).await.unwrap();
    assert!(replay.same, "{replay:?}");
    // Nor is it called by the next daemon, nor with another configuration, until somebody says so.
    let failed = PluginState::Failed { failures: 3, reason };
    assert_eq!(state(&manager, "a"), failed);
    assert!(manager.doctor().await.iter().any(|finding| finding.message.contains("failed 3 times in a row")));
    let (old, new) = manager.candidate("a", json!({ "harm": "none" })).await.unwrap();
    let entry = manager.put_candidate(&old, &Arc::new(new)).await.unwrap();
    assert_eq!(state(&manager, "a"), failed);
    assert!(entry.call(Hook::Preflight, input("start", 1)).await.is_err());
    manager.set_enabled("a", true).await.unwrap();
    entry.call(Hook::Preflight, input("start", 1)).await.unwrap();
    drop((manager, entry));
    let manager = bench.open().await;
    assert_eq!(state(&manager, "a"), PluginState::Enabled);
}

#[tokio::test]
async fn the_order_is_the_operators_and_a_circle_is_refused() {
    let bench = Bench::new();
    let manager = bench.open().await;
    for (name, more) in [("a", "after = [\"b\"]"), ("b", ""), ("c", "")] {
        manager.install(params(&bench.source("from", name, "only-preflight", more))).await.unwrap();
    }
    assert_eq!(names(&manager), ["b", "a", "c"]);
    assert_eq!(manager.order(vec!["c".to_owned(), "b".to_owned()]).await.unwrap(), ["c", "b", "a"]);
    let circle = manager.order(vec!["a".to_owned(), "b".to_owned()]).await.unwrap_err();
    assert!(matches!(circle, PluginsError::Order(_)), "{circle}");
    let twice = manager.order(["c", "b", "c"].map(str::to_owned).into()).await.unwrap_err();
    assert!(matches!(&twice, PluginsError::Twice { name } if name == "c"), "{twice}");
    assert!(twice.hint().is_some_and(|hint| hint.contains("once")));
    let more = bench.source("from", "d", "only-preflight", "after = [\"a\"]\nbefore = [\"b\"]");
    assert!(matches!(manager.install(params(&more)).await.unwrap_err(), PluginsError::Order(_)));
    drop(manager);
    assert_eq!(names(&*bench.open().await), ["c", "b", "a"]);
}

#[tokio::test]
async fn a_new_daemon_has_what_comes_with_it_once() {
    let bench = Bench::new();
    for name in ["a", "b", "c"] {
        bench.source("bundled", name, "only-preflight", "");
    }
    let bundled = bench.dir.path().join("bundled");
    fs::write(bundled.join("default.toml"), "install = [\"a\", \"b\", \"missing\"]").unwrap();
    let manager = bench.open().await;
    assert_eq!(names(&manager), ["a", "b"]);
    let info = manager.info("a").await.unwrap();
    assert_eq!((info.summary.granted, info.source.as_str()), (info.summary.requested, "bundled:a"));
    manager.remove("a", true).await.unwrap();
    drop(manager);
    replace(&bundled.join("b/plugin.toml"), "0.1.0\"\nworld", "0.2.0\"\nworld");
    let manager = bench.open().await;
    assert_eq!(names(&manager), ["b"], "a removed one stays removed");
    let findings = manager.doctor().await;
    let newer = findings.iter().find(|finding| finding.check == "plugins.bundled.b").unwrap();
    assert!(newer.message.contains("0.2.0") && newer.fix.as_ref().unwrap().contains("bundled:b"));
    assert!(findings.iter().any(|finding| finding.check == "plugins.bundled.missing"));
    manager.install(params("bundled:c")).await.unwrap();
    assert!(matches!(
        manager.install(params("bundled:../from")).await.unwrap_err(),
        PluginsError::NotBundled { .. }
    ));
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from));
    fs::write(path, text.replace(from, to)).unwrap();
}

#[tokio::test]
async fn a_component_that_does_not_hold_to_the_rules_is_told_where() {
    let bench = Bench::new();
    let manager = bench.open().await;
    let good = manager.test(&bench.source("from", "good", "only-preflight", "")).await.unwrap();
    assert!(good.iter().all(|check| check.ok), "{good:?}");
    assert!(good.iter().any(|check| check.check == "preflight"));
    // It takes for granted that each VM has an address, and plans what its manifest does not ask for.
    let bad = manager.test(&bench.source("from", "bad", "full", "")).await.unwrap();
    let failed: Vec<_> = bad.iter().filter(|check| !check.ok).map(|check| check.check.as_str()).collect();
    assert!(failed.contains(&"prepare-host") && failed.contains(&"contribute-guest"), "{bad:?}");
    assert!(bad.iter().any(|check| check.check == "cleanup" && check.ok), "{bad:?}");
    assert!(manager.list().is_empty());
    let source = bench.source("from", "none", "full", "");
    fs::write(Path::new(&source).join("plugin.wasm"), b"\0asm").unwrap();
    let none = manager.test(&source).await.unwrap();
    assert!(none.last().is_some_and(|check| check.check == "loads" && !check.ok), "{none:?}");
}

#[tokio::test]
async fn files_come_with_the_plugin_and_from_the_operator() {
    let bench = Bench::new();
    let manager = bench.open().await;
    let source = bench.source("from", "a", "only-preflight", "");
    fs::write(Path::new(&source).join("files/both"), b"its own").unwrap();
    fs::write(Path::new(&source).join("files/own"), b"its own").unwrap();
    let entry = manager.install(params(&source)).await.unwrap();
    let info = manager.info("a").await.unwrap();
    fs::create_dir_all(&info.files_dir).unwrap();
    fs::write(Path::new(&info.files_dir).join("both"), b"the operator's").unwrap();
    assert_eq!(manager.info("a").await.unwrap().blobs, ["both", "own"]);
    assert_eq!(entry.blob("both").await.unwrap(), b"the operator's");
    assert_eq!(entry.blob("own").await.unwrap(), b"its own");
    assert!(entry.blob("../plugin.toml").await.is_err());
    manager.remove("a", false).await.unwrap();
    assert!(Path::new(&info.files_dir).join("both").exists());
    manager.install(params(&source)).await.unwrap();
    assert!(manager.left().is_empty());
    manager.remove("a", true).await.unwrap();
    assert!(!Path::new(&info.files_dir).exists());
    let none: Value = json!(manager.list());
    assert_eq!(none, json!([]));
}

#[tokio::test]
async fn what_a_removed_plugin_has_left_can_be_found_and_deleted() {
    let bench = Bench::new();
    let manager = bench.open().await;
    let source = bench.source("from", "a", "only-preflight", "");
    manager.install(params(&source)).await.unwrap();
    let kept = bench.home("a").join("kept");
    fs::create_dir_all(&kept).unwrap();
    fs::write(kept.join("data.img"), "what somebody has on it").unwrap();
    manager.remove("a", false).await.unwrap();
    let findings = manager.doctor().await;
    let left = findings.iter().find(|finding| finding.check == "plugin.a.left").expect("it is told");
    assert_eq!(left.severity, Severity::Ok);
    assert!(
        left.message.contains("vm plugin remove a --purge") && left.message.contains(kept.to_str().unwrap())
    );
    for (name, purge) in [("a", false), ("../from", true), (".cache", true), ("b", true)] {
        let error = manager.remove(name, purge).await.unwrap_err();
        assert!(matches!(error, PluginsError::Unknown { .. }), "{name}: {error}");
    }
    assert!(kept.join("data.img").exists() && Path::new(&source).exists());
    manager.remove("a", true).await.unwrap();
    assert!(!bench.home("a").exists() && manager.left().is_empty());
    assert!(manager.doctor().await.iter().all(|finding| finding.check != "plugin.a.left"));
}
