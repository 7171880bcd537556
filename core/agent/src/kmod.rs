//! Kernel modules of the initramfs: loading a list at boot, and the kernel's `modprobe` later.
//!
//! Index formats are those of depmod(8): `modules.dep` (`file: dependency…`, the last to be loaded first) and
//! `modules.alias` (`alias pattern module`).

use std::{
    ffi::{CString, OsString},
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use nix::{errno::Errno, kmod::ModuleInitFlags};
use vm_types::guest::initramfs;

/// `MODULE_INIT_COMPRESSED_FILE` of init_module(2), Linux 5.17.
const COMPRESSED: i32 = 4;

/// Loads one module file; one that is loaded or built in already is success.
pub(crate) fn load(path: &Path, parameters: &[u8]) -> io::Result<()> {
    let compressed = path.extension().is_some_and(|extension| extension != "ko");
    let flags = ModuleInitFlags::from_bits_retain(if compressed { COMPRESSED as _ } else { 0 });
    let parameters = CString::new(parameters).map_err(io::Error::other)?;
    match nix::kmod::finit_module(&File::open(path)?, &parameters, flags) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Loads the files named in `list` (one a line) from `directory`, in order, and deletes each that is loaded: files
/// of the initramfs are memory. Failures are returned, not fatal: a module that this machine has no device for may refuse.
pub(crate) fn load_list(directory: &Path, list: &str) -> Vec<String> {
    let mut failures = Vec::new();
    for name in list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let file = directory.join(name);
        match load(&file, b"") {
            Ok(()) => drop(fs::remove_file(file)),
            Err(error) => failures.push(format!("module {name}: {error}")),
        }
    }
    failures
}

/// Whether the module of `file` is live or built in, by `/sys/module` at `modules`. The file of one that was loaded at
/// boot is gone.
fn is_loaded(modules: &Path, file: &str) -> bool {
    let module = modules.join(module_name(file));
    match fs::read_to_string(module.join("initstate")) {
        Ok(state) => state.trim_end() == "live",
        // What is built in has a directory at most.
        Err(_) => module.is_dir(),
    }
}

/// The packed modules' index.
pub(crate) struct Index<'a> {
    /// `modules.dep`.
    pub dependencies: &'a str,
    /// `modules.alias`.
    pub aliases: &'a str,
}

impl<'a> Index<'a> {
    /// The files to load for `name`, a module's name or an alias, in loading order. Empty if it is not packed.
    pub(crate) fn resolve(&self, name: &str) -> Vec<&'a str> {
        let mut files = Vec::new();
        self.add_module(&underscored(name), &mut files);
        if files.is_empty() {
            for line in self.aliases.lines() {
                let mut words = line.split_ascii_whitespace();
                if words.next() == Some("alias")
                    && let (Some(pattern), Some(module)) = (words.next(), words.next())
                    && matches(underscored(pattern).as_bytes(), underscored(name).as_bytes())
                {
                    self.add_module(&underscored(module), &mut files);
                }
            }
        }
        files
    }

    fn add_module(&self, module: &str, files: &mut Vec<&'a str>) {
        for line in self.dependencies.lines() {
            if let Some((file, needs)) = line.split_once(':')
                && module_name(file) == module
            {
                for file in needs.split_ascii_whitespace().rev().chain([file]) {
                    if !files.contains(&file) {
                        files.push(file);
                    }
                }
                return;
            }
        }
    }
}

/// `-` and `_` are the same, but for the ranges of a pattern's sets.
fn underscored(name: &str) -> String {
    let mut in_set = false;
    let same = |character| {
        match character {
            '[' => in_set = true,
            ']' => in_set = false,
            '-' if !in_set => return '_',
            _ => {}
        }
        character
    };
    name.chars().map(same).collect()
}

fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    underscored(name.split('.').next().unwrap_or(name))
}

/// fnmatch(3) without flags, as far as aliases use it: `*`, `?` and `[…]`.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skip| matches(rest, &text[skip..])),
        Some((b'?', rest)) => !text.is_empty() && matches(rest, &text[1..]),
        Some((b'[', rest)) => {
            let (Some(end), Some((byte, text))) =
                (rest.iter().position(|byte| *byte == b']'), text.split_first())
            else {
                return false;
            };
            in_set(&rest[..end], *byte) && matches(&rest[end + 1..], text)
        }
        Some((byte, rest)) => text.first() == Some(byte) && matches(rest, &text[1..]),
    }
}

