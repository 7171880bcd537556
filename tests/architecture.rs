//! The directions in which crates may depend on each other, checked against what cargo says.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use serde_json::Value;

/// What each crate may depend on, directly, among the crates of this workspace. A crate that is not here may not exist.
const MAY: &[(&str, &[&str])] = &[
    // Data, and the seams everybody shares.
    ("vm-types", &[]),
    ("vm-host", &["vm-types"]),
    ("vm-locks", &[]),
    ("vm-channel", &["vm-types"]),
    ("vm-archive", &["vm-types"]),
    ("vm-api", &["vm-types"]),
    // The layers, which know nothing of each other.
    ("vm-store", &["vm-types"]),
    ("vm-disk", &["vm-types", "vm-host"]),
    ("vm-net", &["vm-types", "vm-host"]),
    ("vm-dns", &["vm-types", "vm-host"]),
    ("vm-image", &["vm-types", "vm-host"]),
    ("vm-oci", &["vm-types", "vm-host"]),
    ("vm-vmm", &["vm-types", "vm-host", "vm-channel"]),
    ("vm-shim", &["vm-types", "vm-host", "vm-channel"]),
    ("vm-plugin", &["vm-types", "vm-host"]),
    ("vm-guest", &["vm-types"]),
    ("vm-workspace", &["vm-types", "vm-host", "vm-archive"]),
    // What joins them.
    (
        "vm-engine",
        &[
            "vm-types",
            "vm-host",
            "vm-locks",
            "vm-store",
            "vm-disk",
            "vm-net",
            "vm-image",
            "vm-oci",
            "vm-vmm",
            "vm-shim",
            "vm-guest",
            "vm-workspace",
        ],
    ),
    (
        "vmd",
        &[
            "vm-types",
            "vm-host",
            "vm-locks",
            "vm-api",
            "vm-store",
            "vm-disk",
            "vm-net",
            "vm-image",
            "vm-oci",
            "vm-vmm",
            "vm-shim",
            "vm-dns",
            "vm-guest",
            "vm-workspace",
            "vm-plugin",
            "vm-engine",
        ],
    ),
    // The other ends of the daemon's two interfaces.
    ("vm-cli", &["vm-types", "vm-host", "vm-archive", "vm-api", "vm-guest"]),
    ("vm-agent", &["vm-types", "vm-channel", "vm-archive"]),
    ("vm-tests", &["vm-types", "vm-channel", "vm-store", "vm-api"]),
    ("vm-test-prog", &[]),
    ("vm-plugins-test", &[]),
];

/// Heavy or delicate dependencies that have one home each.
const HOMES: &[(&str, &[&str])] = &[
    ("rusqlite", &["vm-store"]),
    ("rusqlite_migration", &["vm-store"]),
    ("rtnetlink", &["vm-net", "vm-agent"]),
    ("yamux", &["vm-channel"]),
    ("hickory-server", &["vm-dns"]),
    ("clap", &["vm-cli", "vmd"]),
    ("indicatif", &["vm-cli"]),
    ("comfy-table", &["vm-cli"]),
    ("wasmtime", &["vm-plugin"]),
    // One crate speaks with registries; the daemon judges the plugins that are in them.
    ("oci-client", &["vm-oci", "vmd"]),
    ("reqwest", &["vm-oci"]),
    ("rustls", &["vm-oci"]),
    ("p256", &["vmd"]),
];

/// Crate, its normal and build dependencies, and the features of `vm-api` it asks for.
fn packages() -> BTreeMap<String, Vec<Value>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("cargo metadata lists packages");
    packages
        .iter()
        .map(|package| {
            let name = package["name"].as_str().unwrap_or_default().to_owned();
            let dependencies = package["dependencies"].as_array().cloned().unwrap_or_default();
            // What only tests use is no matter of architecture.
            (name, dependencies.into_iter().filter(|dependency| dependency["kind"] != "dev").collect())
        })
        .collect()
}

