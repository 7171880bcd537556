//! A plugin's files: read from where they come from, placed whole where the daemon keeps them, compared with what was recorded.
//!
//! Below the daemon's directory of a plugin there is one directory for each content it was installed with, named by that content, and
//! `files`, the operator's. Both have the plugin's blobs; the operator's file comes before one of the same name that came with it.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use vm_api::PluginSignature;
use vm_host::files;
use vm_plugin::{MAX_COMPONENT, Manifest};

use super::PluginsError;

pub(crate) const MANIFEST: &str = "plugin.toml";
/// Directory of blobs, beside the manifest and in the operator's place.
pub(crate) const FILES: &str = "files";
pub(crate) const MAX_MANIFEST: u64 = 1 << 20;
pub(crate) const MAX_FILES: usize = 64;
pub(crate) const MAX_FILE_BYTES: u64 = 64 << 20;

/// Where Cargo leaves a component; so the directory that a plugin is developed in can be installed as it is.
const BUILT: &str = "target/wasm32-unknown-unknown/release";

/// `sha256:` and 64 digits.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A plugin that is not installed yet.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) manifest: Manifest,
    /// Where it came from, for people.
    pub(crate) source: String,
    pub(crate) signature: PluginSignature,
    /// By its name as installed.
    files: BTreeMap<String, Vec<u8>>,
}

impl Package {
    /// Reads a directory, given by its path or by that of the manifest in it.
    pub(crate) fn read(path: &Path) -> Result<Self, PluginsError> {
        let dir = if path.ends_with(MANIFEST) { path.parent().unwrap_or(path) } else { path };
        let source = dir.display().to_string();
        let manifest_path = dir.join(MANIFEST);
        let manifest = limited(&manifest_path, MAX_MANIFEST)?;
        let parsed = parse(&manifest_path, &manifest)?;
        let beside = dir.join(&parsed.component);
        let built = dir.join(BUILT).join(&parsed.component);
        let wasm = if !beside.exists() && built.exists() { built } else { beside };
        let component = limited(&wasm, MAX_COMPONENT)?;
        let mut files = BTreeMap::new();
        for (name, path) in blobs(&dir.join(FILES))? {
            files.insert(name, limited(&path, MAX_FILE_BYTES)?);
        }
        Ok(Self::whole(source, parsed, manifest, component, files))
    }

    /// A package of contents that somebody has read: the manifest, the component, and blobs by their plain names.
    pub(crate) fn of(
        source: String,
        manifest: Vec<u8>,
        component: Vec<u8>,
        blobs: BTreeMap<String, Vec<u8>>,
    ) -> Result<Self, PluginsError> {
        let parsed = parse(&Path::new(&source).join(MANIFEST), &manifest)?;
        Ok(Self::whole(source, parsed, manifest, component, blobs))
    }

    fn whole(
        source: String,
        parsed: Manifest,
        manifest: Vec<u8>,
        component: Vec<u8>,
        blobs: BTreeMap<String, Vec<u8>>,
    ) -> Self {
        let mut files: BTreeMap<_, _> =
            [(MANIFEST.to_owned(), manifest), (parsed.component.clone(), component)].into();
        files.extend(blobs.into_iter().map(|(name, content)| (format!("{FILES}/{name}"), content)));
        Self { manifest: parsed, source, signature: PluginSignature::Unsigned, files }
    }

    /// The same with what is known of its signatures.
    pub(crate) fn signed(self, signature: PluginSignature) -> Self {
        Self { signature, ..self }
    }

    pub(crate) fn component(&self) -> &[u8] {
        self.files.get(&self.manifest.component).map(Vec::as_slice).unwrap_or_default()
    }

    pub(crate) fn manifest_digest(&self) -> String {
        digest(self.files.get(MANIFEST).map(Vec::as_slice).unwrap_or_default())
    }

    /// Every file's.
    pub(crate) fn digests(&self) -> BTreeMap<String, String> {
        self.files.iter().map(|(name, content)| (name.clone(), digest(content))).collect()
    }

    /// Places the files below `home`, whole or not at all; those that are there already are written anew if they are not as they
    /// should be.
    pub(crate) fn place(&self, home: &Path) -> Result<PathBuf, PluginsError> {
        let digests = self.digests();
        let dir = home.join(directory(&digests));
        if compare(&dir, &digests).iter().all(|(_, found)| matches!(found, Found::Same)) {
            return Ok(dir);
        }
        let scratch = home.join(format!("new-{}", std::process::id()));
        let write = |path: &Path, done: io::Result<()>| {
            done.map_err(|source| PluginsError::Write { path: path.to_owned(), source })
        };
        let fill = || {
            remove_dir(&scratch)?;
            write(&scratch, make_dir(&scratch.join(FILES)))?;
            for (name, content) in &self.files {
                let path = scratch.join(name);
                write(&path, files::write_atomic(&path, 0o600, content))?;
            }
            remove_dir(&dir)?;
            write(&dir, fs::rename(&scratch, &dir))?;
            write(home, fs::File::open(home).and_then(|home| home.sync_all()))
        };
        let done = fill();
        if done.is_err() {
            // What is left is removed when the daemon starts.
            let _ = remove_dir(&scratch);
        }
        done.map(|()| dir)
    }
}

/// Directories of the plugins are the daemon's alone: what is in them is run, and what they are configured with may be secret.
pub(crate) fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

