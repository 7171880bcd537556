//! What `vm plugin new` makes, as its user meets it: it is tested and built by cargo, found by `vm plugin install`, and loaded by
//! the real host.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use vm_plugin::{
    Compiler, Granted, Hook, Input, Limits, Plugin, Query, Resolved, Resolver, Runtime, Severity,
    plan::GuestPart,
    ports::{Directory, MemoryState},
};

use crate::{
    host::{Host, json as parse, stderr, stdout},
    stub::{Answers, End, Stub},
};

fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Where cargo builds: kept between runs, and shared with the tests of the bundled plugins, so that what all plugins depend on is
/// compiled once.
fn target() -> PathBuf {
    scratch().join("plugins/build")
}

fn cargo(project: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO"))
        .args(arguments)
        .arg("--locked")
        .current_dir(project)
        .env("CARGO_TARGET_DIR", target())
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()
        .unwrap()
}

#[track_caller]
fn succeeded(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "is the target wasm32-unknown-unknown installed? {said}");
    // The project has lints of its own only where its author wants some.
    assert!(!said.contains("warning: "), "{said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A project that was made, tested and built, as the directory that the daemon is handed.
fn built(world: &str, name: &str) -> PathBuf {
    let host = Host::new();
    let project = host.path(name);
    let line = format!("plugin new --world {world} {name} --dir {}", project.display());
    let text = stdout(&host.run(&line), 0);
    assert!(text.contains("cargo build --release --target wasm32-unknown-unknown"), "{text}");
    let lock = fs::read_to_string(project.join("Cargo.lock")).unwrap();

    let tested = succeeded(&cargo(&project, &["test", "--quiet", "--release"]));
    assert!(tested.contains("passed") && !tested.contains(" 0 passed; 0 failed; 1"), "{tested}");
    succeeded(&cargo(&project, &["build", "--release", "--target", "wasm32-unknown-unknown"]));
    assert_eq!(fs::read_to_string(project.join("Cargo.lock")).unwrap(), lock);

    // Handed over as a user would, who has cargo build into another directory than the project's.
    let ends = [(("plugin.test", "*"), End::Result(json!([])))].into();
    let stub = Stub::new(&host, Answers { ends, ..Answers::default() });
    let mut test = host.command(&format!("plugin test {}", project.display()));
    let output = test.env("CARGO_TARGET_DIR", target()).output().unwrap();
    stdout(&output, 0);
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let source = stub.asked_for("plugin.test")[0][0].as_str().map(PathBuf::from).unwrap();
    assert_eq!(source, target().join("vm-plugin").join(name));
    source
}

async fn load(dir: &Path, config: Value) -> Plugin {
    let manifest = fs::read_to_string(dir.join("plugin.toml")).unwrap();
    let manifest: vm_plugin::Manifest = manifest.parse().unwrap();
    let component = fs::read(dir.join(&manifest.component)).unwrap();
    // What consent says rests on this.
    assert!(!component.windows(5).any(|window| window == b"wasi:"), "it imports WASI");
    let cache = scratch().join("scaffold-aot");
    fs::DirBuilder::new().mode(0o700).recursive(true).create(&cache).unwrap();
    // As much time as a busy machine may need.
    let minute = Duration::from_secs(60);
    let limits = Limits { wall: minute, wall_live: minute, processor: minute, ..Limits::default() };
    let runtime = Arc::new(Runtime::new(&cache, Compiler::InProcess, limits).unwrap());
    Plugin::load(&runtime, dir, Granted::All, config).await.unwrap()
}

fn input() -> Input {
    let vm = json!({
        "id": "0123456789ab", "name": "dev", "image_reference": "debian:bookworm",
        "image_digest": format!("sha256:{}", "a".repeat(64)), "image_properties": {}, "kernel_release": "6.1.0",
        "cpus": 2, "memory_bytes": 512 << 20, "disk_bytes": 1_u64 << 30, "network": "nat",
        "addresses": ["192.0.2.7"], "labels": {}, "temporary": false,
    });
    Input { reason: "start".to_owned(), vm: Some(serde_json::from_value(vm).unwrap()), ..Input::default() }
}

struct OneVm;

impl Directory for OneVm {
    fn names(&self) -> Vec<String> {
        vec!["dev".to_owned()]
    }

    fn addresses(&self, name: &str) -> Vec<std::net::IpAddr> {
        if name == "dev" { vec!["192.0.2.7".parse().unwrap()] } else { Vec::new() }
    }

    fn name_of(&self, _: std::net::IpAddr) -> Option<String> {
        None
    }
}

/// One after the other: cargo would have them wait for each other all the same.
#[tokio::test]
async fn a_new_project_builds_with_one_command_and_does_what_it_says() {
    let state: Arc<dyn vm_plugin::ports::StateStore> = Arc::new(MemoryState::default());

    let capability = built("capability", "scaffold-greet");
    let plugin = load(&capability, json!({ "greeting": "welcome", "max-cpus": 1 })).await;
    let outcome = plugin.call(Hook::ContributeGuest, input(), &state).await.unwrap();
    let expected = GuestPart::Environment { name: "GREETING".to_owned(), value: "welcome, dev".to_owned() };
    assert_eq!(outcome.plan.guest, [expected]);
    let outcome = plugin.call(Hook::Preflight, input(), &state).await.unwrap();
    assert_eq!(outcome.findings[0].severity, Severity::Failure);
    let plugin = load(&capability, json!({})).await;
    let outcome = plugin.call(Hook::Preflight, input(), &state).await.unwrap();
    assert!(outcome.findings.is_empty(), "without a limit nothing is refused");

    let plugin = Arc::new(load(&built("dns", "scaffold-names"), json!({})).await);
    let resolver = Resolver::start(plugin, input(), state.clone(), Arc::new(OneVm)).await.unwrap();
    assert_eq!(resolver.zones(), ["lab"]);
    let ask = async |name: &str, query_type| {
        let query = Query { name: name.to_owned(), query_type, query_class: 1, asker: None };
        resolver.resolve(query).await.unwrap()
    };
    assert!(matches!(ask("dev.lab", 1).await, Resolved::Records(records) if records[0].data == "192.0.2.7"));
    assert_eq!(ask("dev.lab", 28).await, Resolved::NoData);
    assert_eq!(ask("gone.lab", 1).await, Resolved::NxDomain);

    let plugin = load(&built("workspace-importer", "scaffold-bring"), json!({})).await;
    assert!(plugin.has(Hook::Probe) && plugin.has(Hook::Import) && !plugin.has(Hook::Preflight));
}

#[test]
fn names_and_directories_are_checked_before_anything_is_written() {
    let host = Host::new();
    for name in ["Cpu", "../up", "serde", "9lives"] {
        let text = stderr(&host.run(&format!("plugin new {name} --dir {}", host.path("new").display())), 2);
        assert!(
            text.contains("is no name for a plugin") && text.contains("vm plugin new cpu-limit"),
            "{text}"
        );
    }
    let dir = host.path("new");
    let line = format!("plugin new cpu-limit --dir {}", dir.display());
    let made = parse(stdout(&host.run(&format!("{line} --json")), 0).as_bytes());
    assert_eq!(made["dir"], dir.to_str().unwrap());
    fs::write(dir.join("src/lib.rs"), "mine").unwrap();
    let text = stderr(&host.run(&line), 2);
    assert!(text.contains("is there already") && text.contains("--dir"), "{text}");
    assert_eq!(fs::read_to_string(dir.join("src/lib.rs")).unwrap(), "mine");

    // What was made and not built yet is told with the command that builds it.
    let text = stderr(&host.run(&format!("plugin install {}", dir.display())), 2);
    assert!(text.contains("is not built") && text.contains("cargo build --release"), "{text}");
}
