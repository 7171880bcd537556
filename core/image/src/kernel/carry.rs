//! Kernels on their way between hosts: the archive of modules that a bundle or a registry has, read and written.
//!
//! Read is any tar archive with a kernel's modules in it, e.g. one of `/lib/modules/RELEASE`. Written is what an installed kernel
//! has: the modules a guest needs. They need not say which drivers are built in, for that was known when it was installed; the
//! archive's `modules.builtin` lists what is needed and no module.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use vm_types::guest::initramfs;

use super::{KernelSource, cpio, modules::normal, read, sets, source_of};
use crate::{
    ImageError, ProgressSink,
    progress::{Cancel, Reporter, blocking},
    rootfs::{
        archive::{Archive, Kind},
        stream::{Stream, Wanted},
    },
    scratch::Scratch,
};

/// What tells which modules are built in (depmod(8)).
const BUILTIN: &str = "modules.builtin";
/// More than any distribution's kernel has.
const FILES_MAX: usize = 50_000;
const BYTES_MAX: u64 = 4 << 30;
const NAME_MAX: usize = 255;
const CHUNK: usize = 256 << 10;

/// A kernel whose parts are files: the boot file, the archive of its modules and its build configuration. `origin` is where it is
/// from, for people.
///
/// # Errors
/// A boot file that is none, an archive that is damaged or has what no kernel has, or lack of room.
pub async fn import_archived(
    vmlinuz: &Path,
    modules: Option<&Path>,
    config: Option<&Path>,
    origin: String,
    scratch: &Path,
    progress: ProgressSink,
) -> Result<KernelSource, ImageError> {
    let (vmlinuz, config) = (vmlinuz.to_owned(), config.map(Path::to_owned));
    let (modules, scratch) = (modules.map(Path::to_owned), Scratch::new(scratch, "kernel-")?);
    let (directory, reporter) = (scratch.join("modules"), Reporter::new(progress));
    let work = move |cancel: &Cancel| {
        reporter.report("unpacking the kernel", 0, None);
        let unpacked = match modules {
            Some(archive) => match File::open(&archive) {
                Ok(opened) => Some(unpack(Box::new(opened), &directory, cancel)?),
                Err(source) => return Err(ImageError::File { action: "open", path: archive, source }),
            },
            None => None,
        };
        source_of(vmlinuz, unpacked, config)
    };
    match blocking(work).await {
        Ok(found) => Ok(found.of(origin, scratch)),
        Err(error) => {
            scratch.close().await;
            Err(error)
        }
    }
}

/// Unpacks the modules of an archive to a new directory, all of them beside each other: where they were tells nothing. Links, other
/// files and other names are left out.
pub(crate) fn unpack(
    input: Box<dyn Read + Send>,
    directory: &Path,
    cancel: &Cancel,
) -> Result<PathBuf, ImageError> {
    let failed =
        |source| ImageError::File { action: "unpack modules to", path: directory.to_owned(), source };
    std::fs::create_dir(directory).map_err(failed)?;
    let wanted = Wanted { blob: false, stream: false };
    let stream =
        Stream::start(input, wanted, cancel.clone()).map_err(|source| ImageError::ReadArchive { source })?;
    let mut archive = Archive::new(stream, false);
    let (mut files, mut bytes) = (0, 0);
    while let Some(entry) = archive.next_entry()? {
        cancel.check()?;
        let Some(name) = (if entry.kind == Kind::File { plain_name(&entry.path) } else { None }) else {
            continue;
        };
        let refused = |reason: &str| ImageError::RefusedEntry {
            path: String::from_utf8_lossy(&entry.path).into_owned(),
            reason: reason.to_owned(),
        };
        files += 1;
        bytes += entry.size;
        if files > FILES_MAX || bytes > BYTES_MAX {
            return Err(refused("is one module too many, or too large: no kernel has that many"));
        }
        if entry.segments != [(0, entry.size)] && entry.size > 0 {
            return Err(refused("has holes, which modules have not"));
        }
        vm_host::files::room(directory, entry.size).map_err(failed)?;
        let mut file = match File::create_new(directory.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(refused("is there twice, in two directories"));
            }
            other => other.map_err(failed)?,
        };
        let mut piece = vec![0; CHUNK];
        loop {
            match archive.read_content(&mut piece)? {
                0 => break,
                count => file.write_all(&piece[..count]).map_err(failed)?,
            }
        }
    }
    archive.drain()?;
    Ok(directory.to_owned())
}

/// The name of a file that is of use: a module's, or the list of those that are built in.
fn plain_name(path: &[u8]) -> Option<&str> {
    let name = std::str::from_utf8(path).ok()?.rsplit('/').next()?;
    let module = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().any(|end| name.ends_with(end));
    let fits = name.len() <= NAME_MAX && !name.contains('\0') && !name.starts_with('.');
    (fits && (module || name == BUILTIN)).then_some(name)
}

/// The parts of an installed kernel.
pub(crate) struct Parts {
    pub(crate) vmlinuz: PathBuf,
    /// A tar archive.
    pub(crate) modules: Vec<u8>,
    pub(crate) config: Option<Vec<u8>>,
}

/// What is in an installed kernel's directory, for others.
pub(crate) fn parts(directory: &Path) -> Result<Parts, ImageError> {
    let packed = directory.join("modules.cpio");
    let damaged = || ImageError::File {
        action: "understand",
        path: packed.clone(),
        source: io::ErrorKind::InvalidData.into(),
    };
    let bytes = read(&packed)?;
    let files = cpio::files(&bytes).ok_or_else(damaged)?;
    let start = format!("{}/", initramfs::MODULES);
    let modules: Vec<(&str, &[u8])> = files
        .into_iter()
        .filter_map(|(name, content)| Some((name.strip_prefix(&start)?, content)))
        .filter(|(name, _)| name.ends_with(".ko"))
        .collect();
    let has = |wanted: &str| {
        modules.iter().any(|(name, _)| name.strip_suffix(".ko").is_some_and(|name| normal(name) == wanted))
    };
    // It was installed, so what is needed and no module is built in.
    let builtin: String = sets::EARLY
        .iter()
        .filter(|early| early.required && !has(early.name))
        .map(|early| format!("kernel/{}.ko\n", early.name))
        .collect();
    let mut archive = tar::Builder::new(Vec::new());
    let mut append = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, content)
    };
    let mut write = || {
        append(BUILTIN, builtin.as_bytes())?;
        modules.iter().try_for_each(|(name, content)| append(name, content))
    };
    let written = write().and_then(|()| archive.into_inner());
    let modules =
        written.map_err(|source| ImageError::File { action: "pack", path: packed.clone(), source })?;
    let config = directory.join("config");
    let config = if config.exists() { Some(read(&config)?) } else { None };
    Ok(Parts { vmlinuz: directory.join("vmlinuz"), modules, config })
}
