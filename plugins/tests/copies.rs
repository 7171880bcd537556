//! No plugin that comes with the daemon is special: the same under another name, from the packaged SDK and in a workspace of its own,
//! as any author has it, plans the same.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use serde_json::json;
use vm_plugin::{Granted, Hook, Input};

use crate::host::{Source, built, input, load, load_from, scratch, state, workspace};

/// As `docs/plugins.md` has it.
const CARGO_TOML: &str = r#"
[workspace]

[package]
name = "NAME"
version = "0.1.0"
edition = "2024"

[lib]
crate-type = ["cdylib"]

[dependencies]
serde = { version = "1", features = ["derive"] }
vm-plugin-sdk = { path = "../sdk" }

[profile.release]
opt-level = "s"
lto = true
codegen-units = 1
panic = "abort"
strip = true
"#;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
}

/// The SDK's files that `cargo package` would pack, and no others.
fn packaged_sdk(to: &Path) {
    let sdk = workspace().join("../sdk");
    let mut cargo = Command::new(env!("CARGO"));
    let list =
        cargo.args(["package", "--list", "--allow-dirty", "--offline"]).current_dir(&sdk).output().unwrap();
    assert!(list.status.success(), "{}", String::from_utf8_lossy(&list.stderr));
    let list = String::from_utf8(list.stdout).unwrap();
    // What packing itself adds is not there.
    for file in list.lines().filter(|file| sdk.join(file).exists()) {
        copy(&sdk.join(file), &to.join(file));
    }
    assert!(to.join("wit/worlds.wit").exists() && !to.join("tests").exists(), "{list}");
}

/// The directory of a plugin's copy under another name. All are built once.
fn renamed(plugin: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let place = BUILT.get_or_init(|| {
        let place = scratch().join("copies");
        let _ = fs::remove_dir_all(&place);
        packaged_sdk(&place.join("sdk"));
        for (from, to) in [("nat", "uplink"), ("work-disk", "scratchpad")] {
            let (from, dir) = (workspace().join(from), place.join(to));
            for file in fs::read_dir(from.join("src")).unwrap().map(Result::unwrap) {
                copy(&file.path(), &dir.join("src").join(file.file_name()));
            }
            // The versions that are here, so that nothing need be fetched.
            copy(&workspace().join("Cargo.lock"), &dir.join("Cargo.lock"));
            fs::write(dir.join("Cargo.toml"), CARGO_TOML.replace("NAME", to)).unwrap();
            copy(&workspace().join(".cargo/config.toml"), &dir.join(".cargo/config.toml"));
            let manifest = fs::read_to_string(from.join("plugin.toml")).unwrap();
            let old = |key: &str| manifest.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
            let manifest = manifest.replace(&old("name = "), &format!("name = \"{to}\""));
            let manifest = manifest.replace(&old("component = "), &format!("component = \"{to}.wasm\""));
            fs::write(dir.join("plugin.toml"), manifest).unwrap();

            let target = scratch().join("plugins/build");
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args([
                "build",
                "--release",
                "--offline",
                "--target",
                "wasm32-unknown-unknown",
                "--target-dir",
            ]);
            built(cargo.arg(&target).current_dir(&dir));
            let component = format!("{to}.wasm");
            copy(&target.join("wasm32-unknown-unknown/release").join(&component), &dir.join(&component));
        }
        place
    });
    place.join(match plugin {
        "nat" => "uplink",
        "work-disk" => "scratchpad",
        other => panic!("{other} has no copy"),
    })
}

#[tokio::test]
async fn a_copy_under_another_name_plans_the_same() {
    let cases = [
        ("nat", json!({})),
        ("nat", json!({ "deny": ["198.51.100.0/24", "203.0.113.7"] })),
        ("work-disk", json!({})),
        ("work-disk", json!({ "path": "/srv", "size-gib": 3, "lifetime": "kept", "options": [] })),
        ("work-disk", json!({ "label": "work" })),
    ];
    for (name, config) in cases {
        let original = load(Source::Fresh, name, config.clone()).await;
        let copy = load_from(&renamed(name), config.clone(), Granted::All).await;
        assert_ne!(copy.name(), original.name());
        assert_eq!(copy.manifest().grants, original.manifest().grants, "{name}");
        let hooks = |plugin: &vm_plugin::Plugin| Hook::CAPABILITY.map(|hook| plugin.has(hook));
        assert_eq!(hooks(&copy), hooks(&original), "{name}");
        let planning = [Hook::ContributeGuest, Hook::ContributeMachine, Hook::PrepareHost];
        let mut planned = 0;
        for hook in planning {
            for label in [None, Some("work")] {
                let mut input: Input = input();
                let labels = &mut input.vm.as_mut().unwrap().labels;
                labels.extend(label.map(|label| (label.to_owned(), String::new())));
                let one = original.call(hook, input.clone(), &state()).await.unwrap();
                let two = copy.call(hook, input, &state()).await.unwrap();
                assert_eq!(
                    (&one.plan, &one.findings),
                    (&two.plan, &two.findings),
                    "{name}: {hook}, {config}"
                );
                planned += one.plan.len();
            }
        }
        assert!(planned > 0, "{name} plans nothing with {config}");
    }
}
