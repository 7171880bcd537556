//! Filesystems beyond the root.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use vm_types::guest::config::Mount;

use crate::{boot, machine};

/// Mounts what is not mounted; the result says what could not be.
pub(super) fn apply(mounts: &[Mount]) -> Vec<String> {
    mounts
        .iter()
        .filter_map(|wanted| one(wanted).err().map(|error| format!("mount {}: {error}", wanted.target)))
        .collect()
}

fn one(wanted: &Mount) -> Result<(), String> {
    let target = Path::new(&wanted.target);
    if machine::is_mount_point(target) {
        return Ok(());
    }
    let source: PathBuf = match wanted.source.strip_prefix("serial:") {
        Some(serial) => {
            boot::device_by_serial(serial).ok_or_else(|| format!("no drive with serial {serial:?}"))?
        }
        None => wanted.source.clone().into(),
    };
    fs::create_dir_all(target).map_err(|error| error.to_string())?;
    let (flags, data) = options(&wanted.options);
    let data = (!data.is_empty()).then_some(data.as_str());
    mount(Some(&source), target, Some(wanted.fstype.as_str()), flags, data)
        .map_err(|error| error.to_string())?;
    // The kernel takes "bind, read-only" in two steps only.
    if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        mount(None::<&str>, target, None::<&str>, flags | MsFlags::MS_REMOUNT, None::<&str>)
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Options of fstab(5) as mount(2) takes them: flags, and the rest as text for the filesystem.
fn options(words: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for word in words.iter().flat_map(|words| words.split(',')).filter(|word| !word.is_empty()) {
        let (flag, set) = match word {
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            "lazytime" => (MsFlags::MS_LAZYTIME, true),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            "bind" => (MsFlags::MS_BIND, true),
            "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, true),
            // For other programs than mount(2).
            "defaults" | "auto" | "noauto" | "nofail" | "user" | "nouser" | "_netdev" => continue,
            word if word.starts_with("x-") => continue,
            word => {
                data.push(word);
                continue;
            }
        };
        flags.set(flag, set);
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fstab_options_are_split_into_flags_and_data() {
        let words =
            ["defaults,ro", "noatime", "size=1m,mode=0700", "x-systemd.automount", "rw"].map(String::from);
        assert_eq!(options(&words), (MsFlags::MS_NOATIME, "size=1m,mode=0700".into()));
    }
}
