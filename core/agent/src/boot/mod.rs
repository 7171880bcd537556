//! From the kernel's hand-over to a root filesystem under `/`.

mod root;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use vm_types::guest::{
    config::{self, GuestConfig},
    initramfs,
};

pub(crate) use root::{drive, grow};

/// Why a VM does not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// A filesystem of the kernel.
    #[error("cannot mount {fstype} on {target}")]
    MountKernel { fstype: &'static str, target: &'static str, source: nix::Error },
    /// No configuration, or not readable.
    #[error("cannot read {} of the initramfs", initramfs::CONFIG)]
    ReadConfig { source: io::Error },
    /// Not a configuration.
    #[error("{} of the initramfs is no configuration", initramfs::CONFIG)]
    ParseConfig { source: serde_json::Error },
    /// From a newer daemon.
    #[error("the configuration has version {found}, this agent knows up to {}", config::VERSION)]
    NewerConfig { found: u32 },
    /// The root drive does not appear.
    #[error("no drive with serial {serial:?} appeared in {seconds} s; there are {present:?}")]
    NoRootDrive { serial: String, seconds: u64, present: Vec<String> },
    /// The root drive does not mount.
    #[error("cannot mount {device} ({fstype}) as root")]
    MountRoot { device: String, fstype: String, source: nix::Error },
    /// The root filesystem takes no directories or mounts.
    #[error("cannot prepare {path} in the root filesystem")]
    PrepareRoot { path: PathBuf, source: io::Error },
    /// The move itself.
    #[error("cannot switch to the root filesystem")]
    SwitchRoot { source: nix::Error },
}

impl BootError {
    /// Stable code for the control service.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::MountKernel { .. } => "boot.mount",
            Self::ReadConfig { .. } | Self::ParseConfig { .. } => "config.read",
            Self::NewerConfig { .. } => "config.version",
            Self::NoRootDrive { .. } => "root.missing",
            Self::MountRoot { .. } => "root.mount",
            Self::PrepareRoot { .. } => "root.prepare",
            Self::SwitchRoot { .. } => "root.switch",
        }
    }

    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::MountKernel { fstype, .. } => Some(format!("use a kernel with {fstype} built in")),
            Self::NewerConfig { .. } => Some("rebuild the initramfs with the agent of this daemon".into()),
            Self::ReadConfig { .. } | Self::ParseConfig { .. } => {
                Some("the VM's initramfs was not completed; create the VM's boot files again".into())
            }
            Self::NoRootDrive { .. } => {
                Some("attach the drive with that serial and pack the kernel's virtio_blk module".into())
            }
            Self::MountRoot { fstype, .. } => Some(format!(
                "check the filesystem of the image and that the kernel's {fstype} module is packed"
            )),
            Self::PrepareRoot { source, .. }
                if matches!(source.raw_os_error(), Some(libc::EEXIST | libc::ENOTDIR | libc::ELOOP)) =>
            {
                Some("the image has something other than a directory there; change the image".into())
            }
            Self::PrepareRoot { .. } => Some("the root filesystem must be writable and not full".into()),
            Self::SwitchRoot { .. } => None,
        }
    }
}

/// `/proc`, `/sys` and `/dev`. The kernel has mounted none of them in an initramfs.
pub(crate) fn mount_kernel() -> Result<(), BootError> {
    let secure = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    for (fstype, target, flags, data) in [
        ("proc", "/proc", secure, None),
        ("sysfs", "/sys", secure, None),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755")),
    ] {
        let _ = fs::create_dir(target);
        match mount(Some(fstype), target, Some(fstype), flags, data) {
            Ok(()) | Err(nix::Error::EBUSY) => {}
            Err(source) => return Err(BootError::MountKernel { fstype, target, source }),
        }
    }
    Ok(())
}

/// Loads the modules that every boot needs and forgets their files, which are memory.
pub(crate) fn load_modules() -> Vec<String> {
    let root = Path::new("/");
    let Ok(list) = fs::read_to_string(root.join(initramfs::MODULES_EARLY)) else { return Vec::new() };
    let directory = root.join(initramfs::MODULES);
    crate::kmod::load_list(&directory, &list)
}

/// Reads and checks the configuration below `root`.
pub(crate) fn read_config(root: &Path) -> Result<GuestConfig, BootError> {
    let text = fs::read(root.join(initramfs::CONFIG)).map_err(|source| BootError::ReadConfig { source })?;
    parse_config(&text)
}

fn parse_config(text: &[u8]) -> Result<GuestConfig, BootError> {
    let parse = |source| BootError::ParseConfig { source };
    // The version first: a newer configuration need not parse as this one.
    let value: serde_json::Value = serde_json::from_slice(text).map_err(parse)?;
    if let Some(found) = value.get("version").and_then(serde_json::Value::as_u64)
        && found > u64::from(config::VERSION)
    {
        return Err(BootError::NewerConfig { found: u32::try_from(found).unwrap_or(u32::MAX) });
    }
    serde_json::from_value(value).map_err(parse)
}

/// Mounts the root drive and makes it `/`, with the initramfs visible at [`crate::link::HOME`].
pub(crate) fn switch_root(config: &GuestConfig) -> Result<(), BootError> {
    let new = Path::new("/newroot");
    root::mount_root(&config.root, new)?;
    root::prepare(new)?;
    root::switch(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_configuration_is_refused_by_its_version() {
        let error = parse_config(br#"{"version": 99, "shape": "unknown"}"#).unwrap_err();
        assert_eq!(error.code(), "config.version");
        assert!(error.to_string().contains("99") && error.hint().is_some());
        assert_eq!(parse_config(b"{").unwrap_err().code(), "config.read");
    }
}
