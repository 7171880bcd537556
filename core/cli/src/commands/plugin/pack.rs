//! `vm plugin pack`: a plugin as an OCI artifact, in an image layout that other tools push to a registry.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vm_host::files::write_atomic;

use super::source;
use crate::{context::Context, errors::CliError};

const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.wasm.config.v0+json";
const COMPONENT: &str = "application/wasm";
/// In an annotation and not in a layer: most tools for components take artifacts of one layer.
const MANIFEST: &str = "vnd.vm.plugin.manifest.v1+toml";
const FILES: &str = "application/vnd.vm.plugin.files.v1.tar";
const TAG: &str = "org.opencontainers.image.ref.name";

/// Write a plugin into an OCI image layout, to be pushed to a registry
///
/// The same plugin gives the same digest, whenever and wherever. `skopeo copy oci:DIR:TAG docker://HOST/NAME:TAG` pushes it;
/// `vm plugin install oci-layout:DIR:TAG` installs it as it is.
#[derive(Debug, Args)]
pub(super) struct PackArgs {
    /// Its directory, or a project of `vm plugin new` that was built
    #[arg(value_name = "SOURCE")]
    source: String,
    /// The layout's directory: a new one, or one with other artifacts [default tag: the plugin's version]
    #[arg(value_name = "DIR[:TAG]")]
    layout: String,
}

impl PackArgs {
    pub(super) fn run(self, context: &Context) -> Result<u8, CliError> {
        if ["oci://", "oci-layout:", "bundled:"].iter().any(|form| self.source.starts_with(form)) {
            return Err(CliError::Usage {
                message: format!("{} is no directory", self.source),
                hint: "name the directory that has plugin.toml".to_owned(),
            });
        }
        let plugin = Plugin::read(Path::new(&source::resolve(&self.source, context.output)?))?;
        let (dir, tag) = split(&self.layout);
        let tag = tag.map_or_else(|| plugin.tag(), str::to_owned);
        check_tag(&tag)?;
        let layout = Layout::open(Path::new(dir))?;
        let digest = plugin.write(&layout, &tag)?;
        let document = json!({
            "name": plugin.about.name,
            "version": plugin.about.version,
            "layout": std::path::absolute(dir).unwrap_or_else(|_| dir.into()),
            "tag": tag,
            "digest": digest,
        });
        context.output.show(&document, || {
            if context.output.quiet {
                return digest.clone();
            }
            let (name, version) = (&plugin.about.name, &plugin.about.version);
            let place = format!("{dir}:{tag}");
            let place = shlex::try_quote(&place).map_or_else(|_| place.clone(), |quoted| quoted.into_owned());
            format!(
                "{name} {version} is {digest}\n\nNext:\n  skopeo copy oci:{place} docker://HOST/{name}:{tag}\n  \
                 vm plugin install oci://HOST/{name}:{tag}\n"
            )
        })?;
        Ok(0)
    }
}

/// `DIR` or `DIR:TAG`. A directory may have a colon in its name.
fn split(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((dir, tag)) if !tag.contains('/') && !dir.is_empty() && !Path::new(text).exists() => {
            (dir, Some(tag))
        }
        _ => (text, None),
    }
}

/// By the rules of registries. <https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md#pulling-manifests>
fn check_tag(tag: &str) -> Result<(), CliError> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let fits = (1..=128).contains(&tag.len())
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
        && tag.bytes().next().is_some_and(word);
    if fits {
        return Ok(());
    }
    Err(CliError::Usage {
        message: format!("{tag:?} is no tag"),
        hint: "up to 128 letters, digits, '_', '.' and '-', the first a letter, a digit or '_'".to_owned(),
    })
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    fs::read(path).map_err(|source| CliError::File { path: path.to_owned(), source })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    write_atomic(path, 0o644, bytes).map_err(|source| CliError::WriteFile { path: path.to_owned(), source })
}

/// What is packed.
struct Plugin {
    about: source::Manifest,
    toml: String,
    component: Vec<u8>,
    /// By their names.
    files: BTreeMap<String, Vec<u8>>,
}

impl Plugin {
    fn read(dir: &Path) -> Result<Self, CliError> {
        let about = source::manifest(dir)?;
        let path = dir.join(source::MANIFEST);
        let toml = fs::read_to_string(&path).map_err(|source| CliError::File { path, source })?;
        let component = read(&dir.join(&about.component))?;
        let files = dir.join("files");
        let mut found = BTreeMap::new();
        match fs::read_dir(&files) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(CliError::File { path: files, source }),
            Ok(entries) => {
                // The same that the daemon takes of a directory.
                for entry in
                    entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
                {
                    let Ok(name) = entry.file_name().into_string() else { continue };
                    if !name.starts_with('.') {
                        found.insert(name, read(&entry.path())?);
                    }
                }
            }
        }
        Ok(Self { about, toml, component, files: found })
    }

    /// Its version as a tag, which has no `+`.
    fn tag(&self) -> String {
        self.about.version.replace('+', "_")
    }

    /// Adds it to a layout; the digest of its manifest.
    fn write(&self, layout: &Layout, tag: &str) -> Result<String, CliError> {
        let component = layout.blob(COMPONENT, &self.component)?;
        // Nothing of the day or the machine: what is the same has the same digest.
        let config = json!({
            "created": "1970-01-01T00:00:00Z",
            "architecture": "wasm",
            "os": "wasip2",
            "layerDigests": [component["digest"]],
        });
        let config = layout.blob(CONFIG, config.to_string().as_bytes())?;
        let mut layers = vec![component];
        if !self.files.is_empty() {
            layers.push(layout.blob(FILES, &self.tar()?)?);
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": IMAGE,
            "artifactType": CONFIG,
            "config": config,
            "layers": layers,
            "annotations": {
                "org.opencontainers.image.title": self.about.name,
                "org.opencontainers.image.version": self.about.version,
                MANIFEST: self.toml,
            },
        });
        let mut entry = layout.blob(IMAGE, manifest.to_string().as_bytes())?;
        let digest = entry["digest"].as_str().unwrap_or_default().to_owned();
        entry["annotations"] = json!({ TAG: tag });
        layout.enter(tag, entry)?;
        Ok(digest)
    }

    fn tar(&self) -> Result<Vec<u8>, CliError> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut add = || {
            for (name, content) in &self.files {
                let mut header = tar::Header::new_ustar();
                header.set_size(content.len() as u64);
                header.set_mode(0o644);
                tar.append_data(&mut header, name, content.as_slice())?;
            }
            tar.finish()
        };
        add().map_err(|source| CliError::File { path: "files".into(), source })?;
        tar.into_inner().map_err(|source| CliError::File { path: "files".into(), source })
    }
}

