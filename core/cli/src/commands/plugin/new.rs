//! `vm plugin new`: a project that builds, tests and can be installed, with all it needs in it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use serde_json::json;

use crate::{context::Context, errors::CliError};

/// The SDK's files by their paths within it.
const SDK: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/sdk.rs"));

/// Files of every project.
const COMMON: [(&str, &str); 4] = [
    ("Cargo.toml", include_str!("../../../templates/common/Cargo.toml")),
    (".cargo/config.toml", include_str!("../../../templates/common/cargo/config.toml")),
    (".gitignore", include_str!("../../../templates/common/gitignore")),
    ("README.md", include_str!("../../../templates/common/README.md")),
];

/// Begin a plugin: a Rust project that builds with one command
///
/// The SDK comes with it, in vendor/. Rust 1.95 or later with the target wasm32-unknown-unknown builds it.
#[derive(Debug, Args)]
pub(super) struct NewArgs {
    /// Its name: 1 to 40 of a-z, 0-9 and '-'
    name: String,
    /// What it is for
    #[arg(long, value_name = "WORLD", default_value = "capability")]
    world: World,
    /// Directory to make [default: the name]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// `--world`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum World {
    /// Decides what happens around VMs
    Capability,
    /// Answers questions of the name service
    Dns,
    /// Brings repositories into guests
    WorkspaceImporter,
}

/// What differs between the worlds.
struct Template {
    manifest: &'static str,
    source: &'static str,
    description: &'static str,
    about: &'static str,
    tried: &'static str,
}

impl World {
    fn template(self) -> Template {
        match self {
            Self::Capability => Template {
                manifest: include_str!("../../../templates/capability/plugin.toml"),
                source: include_str!("../../../templates/capability/lib.rs"),
                description: "Greets guests, and refuses VMs with too many CPUs",
                about: "A plugin for vmd. It sets the variable GREETING in guests and can limit the CPUs of VMs.",
                tried: "Then see it work:\n\n```sh\nvm plan create trial\nvm run -- sh -c 'echo $GREETING'\n\
                        vm plugin configure {{name}} greeting=welcome max-cpus=4\nvm plugin logs {{name}}\n```",
            },
            Self::Dns => Template {
                manifest: include_str!("../../../templates/dns/plugin.toml"),
                source: include_str!("../../../templates/dns/lib.rs"),
                description: "Names of VMs in a zone",
                about: "A plugin for vmd. It answers questions for names of VMs: the addresses of VM `dev` for `dev.lab`.",
                tried: "Then, in a VM or on the host, ask the name server on the bridge for `NAME.lab`.",
            },
            Self::WorkspaceImporter => Template {
                manifest: include_str!("../../../templates/importer/plugin.toml"),
                source: include_str!("../../../templates/importer/lib.rs"),
                description: "Brings the files of a repository into a guest",
                about: "A plugin for vmd. It brings a repository's files, as they are, into a guest.",
                tried: "Then see what it offers for a repository, and have it bring one into a VM that runs:\n\n```sh\n\
                        vm workspace plan ./repository\n\
                        vm workspace prepare VM ./repository --importer {{name}}\nvm plugin logs {{name}}\n```",
            },
        }
    }
}

impl NewArgs {
    pub(super) fn run(self, context: &Context) -> Result<u8, CliError> {
        check_name(&self.name)?;
        let dir = self.dir.unwrap_or_else(|| PathBuf::from(&self.name));
        let files = project(&self.name, self.world);
        write_all(&dir, &files)?;
        let vendored = files.iter().filter(|(path, _)| path.starts_with("vendor")).count();
        let document = json!({
            "name": self.name,
            "dir": std::path::absolute(&dir).unwrap_or_else(|_| dir.clone()),
            "files": files.iter().map(|(path, _)| path).collect::<Vec<_>>(),
        });
        context.output.show(&document, || {
            if context.output.quiet {
                return dir.display().to_string();
            }
            let own = files.iter().filter(|(path, _)| !path.starts_with("vendor"));
            let own: String = own.map(|(path, _)| format!("  {}\n", dir.join(path).display())).collect();
            let vendor = dir.join("vendor/vm-plugin-sdk");
            let quoted = dir.to_string_lossy();
            let cd = shlex::try_quote(&quoted).unwrap_or(std::borrow::Cow::Borrowed(&quoted));
            format!(
                "{own}  {} ({vendored} files)\n\nNext:\n  cd {cd}\n  cargo build --release --target \
                 wasm32-unknown-unknown\n  vm plugin test .\n  vm plugin install .\n",
                vendor.display()
            )
        })?;
        Ok(0)
    }
}

