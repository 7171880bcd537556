//! Artifacts in image layouts that the tests write, and what is made of them; those of a registry are in [`served`], and
//! signatures in [`signed`].

mod served;
mod signed;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use vm_plugin::MAX_COMPONENT;

use super::{OciError, Trust, artifact, layout};
use crate::plugins::{
    PluginsError,
    package::{Package, digest},
    tests::{Bench, component, params},
};

const TOML: &str = "name = \"greet\"\nversion = \"0.1.0\"\nworld = \"capability\"\nwit = \"0.1.0\"\n";
const WASM: &str = "application/vnd.wasm.config.v0+json";

/// An artifact that is made, and changed before anybody looks.
#[derive(Clone)]
struct Made {
    manifest: Value,
    blobs: BTreeMap<String, Vec<u8>>,
}

impl Made {
    /// A good one.
    fn new(component: &[u8]) -> Self {
        Self::of(TOML, component, &[("key.pem", b"key")])
    }

    fn of(toml: &str, component: &[u8], files: &[(&str, &[u8])]) -> Self {
        let mut made = Self { manifest: Value::Null, blobs: BTreeMap::new() };
        let config = made.add(WASM, b"{\"architecture\":\"wasm\",\"os\":\"wasip2\"}");
        let layers = [
            made.add("application/wasm", component),
            made.add("application/vnd.vm.plugin.manifest.v1+toml", toml.as_bytes()),
            made.add("application/vnd.vm.plugin.files.v1.tar", &tar(files)),
            made.add("text/markdown", b"a layer that nobody asks for"),
        ];
        made.manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": layers,
        });
        made
    }

    fn add(&mut self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = digest(bytes);
        self.blobs.insert(digest.clone(), bytes.to_vec());
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    fn changed(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.manifest);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.manifest).unwrap()
    }

    fn digest(&self) -> String {
        digest(&self.bytes())
    }
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn blob(dir: &Path, digest: &str) -> PathBuf {
    dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
}

/// Writes a layout of these, each under its tags.
fn write(dir: &Path, artifacts: &[(&Made, &[&str])]) {
    fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    fs::write(dir.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
    let mut entries = Vec::new();
    for (made, tags) in artifacts {
        let (bytes, digest) = (made.bytes(), made.digest());
        for (digest, content) in made.blobs.iter().chain([(&digest, &bytes)]) {
            fs::write(blob(dir, digest), content).unwrap();
        }
        entries.extend(tags.iter().map(|tag| {
            json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": bytes.len(),
                "annotations": { "org.opencontainers.image.ref.name": tag },
            })
        }));
    }
    let index = json!({ "schemaVersion": 2, "manifests": entries });
    fs::write(dir.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
}

fn read(dir: &Path, which: &str) -> Result<Package, PluginsError> {
    layout::package(&format!("{}{which}", dir.display()), &Trust::default())
}

/// Why an artifact is refused.
fn refusal(result: Result<Package, PluginsError>) -> OciError {
    match result.map(|package| package.source).unwrap_err() {
        PluginsError::Oci(error) => error,
        other => panic!("another error: {other:?}"),
    }
}

/// Why an artifact with this change is refused.
fn refused(change: impl FnOnce(&mut Value)) -> OciError {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[(&Made::new(b"component").changed(change), &["v1"])]);
    refusal(read(dir.path(), ""))
}

#[test]
fn a_layout_has_a_plugin_with_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let made = Made::new(b"component");
    write(dir.path(), &[(&made, &["v1"])]);
    let package = read(dir.path(), ":v1").unwrap();
    assert_eq!((package.manifest.name.as_str(), package.component()), ("greet", &b"component"[..]));
    assert_eq!(package.digests()["files/key.pem"], digest(b"key"));
    let source = package.source.strip_prefix("oci-layout:").unwrap().to_owned();
    assert!(source.ends_with(&format!(":v1@{}", made.digest())), "{source}");
    // What is recorded leads to the same content.
    assert_eq!(layout::package(&source, &Trust::default()).unwrap().digests(), package.digests());
    // The other form: an empty config, and the type beside it.
    let other = Made::new(b"component").changed(|manifest| {
        manifest["config"]["mediaType"] = "application/vnd.oci.empty.v1+json".into();
        manifest["artifactType"] = WASM.into();
    });
    write(dir.path(), &[(&other, &["v1"])]);
    assert_eq!(read(dir.path(), "").unwrap().digests(), package.digests());
}

