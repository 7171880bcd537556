//! OCI layouts as small as they can be, for other tools to read.

use std::{fs, path::Path, process::Command};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vm_image::rootfs::LayerSource;
use vm_types::ImageDigest;

/// Writes layouts.
pub(crate) struct Layout;

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

impl Layout {
    /// A layout with one image `latest` of these archives, each compressed with a program (`cat` for none).
    pub(crate) fn write(dir: &Path, archives: Vec<Vec<u8>>, compressor: &str) {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let blob = |bytes: &[u8], kind: &str| -> Value {
            let digest = digest(bytes);
            fs::write(blobs.join(&digest[7..]), bytes).unwrap();
            json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": bytes.len() })
        };
        let kind = match compressor {
            "cat" => "layer.v1.tar",
            "zstd" => "layer.v1.tar+zstd",
            _ => "layer.v1.tar+gzip",
        };
        let mut diff_ids = Vec::new();
        let mut layers = Vec::new();
        for archive in archives {
            diff_ids.push(digest(&archive));
            let file = dir.join("archive");
            fs::write(&file, archive).unwrap();
            let input = fs::File::open(&file).unwrap();
            let output = Command::new(compressor).stdin(input).output().unwrap();
            assert!(output.status.success());
            fs::remove_file(&file).unwrap();
            layers.push(blob(&output.stdout, kind));
        }
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": diff_ids }
        });
        let config = blob(&serde_json::to_vec(&config).unwrap(), "config.v1+json");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers
        });
        let mut manifest = blob(&serde_json::to_vec(&manifest).unwrap(), "manifest.v1+json");
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
        let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
        fs::write(dir.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    }
}

/// What identifies a layout's only image, and its layers.
pub(crate) fn layers(layout: &Path) -> (ImageDigest, Vec<LayerSource>) {
    let path =
        |descriptor: &Value| layout.join("blobs/sha256").join(&descriptor["digest"].as_str().unwrap()[7..]);
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let index = read(&layout.join("index.json"));
    let manifest = read(&path(&index["manifests"][0]));
    let config = read(&path(&manifest["config"]));
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    let layers = manifest["layers"].as_array().unwrap().iter().zip(diff_ids);
    let layers = layers.map(|(layer, diff_id)| LayerSource {
        blob: path(layer),
        digest: Some(layer["digest"].as_str().unwrap().to_owned()),
        diff_id: Some(diff_id.as_str().unwrap().to_owned()),
    });
    let identity = manifest["config"]["digest"].as_str().unwrap().to_owned();
    (identity.try_into().unwrap(), layers.collect())
}