fn check_name(name: &str) -> Result<(), CliError> {
    let fits = (1..=40).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    // The name is also that of a crate, and of a type.
    let of_crate = name.starts_with(|first: char| first.is_ascii_lowercase());
    let reason = match (fits, of_crate) {
        (true, true) if !RESERVED.contains(&name) => return Ok(()),
        (true, true) => "it means something else to cargo",
        (true, false) => "a crate's name begins with a letter",
        (false, _) => {
            "1 to 40 of a-z, 0-9 and '-', beginning with a letter and ending with a letter or digit"
        }
    };
    Err(CliError::Usage {
        message: format!("{name:?} is no name for a plugin's project: {reason}"),
        hint: "for example: vm plugin new cpu-limit".to_owned(),
    })
}

/// Names that the crate cannot have: its own dependencies, Rust's keywords that are words, and cargo's own directories.
const RESERVED: [&str; 52] = [
    "alloc",
    "as",
    "async",
    "await",
    "box",
    "break",
    "build",
    "const",
    "continue",
    "core",
    "crate",
    "deps",
    "do",
    "dyn",
    "else",
    "enum",
    "examples",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "incremental",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "proc-macro",
    "pub",
    "ref",
    "return",
    "self",
    "serde",
    "static",
    "std",
    "struct",
    "super",
    "test",
    "trait",
    "true",
    "type",
    "use",
    "vm-plugin-sdk",
    "where",
    "while",
];

/// All files of a project, by their paths in it.
fn project(name: &str, world: World) -> Vec<(String, String)> {
    let template = world.template();
    let crate_name = name.replace('-', "_");
    let type_name = type_name(name);
    let fill = |text: &str| {
        // First what has names in it itself.
        text.replace("{{try}}", template.tried)
            .replace("{{about}}", template.about)
            .replace("{{description}}", template.description)
            .replace("{{vm_version}}", env!("CARGO_PKG_VERSION"))
            .replace("{{name}}", name)
            .replace("{{crate}}", &crate_name)
            .replace("{{Type}}", &type_name)
    };
    let own = [("plugin.toml", template.manifest), ("src/lib.rs", template.source)];
    let mut files: Vec<_> =
        own.into_iter().chain(COMMON).map(|(path, text)| (path.to_owned(), fill(text))).collect();
    for (path, text) in SDK {
        if *path == "Cargo.lock" {
            files.push((path.to_string(), lock(text, name)));
        } else {
            files.push((format!("vendor/vm-plugin-sdk/{path}"), text.to_string()));
        }
    }
    files.sort();
    files
}

/// The SDK's lock file with the project in it: what is known to build is what is built, today and later.
fn lock(sdk: &str, name: &str) -> String {
    const ENTRY: &str = "[[package]]\n";
    let (head, packages) = sdk.split_once(ENTRY).unwrap_or((sdk, ""));
    let own = format!(
        "name = {name:?}\nversion = \"0.1.0\"\ndependencies = [\n \"serde\",\n \"vm-plugin-sdk\",\n]"
    );
    let mut packages: Vec<_> = packages.split(ENTRY).map(str::trim_end).chain([own.as_str()]).collect();
    // As cargo has them: by name; those of one name stay in their order.
    packages.sort_by_key(|package| {
        package.lines().next().unwrap_or_default().trim_start_matches("name = ").to_owned()
    });
    let packages: Vec<_> = packages.iter().map(|package| format!("{ENTRY}{package}\n")).collect();
    format!("{head}{}", packages.join("\n"))
}

