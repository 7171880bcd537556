//! Plugins of a registry: Debian's own, filled with `skopeo`, signed with `openssl`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vm_tests::{FakeWorld, Running, World, programs, wait_until, world::SHORT};

/// Where it listens, in the world's own network.
pub(super) const AT: &str = "127.0.0.1:5000";

/// A registry in a world.
pub(super) struct Registry {
    pub(super) process: Running,
    storage: PathBuf,
}

impl Registry {
    #[track_caller]
    pub(super) fn start(world: &World) -> Self {
        Self::start_with(world, "")
    }

    /// One with more lines in its configuration. What one of before has, this one has.
    #[track_caller]
    pub(super) fn start_with(world: &World, more: &str) -> Self {
        needs("docker-registry", "docker-registry");
        needs("skopeo", "skopeo");
        let storage = world.directory().join("registry");
        let config = world.directory().join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {AT}}}\n{more}",
            storage.display()
        );
        fs::write(&config, text).expect("a file can be written");
        let mut process = world.tool("docker-registry", &["serve", path(&config)]).start();
        wait_until("the registry listens", SHORT, || {
            let said = process.stderr_so_far() + &process.stdout_so_far();
            assert!(process.runs(), "the registry has ended: {said}");
            said.contains("listening on")
        });
        Self { process, storage }
    }

    /// Pushes what a layout has under a tag.
    #[track_caller]
    pub(super) fn push(&self, world: &World, layout: &Path, tag: &str, name: &str) {
        let (from, to) = (format!("oci:{}:{tag}", path(layout)), format!("docker://{AT}/{name}"));
        world
            .tool("skopeo", &["copy", "--insecure-policy", "--dest-tls-verify=false", &from, &to])
            .run()
            .exits(0);
    }

    /// The file that a blob is in.
    pub(super) fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").expect("a digest");
        self.storage.join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    }

    pub(super) fn stop(mut self) {
        self.process.signal(Signal::SIGKILL);
        self.process.finish(SHORT);
    }
}

#[track_caller]
pub(super) fn needs(program: &str, package: &str) {
    let found =
        Command::new("sh").args(["-c", "command -v \"$0\"", program]).output().expect("sh can be run");
    assert!(found.status.success(), "there is no {program}: install the Debian package {package}");
}

pub(super) fn path(path: &Path) -> &str {
    path.to_str().expect("paths of the tests are UTF-8")
}

/// A copy of a plugin for tests, of another version.
fn version(world: &World, name: &str, version: &str) -> PathBuf {
    let from = PathBuf::from(programs::test_plugin(name));
    let to = world.directory().join(format!("{name}-{version}"));
    fs::create_dir_all(&to).expect("a directory can be made");
    for entry in
        fs::read_dir(&from).expect("the plugin can be read").flatten().filter(|entry| entry.path().is_file())
    {
        fs::copy(entry.path(), to.join(entry.file_name())).expect("a file can be copied");
    }
    let manifest = to.join("plugin.toml");
    let text = fs::read_to_string(&manifest).expect("the manifest can be read");
    let lines = text.lines().map(|line| match line.starts_with("version = ") {
        true => format!("version = \"{version}\"\n"),
        false => format!("{line}\n"),
    });
    fs::write(&manifest, lines.collect::<String>()).expect("a file can be written");
    to
}

/// Packs a plugin; the digest of the artifact.
#[track_caller]
fn pack(world: &World, plugin: &Path, layout: &Path) -> String {
    let packed = world.ask(&["plugin", "pack", path(plugin), path(layout)]);
    packed["digest"].as_str().expect("a digest is told").to_owned()
}