#[test]
fn an_artifact_of_one_layer_has_its_manifest_in_an_annotation() {
    let dir = tempfile::tempdir().unwrap();
    let key = "vnd.vm.plugin.manifest.v1+toml";
    let made = Made::new(b"component").changed(|manifest| {
        manifest["layers"].as_array_mut().unwrap().truncate(1);
        manifest["annotations"] = json!({ key: TOML });
    });
    write(dir.path(), &[(&made, &["v1"])]);
    let package = read(dir.path(), "").unwrap();
    let names: Vec<_> = package.digests().into_keys().collect();
    assert_eq!(
        (package.manifest.name.as_str(), names),
        ("greet", vec!["plugin.toml".into(), "plugin.wasm".into()])
    );
    // One that is there twice is none that anybody can be sure of.
    let error = refused(|manifest| manifest["annotations"] = json!({ key: TOML }));
    assert!(matches!(error, OciError::Several { .. }), "{error}");
    let error = refused(|manifest| {
        manifest["layers"].as_array_mut().unwrap().remove(1);
        manifest["annotations"] = json!({ key: "#".repeat((1 << 20) + 1) });
    });
    assert!(matches!(error, OciError::Large { what: "plugin.toml", .. }), "{error}");
}

#[test]
fn what_is_not_what_its_digest_says_is_refused() {
    let made = Made::new(b"component");
    for (index, content) in made.blobs.keys().enumerate() {
        if made.blobs[content].starts_with(b"a layer") {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &[(&made, &["v1"])]);
        let mut bytes = made.blobs[content].clone();
        bytes[0] ^= 1;
        fs::write(blob(dir.path(), content), &bytes).unwrap();
        let error = refusal(read(dir.path(), ""));
        assert!(
            matches!(&error, OciError::Digest { expected, .. } if expected == content),
            "{index}: {error}"
        );
        bytes.push(0);
        fs::write(blob(dir.path(), content), &bytes).unwrap();
        assert!(matches!(refusal(read(dir.path(), "")), OciError::Size { .. }));
    }
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[(&made, &["v1"])]);
    let mut manifest = made.bytes();
    manifest[1] = b'\n';
    fs::write(blob(dir.path(), &made.digest()), manifest).unwrap();
    assert!(matches!(refusal(read(dir.path(), "")), OciError::Digest { .. }));
}

#[test]
fn what_an_artifact_lacks_is_named() {
    let without = |media_type: &'static str| {
        refused(|manifest| {
            let layers = manifest["layers"].as_array_mut().unwrap();
            layers.retain(|layer| layer["mediaType"] != media_type);
        })
    };
    let error = without("application/vnd.vm.plugin.manifest.v1+toml");
    assert!(error.to_string().contains("plugin.toml is missing"), "{error}");
    assert!(error.hint().contains("no plugin of vm"), "{}", error.hint());
    let error = without("application/wasm");
    assert!(error.to_string().contains("component is missing"), "{error}");
    let error = refused(|manifest| manifest["layers"][3] = manifest["layers"][0].clone());
    assert!(matches!(error, OciError::Several { media_type: "application/wasm" }), "{error}");
    let image = "application/vnd.oci.image.config.v1+json";
    let error = refused(|manifest| manifest["config"]["mediaType"] = image.into());
    assert!(matches!(&error, OciError::NotWasm { found } if found == image), "{error}");
    let error = refused(|manifest| *manifest = json!({ "schemaVersion": 2, "manifests": [] }));
    assert!(matches!(error, OciError::Index), "{error}");
    let error = refused(|manifest| *manifest = json!({ "name": "greet" }));
    assert!(matches!(error, OciError::Malformed { .. }), "{error}");
}

#[test]
fn sizes_and_digests_of_descriptors_are_judged_before_anything_is_read() {
    let large = MAX_COMPONENT + 1;
    let error = refused(|manifest| manifest["layers"][0]["size"] = large.into());
    assert!(matches!(error, OciError::Large { bytes, .. } if bytes == large), "{error}");
    let error = refused(|manifest| manifest["layers"][1]["size"] = i64::MAX.into());
    assert!(matches!(error, OciError::Large { what: "plugin.toml", .. }), "{error}");
    let error = refused(|manifest| manifest["config"]["size"] = (-1).into());
    assert!(matches!(error, OciError::Malformed { what: "config", .. }), "{error}");
    for digest in ["sha256:../../../etc/passwd", "md5:00", ""] {
        let error = refused(|manifest| manifest["layers"][0]["digest"] = digest.into());
        assert!(matches!(error, OciError::Malformed { what: "component", .. }), "{error}");
    }
}

#[test]
fn one_of_several_is_named_by_its_tag_or_digest() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (Made::new(b"one"), Made::new(b"two"));
    write(dir.path(), &[(&one, &["v1", "old"]), (&two, &["v2"])]);
    let component = |which: &str| read(dir.path(), which).unwrap().component().to_vec();
    assert_eq!(
        (component(":v1"), component(":old"), component(":v2")),
        (b"one".into(), b"one".into(), b"two".into())
    );
    assert_eq!(component(&format!("@{}", two.digest())), b"two");
    let error = refusal(read(dir.path(), ""));
    assert!(
        matches!(error, OciError::Ambiguous { .. }) && error.hint().contains("v1, old, v2"),
        "{}",
        error.hint()
    );
    let error = refusal(read(dir.path(), ":v3"));
    assert!(error.to_string().ends_with("no v3") && error.hint().contains("v2"), "{error}");
    let error = refusal(read(dir.path(), &format!(":v1@{}", two.digest())));
    assert!(matches!(error, OciError::NoEntry { .. }), "{error}");
    write(dir.path(), &[(&one, &["v1", "old"])]);
    assert_eq!(component(""), b"one", "two tags of one artifact are one artifact");
}

