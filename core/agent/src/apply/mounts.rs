//! Filesystems beyond the root.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
};
use vm_types::guest::config::Mount;

use crate::{boot, machine};

/// How long all drives together may take to appear. Those of a start are there; one that is plugged in is heard of a moment
/// later.
const PATIENCE: Duration = Duration::from_secs(2);

/// Mounts what is not mounted; the result says what could not be.
pub(super) fn apply(mounts: &[Mount]) -> Vec<String> {
    let deadline = Instant::now() + PATIENCE;
    let failure =
        |wanted: &Mount| one(wanted, deadline).err().map(|error| format!("mount {}: {error}", wanted.target));
    mounts.iter().filter_map(failure).collect()
}

fn one(wanted: &Mount, deadline: Instant) -> Result<(), String> {
    let target = Path::new(&wanted.target);
    if !target.is_absolute() {
        return Err("the target is no absolute path".into());
    }
    fs::create_dir_all(target).map_err(|error| error.to_string())?;
    // The kernel lists mounts without links.
    let target = &target.canonicalize().map_err(|error| error.to_string())?;
    if machine::is_mount_point(target) {
        return Ok(());
    }
    let source: PathBuf = match wanted.source.strip_prefix("serial:") {
        Some(serial) => boot::drive(serial, deadline).map_err(|present| {
            format!("the VM has no drive with serial {serial:?}, only {}", present.join(", "))
        })?,
        None => wanted.source.clone().into(),
    };
    let (flags, data) = options(&wanted.options);
    let data = (!data.is_empty()).then_some(data.as_str());
    mount(Some(&source), target, Some(wanted.fstype.as_str()), flags, data)
        .map_err(|error| explained(error, wanted, &source))?;
    // The kernel takes "bind, read-only" in two steps only.
    if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        mount(None::<&str>, target, None::<&str>, flags | MsFlags::MS_REMOUNT, None::<&str>)
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// What mount(2)'s most frequent errors mean.
fn explained(error: Errno, wanted: &Mount, source: &Path) -> String {
    let fstype = &wanted.fstype;
    match error {
        Errno::ENODEV => format!("neither kernel nor image has the filesystem {fstype}"),
        Errno::EINVAL if wanted.source.starts_with("serial:") => format!(
            "{} holds no {fstype} filesystem, or that does not know the options {:?}",
            source.display(),
            wanted.options
        ),
        Errno::EACCES | Errno::EROFS => {
            format!("{} is read-only; mount it with the option ro", source.display())
        }
        error => error.to_string(),
    }
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
    fn what_cannot_be_mounted_says_why() {
        let target = tempfile::tempdir().unwrap();
        let wanted = |source: &str, target: &str, fstype: &str| Mount {
            source: source.into(),
            target: target.into(),
            fstype: fstype.into(),
            options: vec![],
        };
        let at = target.path().join("deep/er");
        let path = at.to_str().unwrap();
        let why = one(&wanted("serial:no-such-drive", path, "ext4"), Instant::now()).unwrap_err();
        assert!(why.contains("no drive with serial \"no-such-drive\""), "{why}");
        assert!(at.is_dir());
        assert!(one(&wanted("none", "relative", "tmpfs"), Instant::now()).is_err());
        let why = explained(Errno::ENODEV, &wanted("serial:x", path, "nofs"), Path::new("/dev/vdb"));
        assert!(why.contains("filesystem nofs"), "{why}");
        // What is a mount point already stays as it is, by whatever name.
        let link = target.path().join("link");
        std::os::unix::fs::symlink("/proc", &link).unwrap();
        assert_eq!(one(&wanted("serial:x", link.to_str().unwrap(), "ext4"), Instant::now()), Ok(()));
    }

    #[test]
    fn fstab_options_are_split_into_flags_and_data() {
        let words =
            ["defaults,ro", "noatime", "size=1m,mode=0700", "x-systemd.automount", "rw"].map(String::from);
        assert_eq!(options(&words), (MsFlags::MS_NOATIME, "size=1m,mode=0700".into()));
    }
}