/// An image layout. <https://github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md>
struct Layout {
    dir: PathBuf,
    index: Value,
}

impl Layout {
    /// One that is there, or a new one in a directory that is empty or not there.
    fn open(dir: &Path) -> Result<Self, CliError> {
        let (marker, index) = (dir.join("oci-layout"), dir.join("index.json"));
        let failed = |path: &Path, source| CliError::WriteFile { path: path.to_owned(), source };
        let other = |what: &str| CliError::Usage {
            message: format!("{} {what}", dir.display()),
            hint: "name a directory that is not there yet, or an OCI image layout".to_owned(),
        };
        let blobs = dir.join("blobs/sha256");
        if marker.exists() {
            let index: Value = serde_json::from_slice(&read(&index)?)
                .map_err(|error| other(&format!("has a damaged index.json: {error}")))?;
            if !index["manifests"].is_array() {
                return Err(other("has an index.json without manifests"));
            }
            fs::create_dir_all(&blobs).map_err(|source| failed(&blobs, source))?;
            return Ok(Self { dir: dir.to_owned(), index });
        }
        match fs::read_dir(dir).map(|mut entries| entries.next().is_some()) {
            Ok(true) => return Err(other("is there, and no image layout")),
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(failed(dir, source)),
            _ => {}
        }
        fs::create_dir_all(&blobs).map_err(|source| failed(&blobs, source))?;
        write(&marker, json!({ "imageLayoutVersion": "1.0.0" }).to_string().as_bytes())?;
        let empty = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [] });
        Ok(Self { dir: dir.to_owned(), index: empty })
    }

    /// Adds content; its descriptor.
    fn blob(&self, media_type: &str, bytes: &[u8]) -> Result<Value, CliError> {
        let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        write(&self.dir.join("blobs/sha256").join(&hex), bytes)?;
        Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len() }))
    }

    /// Gives an artifact its tag, which another may have had.
    fn enter(&self, tag: &str, entry: Value) -> Result<(), CliError> {
        let mut index = self.index.clone();
        if let Some(manifests) = index["manifests"].as_array_mut() {
            manifests.retain(|other| other["annotations"][TAG] != tag);
            manifests.push(entry);
        }
        write(&self.dir.join("index.json"), index.to_string().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOML: &str = "name = \"greet\"\nversion = \"0.1.0+dev\"\ncomponent = \"greet.wasm\"\n";

    fn plugin(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("plugin.toml"), TOML).unwrap();
        fs::write(dir.path().join("greet.wasm"), "component").unwrap();
        fs::create_dir(dir.path().join("files")).unwrap();
        for name in files {
            fs::write(dir.path().join("files").join(name), name).unwrap();
        }
        dir
    }

    fn pack(plugin: &tempfile::TempDir, layout: &Path, tag: &str) -> String {
        let plugin = Plugin::read(plugin.path()).unwrap();
        plugin.write(&Layout::open(layout).unwrap(), tag).unwrap()
    }

    fn json(path: &Path) -> Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn the_same_plugin_has_the_same_digest_and_one_layer() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        let digest = pack(&plugin(&[]), &one, "a");
        assert_eq!(digest, pack(&plugin(&[]), &two, "b"));
        let manifest = json(&one.join("blobs/sha256").join(&digest["sha256:".len()..]));
        assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
        assert_eq!(manifest["annotations"]["vnd.vm.plugin.manifest.v1+toml"], TOML);
        let with_files = pack(&plugin(&["b", "a"]), &one, "f");
        assert_eq!(with_files, pack(&plugin(&["a", ".hidden", "b"]), &two, "f"));
        assert_ne!(with_files, digest);
        assert_eq!(Plugin::read(plugin(&[]).path()).unwrap().tag(), "0.1.0_dev");
    }

    #[test]
    fn a_tag_moves_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        let first = pack(&plugin(&[]), &layout, "1");
        pack(&plugin(&[]), &layout, "latest");
        let second = pack(&plugin(&["a"]), &layout, "latest");
        let index = json(&layout.join("index.json"));
        let entries: Vec<_> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| (entry["annotations"][TAG].as_str().unwrap(), entry["digest"].as_str().unwrap()))
            .collect();
        assert_eq!(entries, [("1", first.as_str()), ("latest", second.as_str())]);
    }

    #[test]
    fn nobodys_directory_is_written_to() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.txt"), "").unwrap();
        let error = Layout::open(dir.path()).map(drop).unwrap_err();
        assert!(error.to_string().contains("no image layout"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        for tag in ["", "-a", "a b", "a/b", "ä", &"a".repeat(129)] {
            assert!(check_tag(tag).is_err(), "{tag}");
        }
        assert!(check_tag("_v1.0-rc.1").is_ok());
    }
}
