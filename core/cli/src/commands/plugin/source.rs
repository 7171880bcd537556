//! Where a plugin comes from, as the daemon can find it: another process with another working directory.
//!
//! A directory of a Rust project is taken as it is after `cargo build`: the manifest is beside the sources, the component below
//! `target`. What the daemon is given is then a directory with both, made below `target` too.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::Deserialize;

use crate::{commands::image::absolute, errors::CliError, output::Output};

/// The manifest's file.
pub(super) const MANIFEST: &str = "plugin.toml";
/// Targets that components are built for, the usual one first.
const TARGETS: [&str; 3] = ["wasm32-unknown-unknown", "wasm32-wasip2", "wasm32-wasip1"];
/// The command that builds one.
const BUILD: &str = "cargo build --release --target wasm32-unknown-unknown";

/// What is needed of the manifest here; the daemon judges all of it.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) name: String,
    #[serde(default)]
    pub(super) version: String,
    #[serde(default = "component")]
    pub(super) component: String,
}

fn component() -> String {
    "plugin.wasm".to_owned()
}

/// A source as the daemon takes it; `output` is told what its user may have forgotten.
pub(super) fn resolve(text: &str, output: Output) -> Result<String, CliError> {
    if text.starts_with("oci://") || text.starts_with("bundled:") {
        return Ok(text.to_owned());
    }
    if let Some(layout) = text.strip_prefix("oci-layout:") {
        return oci_layout(layout);
    }
    let path = absolute(Path::new(text))?;
    let dir = if path.is_dir() { path } else { directory_of(&path)? };
    let ready = prepare(&dir, output)?;
    ready.into_os_string().into_string().map_err(|path| CliError::Usage {
        message: format!("{} is no UTF-8", path.display()),
        hint: "move the plugin to a directory with a plain name".to_owned(),
    })
}

/// `DIR` or `DIR:TAG`, either with `@DIGEST`, the directory made absolute.
fn oci_layout(text: &str) -> Result<String, CliError> {
    let (text, digest) = match text.rsplit_once('@') {
        Some((place, digest)) if digest.starts_with("sha256:") && !digest.contains('/') => {
            (place, format!("@{digest}"))
        }
        _ => (text, String::new()),
    };
    let (dir, tag) = match text.rsplit_once(':') {
        Some((dir, tag)) if !Path::new(text).exists() && !tag.contains('/') => (dir, Some(tag)),
        _ => (text, None),
    };
    let dir = absolute(Path::new(dir))?;
    let tag = tag.map(|tag| format!(":{tag}")).unwrap_or_default();
    Ok(format!("oci-layout:{}{tag}{digest}", dir.display()))
}

/// The directory of a file that is named in its place: the manifest, or the component beside it.
fn directory_of(file: &Path) -> Result<PathBuf, CliError> {
    let dir = file.parent().unwrap_or(Path::new("/"));
    let is_manifest = file.file_name().is_some_and(|name| name == MANIFEST);
    let is_component = file.extension().is_some_and(|extension| extension == "wasm");
    if is_manifest
        || (is_component && manifest(dir).is_ok_and(|manifest| dir.join(manifest.component) == file))
    {
        return Ok(dir.to_owned());
    }
    let hint = if is_component {
        format!(
            "a plugin is a directory with {MANIFEST} and the component that it names; `vm plugin new` begins one"
        )
    } else {
        format!("name the directory that has {MANIFEST}, or oci://HOST/NAME:TAG, or oci-layout:DIR")
    };
    Err(CliError::Usage { message: format!("{} is no plugin", file.display()), hint })
}

/// The manifest in a directory.
pub(super) fn manifest(dir: &Path) -> Result<Manifest, CliError> {
    let path = dir.join(MANIFEST);
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(CliError::Usage {
                message: format!("{} has no {MANIFEST}", dir.display()),
                hint:
                    "a plugin is a directory with a manifest and a component; `vm plugin new NAME` begins one"
                        .to_owned(),
            });
        }
        read => read.map_err(|source| CliError::File { path: path.clone(), source })?,
    };
    let wrong = |reason: String| CliError::Usage {
        message: format!("{}: {reason}", path.display()),
        hint: "docs/plugins.md has all keys of a manifest".to_owned(),
    };
    let manifest: Manifest = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let plain = |text: &str| !text.is_empty() && !text.contains('/') && text != "." && text != "..";
    for (key, value) in [("name", &manifest.name), ("component", &manifest.component)] {
        if !plain(value) {
            return Err(wrong(format!("{key} = {value:?} is no plain name")));
        }
    }
    Ok(manifest)
}