/// `cpu-limit` as `CpuLimit`; one that the SDK has already, or Rust, gets a word more.
fn type_name(name: &str) -> String {
    let mut words = name.split('-').filter(|word| !word.is_empty()).map(|word| {
        let (first, rest) = word.split_at(1);
        first.to_ascii_uppercase() + rest
    });
    words.by_ref().collect::<String>() + "Plugin"
}

/// Makes the directory with its files; one that is there is refused, and one that cannot be made whole is removed.
fn write_all(dir: &Path, files: &[(String, String)]) -> Result<(), CliError> {
    match dir.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Ok(_) => {
            return Err(CliError::Usage {
                message: format!("{} is there already", dir.display()),
                hint: "choose another directory: --dir".to_owned(),
            });
        }
        Err(source) => return Err(CliError::WriteFile { path: dir.to_owned(), source }),
    }
    let write = || {
        for (path, text) in files {
            let path = dir.join(path);
            let written = match path.parent() {
                Some(parent) => fs::create_dir_all(parent).and_then(|()| fs::write(&path, text)),
                None => fs::write(&path, text),
            };
            written.map_err(|source| CliError::WriteFile { path, source })?;
        }
        Ok(())
    };
    let written = write();
    if written.is_err() {
        // It was not there before; what remains of it if this fails too, is told by the error.
        let _ = fs::remove_dir_all(dir);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_plugins_and_crates_too() {
        for name in ["a", "cpu-limit", "x9", "a--b", &"a".repeat(40)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in
            ["", "Cpu", "-a", "a-", "a_b", "9a", "a/b", "..", "self", "serde", "test", &"a".repeat(41)]
        {
            let error = check_name(name).unwrap_err();
            assert!(error.hint().unwrap().contains("vm plugin new"), "{name}");
        }
    }

    #[test]
    fn a_project_has_no_gaps_and_brings_the_sdk() {
        for world in [World::Capability, World::Dns, World::WorkspaceImporter] {
            let files = project("a--cpu-limit", world);
            for (path, text) in files.iter().filter(|(path, _)| !path.starts_with("vendor")) {
                assert!(!text.contains("{{"), "{path}: {text}");
            }
            let has = |wanted: &str| files.iter().any(|(path, _)| path == wanted);
            for path in [
                "Cargo.toml",
                "Cargo.lock",
                ".cargo/config.toml",
                ".gitignore",
                "README.md",
                "plugin.toml",
                "src/lib.rs",
                "vendor/vm-plugin-sdk/Cargo.toml",
                "vendor/vm-plugin-sdk/src/lib.rs",
                "vendor/vm-plugin-sdk/wit/host.wit",
                "vendor/vm-plugin-sdk/worlds/worlds.wit",
            ] {
                assert!(has(path), "{world:?}: {path}");
            }
        }
        assert_eq!(type_name("a--cpu-limit"), "ACpuLimitPlugin");
    }

    #[test]
    fn a_directory_that_is_there_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let files = [("a/b".to_owned(), "text".to_owned())];
        assert!(write_all(dir.path(), &files).unwrap_err().to_string().contains("there already"));
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
        let fresh = dir.path().join("fresh");
        write_all(&fresh, &files).unwrap();
        assert_eq!(fs::read_to_string(fresh.join("a/b")).unwrap(), "text");

        // Where it cannot be made whole, nothing is left.
        let half = dir.path().join("half");
        let clash = [("a".to_owned(), String::new()), ("a/b".to_owned(), String::new())];
        assert!(matches!(write_all(&half, &clash), Err(CliError::WriteFile { .. })));
        assert!(!half.exists());
    }
}