#[test]
fn crates_depend_only_in_the_given_directions() {
    let may: BTreeMap<_, BTreeSet<_>> =
        MAY.iter().map(|(name, others)| (*name, others.iter().copied().collect())).collect();
    let packages = packages();
    let mut wrong = Vec::new();
    for (name, dependencies) in &packages {
        let Some(allowed) = may.get(name.as_str()) else {
            wrong.push(format!("{name} is not in the table: say here what it may depend on"));
            continue;
        };
        for dependency in dependencies.iter().filter_map(|dependency| dependency["name"].as_str()) {
            if packages.contains_key(dependency) && !allowed.contains(dependency) {
                wrong.push(format!("{name} depends on {dependency}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn some_dependencies_have_one_home() {
    let mut wrong = Vec::new();
    for (name, dependencies) in packages() {
        for dependency in dependencies.iter().filter_map(|dependency| dependency["name"].as_str()) {
            if HOMES.iter().any(|(what, homes)| *what == dependency && !homes.contains(&name.as_str())) {
                wrong.push(format!("{name} depends on {dependency}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_client_cannot_serve_and_the_daemon_is_no_client() {
    let packages = packages();
    for (name, foreign) in [("vm-cli", "server"), ("vmd", "client")] {
        let api =
            packages[name].iter().find(|dependency| dependency["name"] == "vm-api").expect("uses vm-api");
        let features = api["features"].as_array().cloned().unwrap_or_default();
        assert!(!features.iter().any(|feature| feature == foreign), "{name} asks for vm-api's {foreign}");
    }
}

/// Where the word is something else than the plugin, such as a VM's kind of network and nft's kind of chain.
const OTHER_SENSE: &[(&str, &str)] = &[
    ("nat", "core/net/src/firewall.rs"),
    ("nat", "core/net/src/foreign.rs"),
    ("nat", "core/net/src/host.rs"),
    ("nat", "core/cli/src/commands/show.rs"),
    ("nat", "core/engine/src/vm/hooks.rs"),
    ("nat", "core/vmd/src/plugins/suite.rs"),
    // The program, and the verb.
    ("git", "core/workspace/src/git.rs"),
    ("git", "core/vmd/src/doctor.rs"),
    ("git", "core/cli/src/commands/workspace/plan.rs"),
    ("copy", "core/disk/src/cow.rs"),
    ("copy", "core/image/src/registered.rs"),
    ("copy", "core/engine/src/images/build/steps.rs"),
    // A name that cargo gives no crate.
    ("incremental", "core/cli/src/commands/plugin/new.rs"),
];

#[test]
fn no_plugin_that_comes_with_the_daemon_is_special_in_the_core() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let plugins = fs::read_dir(top.join("plugins")).expect("there are plugins").flatten();
    let names: Vec<String> = plugins
        .filter(|entry| entry.path().join("plugin.toml").exists())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    assert!(names.len() >= 5, "{names:?}");
    let (mut seen, mut wrong) = (0, Vec::new());
    let mut left = vec![top.join("core")];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).expect("sources can be read").flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() {
                // These may speak of whatever they like.
                if !["tests", "examples"].contains(&name.as_str()) {
                    left.push(path);
                }
                continue;
            }
            if !name.ends_with(".rs") || name.ends_with("tests.rs") {
                continue;
            }
            let text = fs::read_to_string(&path).expect("sources are text");
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            seen += 1;
            let place = path.strip_prefix(&top).unwrap_or(&path).display().to_string();
            for plugin in &names {
                let other = OTHER_SENSE.iter().any(|(word, file)| word == plugin && *file == place);
                if text.contains(&format!("\"{plugin}\"")) && !other {
                    wrong.push(format!("{place} speaks of {plugin}"));
                }
            }
        }
    }
    assert!(seen > 100, "only {seen} sources were looked at");
    assert!(wrong.is_empty(), "{wrong:#?}");
}
