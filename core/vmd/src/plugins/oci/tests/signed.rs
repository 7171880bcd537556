//! Signatures of artifacts, made here as `cosign sign --key` makes them.

use base64::{Engine, prelude::BASE64_STANDARD};
use p256::{
    ecdsa::{Signature, SigningKey, signature::Signer},
    pkcs8::{EncodePublicKey, LineEnding},
};
use vm_api::{PluginSignature, Severity};

use super::*;
use crate::plugins::oci::signature;

/// Somebody who signs.
struct Somebody(SigningKey);

impl Somebody {
    fn new(number: u8) -> Self {
        Self(SigningKey::from_slice(&[number; 32]).unwrap())
    }

    /// Their public key's file.
    fn public(&self, dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        let text = self.0.verifying_key().to_public_key_pem(LineEnding::LF).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    /// A layer with what they say of an artifact.
    fn signs(&self, made: &mut Made, payload: &Value) -> Value {
        let payload = serde_json::to_vec(payload).unwrap();
        let signature: Signature = self.0.sign(&payload);
        let mut layer = made.add("application/vnd.dev.cosign.simplesigning.v1+json", &payload);
        let text = BASE64_STANDARD.encode(signature.to_der());
        layer["annotations"] = json!({ "dev.cosignproject.cosign/signature": text });
        layer
    }
}

fn payload(digest: &str) -> Value {
    json!({
        "critical": {
            "identity": { "docker-reference": "registry.example/greet" },
            "image": { "docker-manifest-digest": digest },
            "type": "cosign container image signature",
        },
        "optional": null,
    })
}

/// An artifact of signatures.
fn signatures(layers: impl FnOnce(&mut Made) -> Vec<Value>) -> Made {
    let mut made = Made { manifest: Value::Null, blobs: BTreeMap::new() };
    let config = made.add("application/vnd.oci.image.config.v1+json", b"{}");
    let layers = layers(&mut made);
    made.manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": layers,
    });
    made
}

fn signed(by: &Somebody, payload: &Value) -> Made {
    signatures(|made| vec![by.signs(made, payload)])
}

#[test]
fn a_signature_is_good_by_a_trusted_key_for_this_artifact_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (ann, bob) = (Somebody::new(1), Somebody::new(2));
    let path = ann.public(dir.path(), "ann.pub");
    let trust = Trust { keys: vec![bob.public(dir.path(), "bob.pub"), path.clone()], required: true };
    let only_bob = Trust { keys: trust.keys[..1].to_vec(), required: true };
    let made = Made::new(b"component");
    let digest = made.digest();
    let tag = signature::tag(&digest);
    let judged = |signatures: &Made, trust: &Trust| {
        let layout = tempfile::tempdir().unwrap();
        write(layout.path(), &[(&made, &["v1"]), (signatures, &[&tag])]);
        // Without a tag: the signatures are not another artifact to choose from.
        let package = layout::package(layout.path().to_str().unwrap(), trust).unwrap();
        package.signature
    };
    let untrusted = |signature: PluginSignature, says: &str| {
        let PluginSignature::Untrusted { reason } = &signature else { panic!("{signature:?}") };
        assert!(reason.contains(says), "{reason}");
        let error = trust.judge("oci://a.example/a", &signature).unwrap_err();
        assert!(error.to_string().contains(says) && error.hint().contains("bob.pub"), "{error}");
    };

    let good = signed(&ann, &payload(&digest));
    let PluginSignature::Trusted { key, fingerprint } = judged(&good, &trust) else { panic!("it is good") };
    assert_eq!(key, path.display().to_string());
    assert!(fingerprint.parse::<vm_oci::Digest>().is_ok(), "{fingerprint}");
    let trusted = PluginSignature::Trusted { key, fingerprint };
    assert!(trust.judge("oci://a.example/a", &trusted).is_ok());
    // One good one is enough, wherever it is.
    let both = signatures(|made| {
        let stranger = Somebody::new(3).signs(made, &payload(&digest));
        vec![stranger, ann.signs(made, &payload(&digest))]
    });
    assert_eq!(judged(&both, &trust), trusted);

    untrusted(judged(&good, &only_bob), "by a trusted key");
    let other = Made::new(b"other").digest();
    untrusted(judged(&signed(&ann, &payload(&other)), &trust), &format!("another artifact, {other}"));
    let mut kind = payload(&digest);
    kind["critical"]["type"] = "a letter".into();
    untrusted(judged(&signed(&ann, &kind), &trust), "is no artifact");
    untrusted(judged(&signed(&ann, &json!({})), &trust), "cannot be understood");
    // The signature of something else under the right words.
    let mixed = signatures(|made| {
        let elsewhere = ann.signs(made, &payload(&other));
        let mut here = bob.signs(made, &payload(&digest));
        here["annotations"] = elsewhere["annotations"].clone();
        vec![here]
    });
    untrusted(judged(&mixed, &trust), "by a trusted key");
    let odd = signatures(|made| {
        let mut layer = ann.signs(made, &payload(&digest));
        layer["annotations"]["dev.cosignproject.cosign/signature"] = "bm8=".into();
        vec![layer]
    });
    untrusted(judged(&odd, &trust), "of a kind");
}

