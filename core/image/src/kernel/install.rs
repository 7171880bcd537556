//! Packs a kernel and its initramfs into the store's form.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use rustix::fs::{CWD, RenameFlags};
use sha2::{Digest, Sha256};
use vm_types::{KernelId, guest::initramfs};

use super::{
    KernelSource, bootfile, cpio,
    modules::{self, Builtin, Selection},
    read,
};
use crate::{ImageError, progress::blocking, rootfs::stream::hex};

/// Files of a kernel's directory; the last is what it was built with.
const VMLINUZ: &str = "vmlinuz";
const MODULES: &str = "modules.cpio";
const CONFIG: &str = "config";
/// Of a content address, in a kernel's identifier.
const ID_DIGITS: usize = 12;

/// A kernel in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledKernel {
    /// Content address of the boot file and its modules; the directory's name.
    pub id: KernelId,
    /// `uname -r` of it.
    pub release: String,
}

/// Checks that a kernel can serve as a guest's and makes `out_dir/<id>` of it. A directory of that id that is there is
/// replaced in one step. The agent is not in it: see [`agent_segment`].
///
/// # Errors
/// A kernel without a driver that every VM needs, modules of another kernel, or the files' own.
pub async fn install(source: KernelSource, out_dir: &Path) -> Result<InstalledKernel, ImageError> {
    let out_dir = out_dir.to_owned();
    blocking(move |cancel| {
        let vmlinuz = read(&source.vmlinuz)?;
        let config = match &source.config {
            Some(path) => Some(text(path)?),
            None => None,
        };
        let selection = select(&source, &vmlinuz, config.as_deref())?;
        cancel.check()?;
        let archive = pack(&selection);
        let id: KernelId = address(&vmlinuz, &archive).parse().map_err(|error| ImageError::File {
            action: "name",
            path: source.vmlinuz.clone(),
            source: io::Error::other(error),
        })?;
        cancel.check()?;
        let mut files = vec![(VMLINUZ, &vmlinuz[..]), (MODULES, &archive)];
        if let Some(config) = &config {
            files.push((CONFIG, config.as_bytes()));
        }
        put(&out_dir, id.as_str(), &files).map_err(|source| ImageError::File {
            action: "write",
            path: out_dir.join(id.as_str()),
            source,
        })?;
        Ok(InstalledKernel { id, release: source.release.clone() })
    })
    .await
}

fn text(path: &Path) -> Result<String, ImageError> {
    Ok(String::from_utf8_lossy(&read(path)?).into_owned())
}

fn select(source: &KernelSource, vmlinuz: &[u8], config: Option<&str>) -> Result<Selection, ImageError> {
    let mut builtin = Builtin::default();
    let list = source.modules.as_ref().map(|dir| dir.join("modules.builtin")).filter(|path| path.is_file());
    if let Some(list) = &list {
        builtin.add_list(&text(list)?);
    }
    if let Some(config) = config {
        builtin.add_config(config);
    }
    if list.is_none() && config.is_none() {
        match bootfile::embedded_config(vmlinuz) {
            Some(config) => builtin.add_config(&config),
            // Modules that include all that is needed are proof enough; without any there is none.
            None if source.modules.is_some() => {}
            None => return Err(ImageError::KernelUnverifiable { release: source.release.clone() }),
        }
    }
    modules::select(source.modules.as_deref(), &builtin, &source.release)
}

/// The part of the initramfs that depends on the agent only; goes before a kernel's `modules.cpio`. Apart from it, so that a
/// new agent needs no kernel to be installed again.
pub fn agent_segment(agent: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Writer::default();
    // The kernel opens the console for the first process before that could mount anything.
    archive.directory("dev", 0o755);
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file(initramfs::INIT, 0o755, agent);
    archive.finish()
}

/// The part that depends on the kernel only.
fn pack(selection: &Selection) -> Vec<u8> {
    let mut archive = cpio::Writer::default();
    archive.directory(initramfs::MODULES, 0o755);
    archive.file(initramfs::MODULES_EARLY, 0o644, selection.early_list().as_bytes());
    archive.file(initramfs::MODULES_DEP, 0o644, selection.dep().as_bytes());
    archive.file(initramfs::MODULES_ALIAS, 0o644, selection.alias().as_bytes());
    for module in selection.modules.values() {
        archive.file(&format!("{}/{}", initramfs::MODULES, module.file), 0o644, &module.content);
    }
    archive.finish()
}

/// Content address of a boot file and its modules, part by part: whoever brings other modules for a kernel that is there brings
/// another kernel.
fn address(vmlinuz: &[u8], modules: &[u8]) -> String {
    let mut all = Sha256::new();
    for part in [vmlinuz, modules] {
        all.update(Sha256::digest(part));
    }
    hex(&all.finalize())[..ID_DIGITS].to_owned()
}

/// Writes a directory beside its place and exchanges the two. Another whole kernel is not replaced: identifiers are short enough that
/// somebody could look for one that has the same.
fn put(out_dir: &Path, name: &str, files: &[(&str, &[u8])]) -> io::Result<()> {
    let place = out_dir.join(name);
    let there = |file| fs::read(place.join(file));
    if let (Ok(vmlinuz), Ok(modules)) = (there(VMLINUZ), there(MODULES))
        && address(&vmlinuz, &modules) == name
    {
        let differs = files.iter().any(|(file, content)| match *file {
            VMLINUZ => vmlinuz != *content,
            MODULES => modules != *content,
            _ => false,
        });
        if differs {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "another kernel has this identifier"));
        }
    }
    fs::create_dir_all(out_dir)?;
    let made = tempfile::Builder::new().prefix(".kernel-").tempdir_in(out_dir)?;
    for (file, content) in files {
        vm_host::files::write_atomic(&made.path().join(file), 0o444, content)?;
    }
    fs::set_permissions(made.path(), fs::Permissions::from_mode(0o755))?;
    match rustix::fs::renameat_with(CWD, made.path(), CWD, &place, RenameFlags::EXCHANGE) {
        // What was there before now has the temporary name and goes with it.
        Ok(()) => {}
        Err(rustix::io::Errno::NOENT) => fs::rename(made.keep(), &place)?,
        Err(errno) => return Err(errno.into()),
    }
    fs::File::open(out_dir)?.sync_all()
}