#[test]
fn nothing_outside_of_a_layout_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let made = Made::new(b"component");
    let layout = dir.path().join("layout");
    write(&layout, &[(&made, &["v1"])]);
    let component = blob(&layout, &digest(b"component"));
    let inside = layout.join("blobs/there");
    fs::rename(&component, &inside).unwrap();
    symlink("../there", &component).unwrap();
    assert_eq!(read(&layout, "").unwrap().component(), b"component");
    let outside = dir.path().join("component");
    fs::rename(&inside, &outside).unwrap();
    for target in [Path::new("../../../component"), &outside] {
        fs::remove_file(&component).unwrap();
        symlink(target, &component).unwrap();
        let error = refusal(read(&layout, ""));
        assert!(matches!(error, OciError::Outside { .. }), "{error}");
    }
    // Nor is anything waited for.
    fs::remove_file(&component).unwrap();
    nix::unistd::mkfifo(&component, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = refusal(read(&layout, ""));
    assert!(vm_types::report::chain(&error).contains("no regular file"), "{error}");
    let error = refusal(read(dir.path(), ""));
    assert!(error.to_string().contains("oci-layout") && error.hint().contains("index.json"), "{error}");
}

#[test]
fn files_of_a_layer_count_as_those_of_a_directory_do() {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, kind: tar::EntryType, content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        if kind.is_symlink() {
            header.set_link_name("/etc/passwd").unwrap();
        }
        // The name as it is, without what the builder would refuse or change.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, content).unwrap();
    };
    add("./", tar::EntryType::Directory, b"");
    add("./key.pem", tar::EntryType::Regular, b"key");
    add("plain", tar::EntryType::Regular, b"");
    add("./.hidden", tar::EntryType::Regular, b"no");
    add("link", tar::EntryType::Symlink, b"");
    add("./sub/", tar::EntryType::Directory, b"");
    let found = artifact::files(&builder.into_inner().unwrap()).unwrap();
    assert_eq!(found, [("key.pem".to_owned(), b"key".to_vec()), ("plain".to_owned(), Vec::new())].into());

    let refused = |layer: &[u8], says: &str| {
        let error = artifact::files(layer).unwrap_err();
        assert!(error.to_string().contains(says) && error.hint().contains("tar -cf"), "{error}");
    };
    refused(&tar(&[("files/key.pem", b"key")]), "no plain name");
    refused(&tar(&[("key.pem", b"key"), ("./key.pem", b"other")]), "twice");
    refused(b"\x1f\x8b\x08\0", "compressed");
    let mut cut = tar(&[("key.pem", &[7; 2000])]);
    cut.truncate(1024);
    refused(&cut, "ends within");
    let many: Vec<String> = (0..65).map(|number| number.to_string()).collect();
    let many: Vec<(&str, &[u8])> = many.iter().map(|name| (name.as_str(), &b""[..])).collect();
    refused(&tar(&many), "more than 64");
}

#[tokio::test]
async fn a_plugin_is_installed_from_a_layout_and_pinned_to_what_was_seen() {
    let bench = Bench::new();
    let manager = bench.open().await;
    let toml = fs::read_to_string(Path::new(&bench.source("from", "greet", "full", "")).join("plugin.toml"))
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let made = Made::of(&toml, &component("full"), &[("key.pem", b"key")]);
    let text = format!("oci-layout:{}:v1", dir.path().display());
    write(
        dir.path(),
        &[(&made.clone().changed(|manifest| manifest["layers"][0]["size"] = 7.into()), &["v1"])],
    );
    assert!(manager.install(params(&text)).await.is_err());
    assert!(!bench.home("greet").exists(), "nothing is written of what is refused");

    write(dir.path(), &[(&made, &["v1"])]);
    let seen = manager.inspect(&text).await.unwrap();
    assert_eq!(seen.source, format!("{text}@{}", made.digest()));
    let entry = manager.install(params(&seen.source)).await.unwrap();
    assert_eq!(entry.record.source, seen.source);
    assert_eq!(fs::read(entry.dir().join("files/key.pem")).unwrap(), b"key");
    assert!(manager.verify("greet").await.unwrap().iter().all(|check| check.ok));

    // The tag moves on to one with another file; who has agreed to the first does not get the second.
    let other = Made::of(&toml, &component("full"), &[("key.pem", b"another key")]);
    write(dir.path(), &[(&other, &["v1"])]);
    let again = vm_api::InstallPlugin { upgrade: true, ..params(&seen.source) };
    let error = manager.install(again).await.unwrap_err();
    assert!(matches!(error, PluginsError::Oci(OciError::NoEntry { .. })), "{error}");
    assert_eq!(manager.inspect(&text).await.unwrap().source, format!("{text}@{}", other.digest()));
}
