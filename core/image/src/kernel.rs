//! Kernels: from the distribution, from files or from what others have packed to a directory that a VMM can boot from.
//!
//! ```text
//!   <id>/vmlinuz          the boot file as it came
//!   <id>/vmlinux          the same unpacked, made for the first VMM that can unpack none
//!   <id>/modules.cpio     its modules (layout: vm_types::guest::initramfs); goes between agent_segment and a VM's segment
//!   <id>/config           build configuration, if there was one
//! ```

mod bootfile;
pub(crate) mod carry;
mod cpio;
mod distribution;
mod install;
mod modinfo;
mod modules;
mod sets;

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

pub use carry::import_archived;
pub use distribution::import_debian;
pub use install::{InstalledKernel, agent_segment, install};
use vm_types::guest::{config::GuestConfig, initramfs};

use crate::{ImageError, progress::blocking, scratch::Scratch};

/// A checked kernel that waits to be installed. Files it brought along vanish with it.
#[derive(Debug)]
pub struct KernelSource {
    vmlinuz: PathBuf,
    modules: Option<PathBuf>,
    config: Option<PathBuf>,
    release: String,
    origin: String,
    _scratch: Option<Scratch>,
}

impl KernelSource {
    /// Where it is from, for people, and what is to vanish with it.
    pub(crate) fn of(self, origin: String, scratch: Scratch) -> Self {
        Self { origin, _scratch: Some(scratch), ..self }
    }

    /// `uname -r` of it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Where it came from, for people, e.g. `debian linux-image-6.1.0-37-cloud-amd64`.
    pub fn origin(&self) -> &str {
        &self.origin
    }
}

/// A kernel from files: an x86-64 bzImage or ELF vmlinux, the directory of its modules (what `/lib/modules/RELEASE` is)
/// and its build configuration. What is built in is told by the modules directory's `modules.builtin`, by the
/// configuration, or by the configuration inside of the kernel (`CONFIG_IKCONFIG`); without any of them the kernel is
/// refused when it is installed.
///
/// # Errors
/// The boot file being unreadable or none.
pub async fn import_files(
    vmlinuz: &Path,
    modules: Option<&Path>,
    config: Option<&Path>,
) -> Result<KernelSource, ImageError> {
    let vmlinuz = vmlinuz.to_owned();
    let (modules, config) = (modules.map(Path::to_owned), config.map(Path::to_owned));
    blocking(move |_| source_of(vmlinuz, modules, config)).await
}

/// The same, at once.
pub(crate) fn source_of(
    vmlinuz: PathBuf,
    modules: Option<PathBuf>,
    config: Option<PathBuf>,
) -> Result<KernelSource, ImageError> {
    let bytes = read(&vmlinuz)?;
    let release = bootfile::release(&bytes)
        .map_err(|reason| ImageError::NotAKernel { path: vmlinuz.clone(), reason })?;
    let origin = format!("file {}", vmlinuz.display());
    Ok(KernelSource { vmlinuz, modules, config, release, origin, _scratch: None })
}

/// The kernel of a directory as an ELF vmlinux, for VMMs that can unpack none: made beside the boot file the first time it is
/// asked for, unless that is one.
///
/// # Errors
/// A boot file that is packed in an unknown way or damaged, or a file that cannot be read or written.
pub async fn vmlinux(directory: &Path) -> Result<PathBuf, ImageError> {
    let (boot, made) = (directory.join("vmlinuz"), directory.join("vmlinux"));
    blocking(move |_| {
        if made.exists() {
            return Ok(made);
        }
        let bytes = read(&boot)?;
        let image =
            bootfile::elf(&bytes).map_err(|reason| ImageError::NoElfKernel { path: boot.clone(), reason })?;
        if matches!(image, Cow::Borrowed(_)) {
            return Ok(boot);
        }
        vm_host::files::write_atomic(&made, 0o644, &image).map_err(|source| ImageError::File {
            action: "write",
            path: made.clone(),
            source,
        })?;
        Ok(made)
    })
    .await
}

/// A VM's segment of the initramfs: its configuration, readable to root alone, as a whole cpio archive. Its length is a
/// multiple of 4, and it goes behind something whose length is one too.
///
/// # Errors
/// A configuration that JSON cannot express; none can be made today.
pub fn segment(config: &GuestConfig) -> serde_json::Result<Vec<u8>> {
    let mut archive = cpio::Writer::default();
    archive.file(initramfs::CONFIG, 0o600, &serde_json::to_vec(config)?);
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    std::fs::read(path).map_err(|source| ImageError::File { action: "read", path: path.to_owned(), source })
}