#[test]
fn a_plugin_of_a_registry_is_what_its_digest_says() {
    let mut host = FakeWorld::new("[plugins]\nbundled = \"/nonexistent\"\n");
    host.start("");
    let world = host.world();
    let registry = Registry::start(world);
    let layout = world.directory().join("layout");
    let (one, two) = (version(world, "effects", "1.0.0"), version(world, "effects", "2.0.0"));
    let (first, second) = (pack(world, &one, &layout), pack(world, &two, &layout));
    registry.push(world, &layout, "1.0.0", "team/effects:stable");

    let stable = format!("oci://{AT}/team/effects:stable");
    let install = |source: &str| world.vm(&["plugin", "install", source, "--grant", "all"]).run();
    install(&stable).exits(0).tells("effects 1.0.0 is installed");
    let shown = world.ask(&["plugin", "show", "effects"]);
    assert_eq!((&shown["source"], &shown["version"]), (&json!(format!("{stable}@{first}")), &json!("1.0.0")));
    world.vm(&["plugin", "ls"]).run().exits(0).tells("effects").tells("1.0.0");
    world.vm(&["plugin", "verify", "effects"]).run().exits(0);

    // The tag moves; what is installed does not before somebody says so.
    registry.push(world, &layout, "2.0.0", "team/effects:stable");
    assert_eq!(world.ask(&["plugin", "show", "effects"])["version"], "1.0.0");
    let upgraded = world.ask(&["plugin", "install", &stable, "--yes"]);
    assert_eq!(upgraded["source"], json!(format!("{stable}@{second}")));
    let back = format!("oci://{AT}/team/effects@{first}");
    install(&back).exits(0).tells("1.0.0");

    let unknown = format!("oci://{AT}/team/effects@sha256:{}", "0".repeat(64));
    install(&unknown).exits(3).complains("has no team/effects@sha256:000").complains("hint");
    install(&format!("oci://{AT}/team/effects:none")).exits(3).complains("team/effects:none");
    install("oci://127.0.0.1:1/team/effects:1").exits(1).complains("127.0.0.1:1").complains("plain HTTP");
    let refused = world.vm(&["plugin", "install", &unknown, "--grant", "all", "--json"]).run().exits(3);
    refused.complains("\"kind\":\"not_found\"");

    // Somebody changes the component where the registry keeps it: its size is right, its digest is not.
    let component = upgraded["digest"].as_str().unwrap();
    let blob = registry.blob(component);
    let mut bytes = fs::read(&blob).unwrap();
    let last = bytes.last_mut().unwrap();
    *last ^= 1;
    fs::write(&blob, bytes).unwrap();
    install(&stable).exits(10).complains(component).complains("hint");
    assert_eq!(world.ask(&["plugin", "show", "effects"])["version"], "1.0.0");
    world.vm(&["plugin", "verify", "effects"]).run().exits(0);

    // A host that reaches no registry takes the layout itself.
    install(&format!("oci-layout:{}:2.0.0", path(&layout))).exits(0).tells("2.0.0");
    world.vm(&["plugin", "remove", "effects"]).run().exits(0);
    registry.stop();
    host.terminate();
    host.leaves_nothing();
}

/// Keys of somebody who signs, made as an operator without other tools would.
fn keys(world: &World, name: &str) -> (PathBuf, PathBuf) {
    let (private, public) =
        (world.directory().join(format!("{name}.key")), world.directory().join(format!("{name}.pub")));
    let make = ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path(&private)];
    world.tool("openssl", &make).run().exits(0);
    world.tool("openssl", &["ec", "-in", path(&private), "-pubout", "-out", path(&public)]).run().exits(0);
    (private, public)
}