fn in_set(mut set: &[u8], byte: u8) -> bool {
    while let Some((first, rest)) = set.split_first() {
        match rest {
            [b'-', last, rest @ ..] => {
                if (*first..=*last).contains(&byte) {
                    return true;
                }
                set = rest;
            }
            _ => {
                if *first == byte {
                    return true;
                }
                set = rest;
            }
        }
    }
    false
}

/// Why a module is not loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    /// Not something that could be a module's name.
    #[error("that is no module's name")]
    Name,
    /// Neither the initramfs nor the image has it.
    #[error("the initramfs has no such module, and the image has none for kernel {release}")]
    Absent { release: String },
    /// The kernel refused.
    #[error("{file}: {source}")]
    Load { file: String, source: io::Error },
    /// The image's own modprobe could not load it.
    #[error("the image's modprobe: {message}")]
    Modprobe { message: String },
}

/// Loads modules by name, from the initramfs or else the image; the result says what could not be.
pub(crate) fn load_named(names: &[String]) -> Vec<String> {
    let failure = |name: &String| {
        load_one(name).err().map(|error| format!("module {name}: {}", vm_types::report::chain(&error)))
    };
    names.iter().filter_map(failure).collect()
}

fn load_one(name: &str) -> Result<(), ModuleError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if name.is_empty() || name.starts_with('-') || !name.bytes().all(plain) {
        return Err(ModuleError::Name);
    }
    let present = is_loaded(Path::new("/sys/module"), name)
        || fs::read_to_string("/proc/filesystems").is_ok_and(|text| has_filesystem(&text, name));
    if present || load_packed(name)? {
        return Ok(());
    }
    let release = release();
    let directory = Path::new("/lib/modules").join(&release);
    if let Some(program) = image_modprobe(&directory) {
        let output = Command::new(program)
            .args(["--", name])
            .env_clear()
            .env("PATH", crate::ssh::DEFAULT_PATH)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| ModuleError::Modprobe { message: error.to_string() })?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
        return Err(ModuleError::Modprobe { message });
    }
    // An image may have modules and nothing to load them with.
    if load_from(&directory, name)? { Ok(()) } else { Err(ModuleError::Absent { release }) }
}

/// Whether `/proc/filesystems` has one of this name: such a driver, where built in, has no other trace.
fn has_filesystem(filesystems: &str, name: &str) -> bool {
    filesystems.lines().any(|line| line.split_ascii_whitespace().next_back() == Some(name))
}

fn release() -> String {
    nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

/// The image's modprobe, where the image has modules for this kernel, which are in `directory`.
fn image_modprobe(directory: &Path) -> Option<&'static str> {
    let programs = ["/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe"];
    programs.into_iter().find(|path| directory.join("modules.dep").exists() && Path::new(path).exists())
}

/// Loads a packed module with what it needs; false if it is not packed.
fn load_packed(name: &str) -> Result<bool, ModuleError> {
    load_from(&Path::new(crate::link::HOME).join(initramfs::MODULES), name)
}

/// As [`load_packed`], from a directory with an index of its own.
fn load_from(directory: &Path, name: &str) -> Result<bool, ModuleError> {
    let read = |file: &str| fs::read_to_string(directory.join(file)).unwrap_or_default();
    let (dependencies, aliases) = (read("modules.dep"), read("modules.alias"));
    let files = Index { dependencies: &dependencies, aliases: &aliases }.resolve(name);
    for file in &files {
        if !is_loaded(Path::new("/sys/module"), file) {
            load(&directory.join(file), b"")
                .map_err(|source| ModuleError::Load { file: (*file).to_owned(), source })?;
        }
    }
    Ok(!files.is_empty())
}