/// The directory that holds manifest and component: this one, or one that is made of a project that was built.
fn prepare(dir: &Path, output: Output) -> Result<PathBuf, CliError> {
    let Manifest { name, component, .. } = manifest(dir)?;
    // Whatever else is wrong with it, the daemon tells.
    if dir.join(&component).exists() || !dir.join("Cargo.toml").exists() {
        return Ok(dir.to_owned());
    }
    let targets = target_directories(dir);
    let built = targets.iter().find_map(|target| {
        let of = |triple: &&str| target.join(triple).join("release").join(&component);
        TARGETS.iter().map(of).find(|path| path.is_file()).map(|path| (target, path))
    });
    let Some((target, built)) = built else {
        return Err(CliError::Usage {
            message: format!("{} is not built: {component} is nowhere below target", dir.display()),
            hint: format!("in {}: {BUILD}", dir.display()),
        });
    };
    if is_older(&built, dir) {
        output.warn(&format!("the sources are newer than {}; to build them: {BUILD}", built.display()));
    }
    let ready = target.join("vm-plugin").join(name);
    let files = dir.join("files");
    let write = |path: &Path| {
        let path = path.to_owned();
        move |source| CliError::WriteFile { path, source }
    };
    if ready.exists() {
        fs::remove_dir_all(&ready).map_err(write(&ready))?;
    }
    fs::create_dir_all(&ready).map_err(write(&ready))?;
    copy(&dir.join(MANIFEST), &ready.join(MANIFEST))?;
    copy(&built, &ready.join(&component))?;
    if files.is_dir() {
        let into = ready.join("files");
        fs::create_dir(&into).map_err(write(&into))?;
        let entries =
            fs::read_dir(&files).map_err(|source| CliError::File { path: files.clone(), source })?;
        for entry in entries.flatten().filter(|entry| entry.path().is_file()) {
            copy(&entry.path(), &into.join(entry.file_name()))?;
        }
    }
    Ok(ready)
}

fn copy(from: &Path, to: &Path) -> Result<(), CliError> {
    let copied = fs::copy(from, to);
    copied.map(drop).map_err(|source| CliError::WriteFile { path: to.to_owned(), source })
}

/// Where cargo puts what it builds of a package: the user's own directory, else that of the package or of a workspace above it.
fn target_directories(dir: &Path) -> Vec<PathBuf> {
    let own = env::var_os("CARGO_TARGET_DIR").map(|target| dir.join(target));
    let above = dir.ancestors().filter(|above| above.join("Cargo.toml").exists());
    own.into_iter().chain(above.map(|above| above.join("target"))).collect()
}

/// Whether a source of the project was changed after the component was built.
fn is_older(built: &Path, dir: &Path) -> bool {
    let changed = |path: &Path| path.metadata().and_then(|about| about.modified()).ok();
    let sources = newest(&dir.join("src")).into_iter().chain(changed(&dir.join("Cargo.toml"))).max();
    matches!((changed(built), sources), (Some(built), Some(sources)) if built < sources)
}