/// A layout with the signature of the artifact of a digest, as `cosign sign --key` pushes it; its tag.
fn sign(world: &World, key: &Path, digest: &str, layout: &Path) -> String {
    let payload = json!({
        "critical": {
            "identity": { "docker-reference": format!("{AT}/team/effects") },
            "image": { "docker-manifest-digest": digest },
            "type": "cosign container image signature",
        },
        "optional": null,
    });
    let (text, signature) = (world.directory().join("payload.json"), world.directory().join("payload.sig"));
    fs::write(&text, payload.to_string()).expect("a file can be written");
    let dgst = ["dgst", "-sha256", "-sign", path(key), "-out", path(&signature), path(&text)];
    world.tool("openssl", &dgst).run().exits(0);
    let base64 = world.tool("openssl", &["base64", "-A", "-in", path(&signature)]).run().exits(0).text();

    let _ = fs::remove_dir_all(layout);
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("a directory can be made");
    let add = |media_type: &str, bytes: &[u8]| {
        let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(blobs.join(&hex), bytes).expect("a file can be written");
        json!({ "mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len() })
    };
    let mut layer = add("application/vnd.dev.cosign.simplesigning.v1+json", payload.to_string().as_bytes());
    layer["annotations"] = json!({ "dev.cosignproject.cosign/signature": base64.trim() });
    let config = json!({
        "architecture": "", "os": "", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = add("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let image = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": image, "config": config, "layers": [layer] });
    let mut entry = add(image, manifest.to_string().as_bytes());
    let tag = format!("{}.sig", digest.replace(':', "-"));
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
    let index: Value = json!({ "schemaVersion": 2, "manifests": [entry] });
    fs::write(layout.join("index.json"), index.to_string()).expect("a file can be written");
    fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")
        .expect("a file can be written");
    tag
}

#[test]
fn where_signatures_are_required_only_signed_plugins_are_installed() {
    let mut host = FakeWorld::new("");
    let world = host.world();
    needs("openssl", "openssl");
    let ((ann, public), (stranger, _)) = (keys(world, "ann"), keys(world, "stranger"));
    let config = fs::read_to_string(world.dirs().config_file()).unwrap();
    let rule = format!("[plugins]\ntrusted_keys = [\"{}\"]\nrequire_signature = true\n", path(&public));
    world.configure(&(config + &rule));
    host.start("");
    let world = host.world();
    let registry = Registry::start(world);
    let layout = world.directory().join("layout");
    let plugin = version(world, "effects", "1.0.0");
    let digest = pack(world, &plugin, &layout);
    registry.push(world, &layout, "1.0.0", "team/effects:1.0.0");

    let source = format!("oci://{AT}/team/effects:1.0.0");
    let install = |source: &str| world.vm(&["plugin", "install", source, "--grant", "all"]).run();
    install(&source).exits(8).complains("no signature").complains("ann.pub");
    install(path(&plugin)).exits(8).complains("a directory cannot be signed").complains("require_signature");
    // What comes with the daemon needs none.
    let bundled = world.ask(&["plugin", "ls"])[0]["name"].as_str().unwrap().to_owned();
    install(&format!("bundled:{bundled}")).exits(0);

    let signatures = world.directory().join("signatures");
    let attach = |key: &Path, of: &str| {
        let tag = sign(world, key, of, &signatures);
        // Under the tag where it is looked for, whatever it is of.
        let place = format!("team/effects:{}.sig", digest.replace(':', "-"));
        registry.push(world, &signatures, &tag, &place);
    };
    attach(&stranger, &digest);
    install(&source).exits(8).complains("by a trusted key");
    let other = format!("sha256:{}", "7".repeat(64));
    attach(&ann, &other);
    install(&source).exits(8).complains("another artifact").complains(&other);
    let there = world.ask(&["plugin", "ls"]);
    assert!(there.as_array().unwrap().iter().all(|plugin| plugin["name"] != "effects"), "{there}");

    attach(&ann, &digest);
    install(&source).exits(0);
    world.vm(&["plugin", "show", "effects"]).run().exits(0).tells(&format!("signed by {}", path(&public)));
    assert_eq!(world.ask(&["plugin", "show", "effects"])["signature"]["state"], "trusted");
    // Its own bytes are covered: the same plugin with another line in its manifest is another artifact.
    let changed = version(world, "effects", "1.0.1");
    pack(world, &changed, &layout);
    registry.push(world, &layout, "1.0.1", "team/effects:1.0.0");
    install(&source).exits(8).complains("no signature");
    assert_eq!(world.ask(&["plugin", "show", "effects"])["version"], "1.0.0");
    world.vm(&["plugin", "remove", "effects"]).run().exits(0);
    registry.stop();
    host.terminate();
    host.leaves_nothing();
}
