//! Images that are made by hand, so that every byte of them is known.

use std::{collections::BTreeMap, fs, io::Write, path::Path};

use serde_json::{Value, json};
use vm_oci::{Compression, Digest};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Blobs, and the documents that lead to them.
#[derive(Clone, Default)]
pub(crate) struct Made {
    pub(crate) blobs: BTreeMap<Digest, Vec<u8>>,
    entries: Vec<Value>,
}

/// An image in it.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) manifest: Digest,
    pub(crate) config: Digest,
    pub(crate) layers: Vec<Digest>,
    pub(crate) diff_ids: Vec<Digest>,
    entry: Value,
}

/// A tar archive with one file of so many bytes, which do not compress.
pub(crate) fn tar(name: &str, size: usize) -> Vec<u8> {
    let mut state = Digest::of(name.as_bytes())
        .to_string()
        .bytes()
        .fold(1_u64, |sum, b| sum * 31 % 65_521 + u64::from(b));
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    let content: Vec<u8> = (0..size).map(|_| next()).collect();
    let mut header = tar::Header::new_gnu();
    header.set_size(size as u64);
    header.set_mode(0o644);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut header, name, &content[..]).unwrap();
    builder.into_inner().unwrap()
}

fn compress(bytes: &[u8], compression: Compression) -> (Vec<u8>, &'static str) {
    match compression {
        Compression::None => (bytes.to_vec(), "application/vnd.oci.image.layer.v1.tar"),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            (encoder.finish().unwrap(), "application/vnd.oci.image.layer.v1.tar+gzip")
        }
        Compression::Zstd => {
            (zstd::encode_all(bytes, 1).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd")
        }
    }
}

impl Made {
    fn add(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = Digest::of(&bytes);
        let descriptor = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() });
        self.blobs.insert(digest, bytes);
        descriptor
    }

    /// An image of layers, each a tar archive.
    pub(crate) fn image(&mut self, architecture: &str, layers: &[(Vec<u8>, Compression)]) -> Image {
        let diff_ids: Vec<Digest> = layers.iter().map(|(tar, _)| Digest::of(tar)).collect();
        let layers: Vec<Value> = layers
            .iter()
            .map(|(tar, compression)| {
                let (bytes, media_type) = compress(tar, *compression);
                self.add(media_type, bytes)
            })
            .collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "created": "2026-01-02T03:04:05Z",
            "config": { "Env": ["PATH=/bin", "WHO=ann"], "WorkingDir": "/srv", "User": "1000", "Entrypoint": ["/run"],
                "Cmd": ["-v"], "Labels": { "team": "a" }, "ExposedPorts": { "80/tcp": {} } },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": diff_ids.iter().map(|_| json!({ "created_by": "a test" })).collect::<Vec<_>>(),
        });
        let config = self.add("application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
        let mut entry = self.add(MANIFEST, manifest.to_string().into_bytes());
        entry["platform"] = json!({ "os": "linux", "architecture": architecture });
        let digest = |value: &Value| value["digest"].as_str().unwrap().parse::<Digest>().unwrap();
        Image {
            manifest: digest(&entry),
            config: digest(&config),
            layers: layers.iter().map(digest).collect(),
            diff_ids,
            entry,
        }
    }

    /// An artifact of a type, with these layers, under a tag.
    pub(crate) fn artifact(&mut self, media_type: &str, layers: &[(&str, &[u8])], tag: &str) {
        let layers: Vec<Value> =
            layers.iter().map(|(media_type, bytes)| self.add(media_type, bytes.to_vec())).collect();
        let config = self.add("application/vnd.oci.empty.v1+json", b"{}".to_vec());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": media_type, "config": config, "layers": layers,
        });
        let mut entry = self.add(MANIFEST, manifest.to_string().into_bytes());
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        self.entries.push(entry);
    }

    /// Gives an image a tag.
    pub(crate) fn tag(&mut self, image: &Image, tag: &str) {
        let mut entry = image.entry.clone();
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        self.entries.push(entry);
    }

    /// An index of images under a tag; its digest.
    pub(crate) fn index(&mut self, images: &[&Image], tag: &str) -> Digest {
        let entries: Vec<&Value> = images.iter().map(|image| &image.entry).collect();
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
        let mut entry = self.add(INDEX, index.to_string().into_bytes());
        let digest = entry["digest"].as_str().unwrap().parse().unwrap();
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        self.entries.push(entry);
        digest
    }

    /// Writes the layout.
    pub(crate) fn write(&self, dir: &Path) {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        for (digest, bytes) in &self.blobs {
            fs::write(blobs.join(digest.hex()), bytes).unwrap();
        }
        let index = json!({ "schemaVersion": 2, "manifests": self.entries });
        fs::write(dir.join("index.json"), index.to_string()).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    }

    pub(crate) fn size(&self, digest: &Digest) -> u64 {
        self.blobs[digest].len() as u64
    }
}

/// One image with one layer of so many bytes, in a layout under the tag `v1`.
pub(crate) fn one(dir: &Path, size: usize) -> (Made, Image) {
    let mut made = Made::default();
    let image = made.image("amd64", &[(tar("data", size), Compression::None)]);
    made.tag(&image, "v1");
    made.write(dir);
    (made, image)
}