/// When the newest file below a directory was changed.
fn newest(dir: &Path) -> Option<SystemTime> {
    let entries = fs::read_dir(dir).ok()?;
    entries
        .flatten()
        .filter_map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => newest(&entry.path()),
            Ok(kind) if kind.is_file() => entry.metadata().and_then(|about| about.modified()).ok(),
            _ => None,
        })
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: Output = Output { json: false, quiet: true };

    fn project() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("src")).unwrap();
        fs::write(dir.path().join("Cargo.toml"), "").unwrap();
        fs::write(dir.path().join(MANIFEST), "name = \"my-one\"\ncomponent = \"my_one.wasm\"\n").unwrap();
        dir
    }

    fn of(path: &Path) -> Result<String, CliError> {
        resolve(path.to_str().unwrap(), QUIET)
    }

    #[test]
    fn a_project_that_was_built_becomes_a_directory_with_manifest_and_component() {
        let dir = project();
        let error = of(dir.path()).unwrap_err();
        assert!(error.to_string().contains("is not built") && error.hint().unwrap().ends_with(BUILD));

        let release = dir.path().join("target/wasm32-unknown-unknown/release");
        fs::create_dir_all(&release).unwrap();
        for content in ["one", "two"] {
            fs::write(release.join("my_one.wasm"), content).unwrap();
            let ready = PathBuf::from(of(&dir.path().join(MANIFEST)).unwrap());
            assert!(ready.is_absolute() && ready.ends_with("target/vm-plugin/my-one"), "{ready:?}");
            assert_eq!(fs::read_to_string(ready.join("my_one.wasm")).unwrap(), content);
            assert!(ready.join(MANIFEST).exists());
        }
    }

    #[test]
    fn a_member_of_a_workspace_is_built_above_it() {
        let workspace = project();
        let release = workspace.path().join("target/wasm32-wasip2/release");
        fs::create_dir_all(&release).unwrap();
        fs::write(release.join("member.wasm"), "m").unwrap();
        let member = workspace.path().join("member");
        fs::create_dir(&member).unwrap();
        fs::write(member.join("Cargo.toml"), "").unwrap();
        fs::write(member.join(MANIFEST), "name = \"member\"\ncomponent = \"member.wasm\"\n").unwrap();
        let ready = of(&member).unwrap();
        assert!(ready.ends_with("target/vm-plugin/member") && !ready.contains("member/target"), "{ready}");
    }

    #[test]
    fn a_directory_that_is_complete_is_taken_as_it_is() {
        let dir = project();
        fs::write(dir.path().join("my_one.wasm"), "w").unwrap();
        let expected = dir.path().canonicalize().unwrap();
        for named in [dir.path().to_owned(), dir.path().join(MANIFEST), dir.path().join("my_one.wasm")] {
            assert_eq!(Path::new(&of(&named).unwrap()), expected);
        }
    }

    #[test]
    fn what_is_no_plugin_is_told_with_what_would_be() {
        let dir = tempfile::tempdir().unwrap();
        assert!(of(dir.path()).unwrap_err().to_string().contains("no plugin.toml"));
        let wasm = dir.path().join("a.wasm");
        fs::write(&wasm, "").unwrap();
        assert!(of(&wasm).unwrap_err().hint().unwrap().contains("plugin.toml"));
        fs::write(dir.path().join(MANIFEST), "name = \"../up\"").unwrap();
        assert!(of(dir.path()).unwrap_err().to_string().contains("no plain name"));
        fs::write(dir.path().join(MANIFEST), "name = ").unwrap();
        assert!(of(dir.path()).unwrap_err().to_string().contains(MANIFEST));
        assert!(matches!(of(&dir.path().join("gone")), Err(CliError::File { .. })));
    }

    #[test]
    fn a_registry_is_left_to_the_daemon_and_a_layout_found_for_it() {
        let of = |text: &str| resolve(text, QUIET);
        for text in ["oci://registry.example/a:1", "bundled:limits"] {
            assert_eq!(of(text).unwrap(), text);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let expected = format!("oci-layout:{}", path.display());
        assert_eq!(of(&format!("oci-layout:{}/.", path.display())).unwrap(), expected);
        assert_eq!(of(&format!("oci-layout:{}:v1", path.display())).unwrap(), format!("{expected}:v1"));
        let pinned = format!("{expected}:v1@sha256:{}", "0".repeat(64));
        assert_eq!(of(&pinned).unwrap(), pinned);
        assert!(of("oci-layout:/no/such:v1").is_err());
    }

    #[test]
    fn sources_that_changed_after_the_build_are_noticed() {
        let dir = project();
        let built = dir.path().join("built");
        let set = |path: &Path, seconds| {
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            let file = fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
            file.set_modified(at).unwrap();
        };
        set(&dir.path().join("Cargo.toml"), 10);
        set(&dir.path().join("src/lib.rs"), 20);
        set(&built, 20);
        assert!(!is_older(&built, dir.path()));
        set(&built, 15);
        assert!(is_older(&built, dir.path()));
    }
}