#[test]
fn what_a_signature_is_of_is_compared_with_its_digest() {
    let dir = tempfile::tempdir().unwrap();
    let ann = Somebody::new(1);
    let trust = Trust { keys: vec![ann.public(dir.path(), "ann.pub")], required: false };
    let made = Made::new(b"component");
    let signatures = signed(&ann, &payload(&made.digest()));
    let layout = dir.path().join("layout");
    write(&layout, &[(&made, &["v1"]), (&signatures, &[&signature::tag(&made.digest())])]);
    let digest = signatures.manifest["layers"][0]["digest"].as_str().unwrap();
    let mut bytes = signatures.blobs[digest].clone();
    bytes[0] = b' ';
    fs::write(blob(&layout, digest), bytes).unwrap();
    let error = refusal(layout::package(&format!("{}:v1", layout.display()), &trust));
    assert!(matches!(error, OciError::Digest { what: "signed document", .. }), "{error}");
}

#[test]
fn a_key_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pub");
    let trust = Trust { keys: vec![path.clone()], required: false };
    let layout = dir.path().join("layout");
    write(&layout, &[(&Made::new(b"component"), &["v1"])]);
    let refused = |says: &str| {
        let error = refusal(layout::package(layout.to_str().unwrap(), &trust));
        let said = vm_types::report::chain(&error);
        assert!(said.contains("a.pub") && said.contains(says), "{said}");
        assert!(error.hint().contains("trusted_keys"));
    };
    refused("No such file");
    fs::write(&path, "a key").unwrap();
    refused("no ECDSA P-256 key");
    fs::write(&path, "-----BEGIN EC PRIVATE KEY-----").unwrap();
    refused("private key");
}

#[tokio::test]
async fn where_signatures_are_asked_for_nothing_else_is_installed() {
    let mut bench = Bench::new();
    let keys = tempfile::tempdir().unwrap();
    let ann = Somebody::new(1);
    let source = bench.source("from", "greet", "full", "");
    let toml = fs::read_to_string(Path::new(&source).join("plugin.toml")).unwrap();
    let made = Made::of(&toml, &component("full"), &[]);
    let layout = keys.path().join("layout");
    let text = format!("oci-layout:{}:v1", layout.display());
    write(&layout, &[(&made, &["v1"])]);
    // What is there before the rule stays, and is told.
    let entry = bench.open().await.install(params(&source)).await.unwrap();
    assert_eq!(entry.record.signature, Some(json!({ "state": "unsigned" })));

    bench.trust = Trust { keys: vec![ann.public(keys.path(), "ann.pub")], required: true };
    let manager = bench.open().await;
    let told = |findings: &[vm_api::Finding]| findings.iter().any(|f| f.check == "plugin.greet.signature");
    assert!(told(&manager.doctor().await));
    let upgrade = |source: &str| vm_api::InstallPlugin { upgrade: true, ..params(source) };
    for (source, says) in [(&source, "directory"), (&text, "no signature")] {
        for error in [
            manager.inspect(source).await.unwrap_err(),
            manager.install(upgrade(source)).await.map(drop).unwrap_err(),
        ] {
            assert!(matches!(error, PluginsError::Oci(OciError::Unsigned { .. })), "{error}");
            assert!(error.to_string().contains(says) && error.hint().unwrap().contains("ann.pub"), "{error}");
        }
    }
    let signatures = signed(&ann, &payload(&made.digest()));
    write(&layout, &[(&made, &["v1"]), (&signatures, &[&signature::tag(&made.digest())])]);
    let seen = manager.inspect(&text).await.unwrap();
    assert!(matches!(seen.signature, PluginSignature::Trusted { .. }));
    manager.install(upgrade(&seen.source)).await.unwrap();
    assert!(!told(&manager.doctor().await));
    // It is remembered as it was then.
    let info = bench.open().await.info("greet").await.unwrap();
    assert_eq!(info.signature, seen.signature);

    fs::remove_file(keys.path().join("ann.pub")).unwrap();
    let findings = manager.doctor().await;
    let key = findings.iter().find(|finding| finding.check == "plugins.trusted-keys").unwrap();
    assert!(key.severity == Severity::Error && key.message.contains("ann.pub"), "{key:?}");
}