pub(crate) fn remove_dir(path: &Path) -> Result<(), PluginsError> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(PluginsError::Write { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn limited(path: &Path, most: u64) -> Result<Vec<u8>, PluginsError> {
    let failed = |source| PluginsError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    io::Read::read_to_end(&mut io::Read::take(file, most + 1), &mut bytes).map_err(failed)?;
    if bytes.len() as u64 > most {
        return Err(PluginsError::Large { what: format!("{} MiB: {}", most >> 20, path.display()) });
    }
    Ok(bytes)
}

/// The manifest in a directory.
pub(crate) fn manifest(dir: &Path) -> Result<Manifest, PluginsError> {
    let path = dir.join(MANIFEST);
    parse(&path, &limited(&path, MAX_MANIFEST)?)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Manifest, PluginsError> {
    let text = std::str::from_utf8(bytes).map_err(|error| PluginsError::Read {
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })?;
    text.parse().map_err(|source| PluginsError::Manifest { path: path.to_owned(), source })
}

/// The component of an installed plugin.
pub(crate) fn component(dir: &Path, manifest: &Manifest) -> Result<Vec<u8>, PluginsError> {
    limited(&dir.join(&manifest.component), MAX_COMPONENT)
}

/// The files of a blobs' directory by name: those with plain names, no links, nothing hidden. None where there is no directory.
pub(crate) fn blobs(dir: &Path) -> Result<BTreeMap<String, PathBuf>, PluginsError> {
    let failed = |source| PluginsError::Read { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if entry.file_type().map_err(failed)?.is_file() && !name.starts_with('.') {
            found.insert(name, entry.path());
        }
    }
    if found.len() > MAX_FILES {
        return Err(PluginsError::Large { what: format!("{MAX_FILES}, in {}", dir.display()) });
    }
    Ok(found)
}

/// Name of the directory of this content.
pub(crate) fn directory(digests: &BTreeMap<String, String>) -> String {
    let mut hash = Sha256::new();
    for (name, digest) in digests {
        hash.update(name.as_bytes());
        hash.update([0]);
        hash.update(digest.as_bytes());
        hash.update([0]);
    }
    hex(&hash.finalize()[..8])
}

/// What became of an installed file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    Same,
    /// Its digest now.
    Other(String),
    Unreadable(String),
}

/// The installed files as they are now.
pub(crate) fn compare(dir: &Path, digests: &BTreeMap<String, String>) -> Vec<(String, Found)> {
    let look = |(name, expected): (&String, &String)| {
        let found = match limited(&dir.join(name), MAX_COMPONENT.max(MAX_FILE_BYTES)) {
            Ok(bytes) if digest(&bytes) == *expected => Found::Same,
            Ok(bytes) => Found::Other(digest(&bytes)),
            Err(error) => Found::Unreadable(vm_types::report::chain(&error)),
        };
        (name.clone(), found)
    };
    digests.iter().map(look).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOML: &str = "name = \"a\"\nversion = \"0.1.0\"\nworld = \"capability\"\nwit = \"0.1.0\"\n";

    fn source(dir: &Path) -> PathBuf {
        let dir = dir.join("source");
        fs::create_dir_all(dir.join(FILES)).unwrap();
        fs::write(dir.join(MANIFEST), TOML).unwrap();
        fs::write(dir.join("plugin.wasm"), b"component").unwrap();
        fs::write(dir.join(FILES).join("key.pem"), b"key").unwrap();
        dir
    }

    #[test]
    fn a_plugin_is_placed_whole_and_mended() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        make_dir(&home).unwrap();
        let package = Package::read(&source(dir.path()).join(MANIFEST)).unwrap();
        let placed = package.place(&home).unwrap();
        assert_eq!(fs::read(placed.join("files/key.pem")).unwrap(), b"key");
        let recorded = package.digests();
        fs::write(placed.join("plugin.wasm"), b"somebody else's").unwrap();
        fs::remove_file(placed.join(MANIFEST)).unwrap();
        let found: BTreeMap<_, _> = compare(&placed, &recorded).into_iter().collect();
        assert_eq!(found["plugin.wasm"], Found::Other(digest(b"somebody else's")));
        assert!(matches!(found[MANIFEST], Found::Unreadable(_)));
        assert_eq!(found["files/key.pem"], Found::Same);
        assert_eq!(package.place(&home).unwrap(), placed);
        assert!(compare(&placed, &recorded).iter().all(|(_, found)| *found == Found::Same));
        assert_eq!(fs::read_dir(&home).unwrap().count(), 1, "nothing half made is left");
    }

    #[test]
    fn a_component_is_found_where_cargo_leaves_it() {
        let dir = tempfile::tempdir().unwrap();
        let source = source(dir.path());
        fs::create_dir_all(source.join(BUILT)).unwrap();
        fs::rename(source.join("plugin.wasm"), source.join(BUILT).join("plugin.wasm")).unwrap();
        assert_eq!(Package::read(&source).unwrap().component(), b"component");
        fs::remove_file(source.join(BUILT).join("plugin.wasm")).unwrap();
        let error = Package::read(&source).unwrap_err();
        assert!(error.hint().unwrap().contains("build it first"), "{error}");
    }

    #[test]
    fn links_and_hidden_files_are_no_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let source = source(dir.path());
        std::os::unix::fs::symlink("/etc/passwd", source.join(FILES).join("passwd")).unwrap();
        fs::write(source.join(FILES).join(".hidden"), b"").unwrap();
        let names: Vec<_> = blobs(&source.join(FILES)).unwrap().into_keys().collect();
        assert_eq!(names, ["key.pem"]);
        assert!(!Package::read(&source).unwrap().digests().contains_key("files/passwd"));
    }
}