/// Entry as `modprobe`: the kernel calls it as `modprobe -q -- NAME` (kernel/kmod.c). What is not packed is left to the
/// image's own modprobe, if it has one with modules for this kernel.
pub(crate) fn modprobe(arguments: &[OsString]) -> ExitCode {
    let Some(name) = arguments.iter().rfind(|argument| !argument.as_bytes().starts_with(b"-")) else {
        return ExitCode::from(1);
    };
    match load_packed(&name.to_string_lossy()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            if let Some(program) = image_modprobe(&Path::new("/lib/modules").join(release())) {
                // Returns only if it could not be run.
                let _ = Command::new(program).args(arguments).exec();
            }
            ExitCode::from(1)
        }
        Err(error) => {
            crate::console::note(format_args!("module {}", vm_types::report::chain(&error)));
            ExitCode::from(1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: Index<'_> = Index {
        dependencies: "nf_tables.ko: nfnetlink.ko libcrc32c.ko\nnfnetlink.ko:\nlibcrc32c.ko: crc32c_generic.ko\n\
                       crc32c_generic.ko:\nnft_chain_nat.ko: nf_nat.ko nf_tables.ko nfnetlink.ko\nnf_nat.ko:\nvirtio-rng.ko:\n",
        aliases: "# Aliases extracted from modules themselves.\nalias nfnetlink-subsys-10 nf_tables\n\
                  alias nft-chain-1-nat nft_chain_nat\nalias nft-chain-2-nat nft_chain_nat\nalias virtio:d00000004v* virtio_rng\n\
                  alias net-pf-1[0-9]-proto-x nfnetlink\n",
    };

    #[test]
    fn dependencies_come_first_and_once() {
        assert_eq!(INDEX.resolve("nf_tables"), ["libcrc32c.ko", "nfnetlink.ko", "nf_tables.ko"]);
        assert_eq!(INDEX.resolve("nft-chain-1-nat").last(), Some(&"nft_chain_nat.ko"));
    }

    #[test]
    fn loaded_modules_need_no_file() {
        let sys = tempfile::tempdir().unwrap();
        for (name, state) in [("virtio_ring", Some("live\n")), ("ext4", Some("coming\n")), ("builtin", None)]
        {
            fs::create_dir(sys.path().join(name)).unwrap();
            if let Some(state) = state {
                fs::write(sys.path().join(name).join("initstate"), state).unwrap();
            }
        }
        assert!(
            is_loaded(sys.path(), "kernel/drivers/virtio-ring.ko.xz") && is_loaded(sys.path(), "builtin.ko")
        );
        assert!(!is_loaded(sys.path(), "ext4.ko") && !is_loaded(sys.path(), "nf_tables.ko"));
    }

    #[test]
    fn what_is_asked_for_by_name_is_a_name_and_its_absence_is_told() {
        for bad in ["", "-r", "../x", "a b", "a;b"] {
            assert!(matches!(load_one(bad), Err(ModuleError::Name)), "{bad}");
        }
        assert!(has_filesystem("nodev\tproc\n\text4\n", "ext4") && !has_filesystem("nodev\tproc\n", "nodev"));
        let failures = load_named(&["no_such_module_anywhere".to_owned()]);
        assert_eq!(failures.len(), 1);
        assert!(failures[0].starts_with("module no_such_module_anywhere: "), "{failures:?}");
    }

    #[test]
    fn a_directory_of_modules_is_loaded_from_by_its_index() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("modules.dep"), "kernel/a-b.ko:\n").unwrap();
        assert!(!load_from(directory.path(), "other").unwrap());
        let error = load_from(directory.path(), "a_b").unwrap_err();
        assert!(matches!(&error, ModuleError::Load { file, .. } if file == "kernel/a-b.ko"), "{error:?}");
    }

    #[test]
    fn aliases_are_patterns_and_dashes_are_underscores() {
        assert_eq!(INDEX.resolve("virtio:d00000004v00001AF4"), ["virtio-rng.ko"]);
        assert_eq!(INDEX.resolve("virtio_rng"), ["virtio-rng.ko"]);
        assert_eq!(INDEX.resolve("net-pf-16-proto-x"), ["nfnetlink.ko"]);
        assert!(INDEX.resolve("net-pf-1a-proto-x").is_empty());
        assert!(INDEX.resolve("floppy").is_empty());
    }
}
