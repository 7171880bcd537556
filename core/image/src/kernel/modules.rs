//! Chooses the modules a guest needs out of a kernel's and orders them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use super::{
    modinfo::{self, ModInfo},
    sets,
};
use crate::{ImageError, rootfs::stream::decompressed};

/// The name under which the kernel lists a module: its file's, with underscores.
pub(super) fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// What of a kernel is built in.
#[derive(Debug, Default)]
pub(super) struct Builtin {
    names: BTreeSet<String>,
    options: BTreeSet<String>,
}

impl Builtin {
    /// Reads `modules.builtin`: paths of what would have been modules.
    pub(super) fn add_list(&mut self, text: &str) {
        self.names.extend(text.lines().filter_map(|line| {
            let file = line.trim().rsplit('/').next()?;
            Some(normal(file.strip_suffix(".ko")?))
        }));
    }

    /// Reads a build configuration.
    pub(super) fn add_config(&mut self, text: &str) {
        self.options
            .extend(text.lines().filter_map(|line| line.trim().strip_suffix("=y")).map(str::to_owned));
    }

    fn has(&self, early: &sets::Early) -> bool {
        self.names.contains(early.name) || self.options.contains(early.option)
    }
}

/// One module to pack.
#[derive(Debug)]
pub(super) struct Module {
    /// File name in the initramfs, never compressed.
    pub(super) file: String,
    pub(super) content: Vec<u8>,
    info: ModInfo,
}

/// The modules to pack.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// By normal name.
    pub(super) modules: BTreeMap<String, Module>,
    /// Normal names in the order of loading.
    early: Vec<String>,
}

impl Selection {
    /// `early.list`: file names, one a line, in order.
    pub(super) fn early_list(&self) -> String {
        self.early.iter().filter_map(|name| self.modules.get(name)).fold(String::new(), |mut text, module| {
            text.push_str(&module.file);
            text.push('\n');
            text
        })
    }

    /// `modules.dep`: after each module what it depends on, also indirectly, so that loading goes from the line's end to
    /// its start (depmod(8), modprobe(8)).
    pub(super) fn dep(&self) -> String {
        let mut text = String::new();
        for (name, module) in &self.modules {
            let mut order = Vec::new();
            self.order(name, &mut order);
            let _ = write!(text, "{}:", module.file);
            for other in order.iter().rev().filter(|other| *other != name) {
                if let Some(other) = self.modules.get(other) {
                    let _ = write!(text, " {}", other.file);
                }
            }
            text.push('\n');
        }
        text
    }

    /// `modules.alias`.
    pub(super) fn alias(&self) -> String {
        let mut text = String::new();
        for (name, module) in &self.modules {
            for pattern in &module.info.aliases {
                let _ = writeln!(text, "alias {pattern} {name}");
            }
        }
        text
    }

    /// Appends a module behind what it depends on, each once. What is no module is built in.
    fn order(&self, name: &str, order: &mut Vec<String>) {
        let Some(module) = self.modules.get(name) else { return };
        if order.iter().any(|there| there == name) {
            return;
        }
        for dependency in &module.info.depends {
            self.order(dependency, order);
        }
        order.push(name.to_owned());
    }
}

/// Selects out of a directory (none means a kernel without modules) and checks that nothing needful is absent.
pub(super) fn select(
    directory: Option<&Path>,
    builtin: &Builtin,
    release: &str,
) -> Result<Selection, ImageError> {
    let mut files = BTreeMap::new();
    if let Some(directory) = directory {
        index(directory, &mut files)?;
    }
    let missing: Vec<String> = sets::EARLY
        .iter()
        .filter(|early| early.required && !builtin.has(early) && !files.contains_key(early.name))
        .map(|early| early.name.to_owned())
        .collect();
    if !missing.is_empty() {
        return Err(ImageError::KernelLacks { release: release.to_owned(), missing });
    }
    let mut selection = Selection::default();
    let early = sets::EARLY.iter().map(|early| early.name).filter(|name| files.contains_key(*name));
    let on_demand = files.keys().map(String::as_str).filter(|name| sets::wanted(name));
    let mut queue: Vec<String> = early.chain(on_demand).map(str::to_owned).collect();
    while let Some(name) = queue.pop() {
        if selection.modules.contains_key(&name) {
            continue;
        }
        let Some(path) = files.get(&name) else { continue };
        let content = load(path)?;
        let damaged = || ImageError::DamagedModule {
            path: path.clone(),
            reason: "it is no 64-bit ELF file with a section .modinfo".into(),
        };
        let info = modinfo::parse(&content).ok_or_else(damaged)?;
        if let (Some(found), Some(directory)) = (&info.release, directory)
            && found != release
        {
            return Err(ImageError::ForeignModules {
                path: directory.to_owned(),
                found: found.clone(),
                release: release.to_owned(),
            });
        }
        queue.extend(info.depends.iter().cloned());
        let file = path.file_name().map(|file| file.to_string_lossy().into_owned()).unwrap_or_default();
        let stem = file.split(".ko").next().unwrap_or(&file);
        selection.modules.insert(name, Module { file: format!("{stem}.ko"), content, info });
    }
    let mut order = Vec::new();
    for early in &sets::EARLY {
        selection.order(early.name, &mut order);
    }
    selection.early = order;
    Ok(selection)
}

/// All modules below a directory by normal name. Links (`build`, `source`) are not followed.
fn index(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ImageError> {
    let failed = |source| ImageError::File { action: "read", path: directory.to_owned(), source };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let kind = entry.file_type().map_err(failed)?;
        let path = entry.path();
        if kind.is_dir() {
            index(&path, files)?;
        } else if kind.is_file() {
            let file = entry.file_name().to_string_lossy().into_owned();
            let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|end| file.strip_suffix(end));
            if let Some(stem) = stem {
                files.insert(normal(stem), path);
            }
        }
    }
    Ok(())
}

fn load(path: &Path) -> Result<Vec<u8>, ImageError> {
    let read = || {
        let mut content = Vec::new();
        decompressed(fs::File::open(path)?)?.read_to_end(&mut content)?;
        std::io::Result::Ok(content)
    };
    read().map_err(|source| ImageError::File { action: "read", path: path.to_owned(), source })
}
