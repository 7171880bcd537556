//! The root drive: finding, mounting, growing it and moving onto it.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    unistd::{chdir, chroot},
};
use vm_types::guest::{config::Root, initramfs, kernel_args};

use super::BootError;
use crate::link::HOME;

/// How long a drive may take to appear. virtio drives are there when their driver has loaded; this is for hot-plug.
const DRIVE_PATIENCE: Duration = Duration::from_secs(10);

/// The device node of the block device with this virtio serial (`VIRTIO_BLK_T_GET_ID`: at most 20 bytes), or the one that the
/// kernel's command line calls so.
fn device_by_serial(serial: &str) -> Option<PathBuf> {
    let wanted = &serial.as_bytes()[..serial.len().min(20)];
    let mut drives = drives().into_iter();
    drives.find(|(_, found)| found.as_bytes() == wanted).map(|(name, _)| Path::new("/dev").join(name))
}

/// Names and serials of the drives.
fn drives() -> Vec<(String, String)> {
    let entries = || fs::read_dir("/sys/block").into_iter().flatten().flatten();
    match crate::cmdline::value(kernel_args::DRIVES) {
        None => entries()
            .filter_map(|entry| {
                let serial = fs::read_to_string(entry.path().join("serial")).ok()?;
                let name = entry.file_name().into_string().ok()?;
                Some((name, serial.trim_end_matches(['\n', '\0']).to_owned()))
            })
            .collect(),
        Some(serials) => in_order(
            entries()
                .filter_map(|entry| {
                    let device = entry.path().join("device").canonicalize().ok()?;
                    let number = device.file_name()?.to_str()?.strip_prefix("virtio")?.parse().ok()?;
                    Some((number, entry.file_name().into_string().ok()?))
                })
                .collect(),
            &serials,
        ),
    }
}

/// Gives drives their serials by the order of their devices; none as long as one is missing, which could be any.
fn in_order(mut devices: Vec<(u32, String)>, serials: &str) -> Vec<(String, String)> {
    let serials: Vec<_> = serials.split(',').filter(|serial| !serial.is_empty()).collect();
    if devices.len() < serials.len() {
        return Vec::new();
    }
    devices.sort_unstable();
    devices.into_iter().map(|(_, name)| name).zip(serials.into_iter().map(str::to_owned)).collect()
}

fn wait_for_drive(serial: &str) -> Result<PathBuf, BootError> {
    drive(serial, Instant::now() + DRIVE_PATIENCE).map_err(|present| BootError::NoRootDrive {
        serial: serial.to_owned(),
        seconds: DRIVE_PATIENCE.as_secs(),
        present,
    })
}

/// [`device_by_serial`], waited for.
///
/// # Errors
/// The drives that are there instead, as `name=serial`.
pub(crate) fn drive(serial: &str, deadline: Instant) -> Result<PathBuf, Vec<String>> {
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(device) = device_by_serial(serial)
            && device.exists()
        {
            return Ok(device);
        }
        if Instant::now() >= deadline {
            return Err(drives().into_iter().map(|(name, serial)| format!("{name}={serial}")).collect());
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

pub(super) fn mount_root(root: &Root, target: &Path) -> Result<(), BootError> {
    let device = wait_for_drive(&root.serial)?;
    fs::create_dir_all(target)
        .map_err(|source| BootError::PrepareRoot { path: target.to_owned(), source })?;
    // Zeroing inode tables in the background would write most of a fresh overlay.
    let data = (root.fstype == "ext4").then_some("noinit_itable");
    mount(Some(&device), target, Some(root.fstype.as_str()), MsFlags::empty(), data).map_err(|source| {
        BootError::MountRoot { device: device.display().to_string(), fstype: root.fstype.clone(), source }
    })
}

/// Gives the new root what every Linux userland expects, with the mounts made so far and the initramfs inside.
pub(super) fn prepare(new: &Path) -> Result<(), BootError> {
    for name in ["proc", "sys", "dev", "run", "tmp", "etc"] {
        directory(new, name)?;
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |errno: nix::Error| BootError::PrepareRoot { path, source: errno.into() }
    };
    for name in ["proc", "sys", "dev"] {
        let path = directory(new, name)?;
        mount(Some(&Path::new("/").join(name)), &path, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(failed(&path))?;
    }
    let secure = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let tmpfs = |path: &Path, data: &str| {
        let _ = fs::create_dir(path);
        mount(Some("tmpfs"), path, Some("tmpfs"), secure, Some(data)).map_err(failed(path))
    };
    let (run, dev) = (directory(new, "run")?, directory(new, "dev")?);
    tmpfs(&run, "mode=0755")?;
    tmpfs(&dev.join("shm"), "mode=1777")?;
    let pts = dev.join("pts");
    let _ = fs::create_dir(&pts);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("devpts"), &pts, Some("devpts"), flags, Some("gid=5,mode=0620,ptmxmode=0666"))
        .map_err(failed(&pts))?;
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let _ = symlink(target, dev.join(link));
    }
    // The kernel finds its module helper by this name.
    let _ = fs::hard_link(Path::new("/").join(initramfs::INIT), "/modprobe");
    // It holds the SSH host key, and will be visible in the guest.
    let config = Path::new("/").join(initramfs::CONFIG);
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600))
        .map_err(|source| BootError::PrepareRoot { path: config, source })?;
    let home = run.join(HOME.trim_start_matches("/run/"));
    fs::create_dir(&home).map_err(|source| BootError::PrepareRoot { path: home.clone(), source })?;
    mount(Some("/"), &home, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(failed(&home))
}

/// The directory of this name in the new root, made if it is not there. Links of the image are followed as they will be
/// once it is `/`.
fn directory(new: &Path, name: &str) -> Result<PathBuf, BootError> {
    let path = crate::init::place(new, Path::new(name)).ok_or_else(|| BootError::PrepareRoot {
        path: new.join(name),
        source: io::Error::from_raw_os_error(libc::ELOOP),
    })?;
    if !path.is_dir() {
        let mode = if name == "tmp" { 0o1777 } else { 0o755 };
        fs::create_dir_all(&path)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .map_err(|source| BootError::PrepareRoot { path: path.clone(), source })?;
    }
    Ok(path)
}

/// Makes `new` the root of PID 1 and of the kernel's helpers, which share its root.
pub(super) fn switch(new: &Path) -> Result<(), BootError> {
    let failed = |source| BootError::SwitchRoot { source };
    chdir(new).map_err(failed)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(failed)?;
    chroot(".").map_err(failed)?;
    chdir("/").map_err(failed)?;
    let _ = fs::write("/proc/sys/kernel/modprobe", format!("{HOME}/modprobe"));
    Ok(())
}

nix::ioctl_read!(
    /// `BLKGETSIZE64` of <linux/fs.h>, whose argument is declared `size_t`.
    blkgetsize64,
    0x12,
    114,
    u64
);
nix::ioctl_write_ptr!(
    /// `EXT4_IOC_RESIZE_FS` of <linux/ext4.h>: the new size in blocks.
    ext4_resize_fs,
    b'f',
    16,
    u64
);

/// Grows the mounted ext4 root to its drive's size, if that is larger; returns the filesystem's size in bytes. A drive that
/// is to have `at_least` so many bytes is waited for: the kernel hears of a change a moment after the VMM made it.
///
/// # Errors
/// Whatever reading the sizes or the kernel's online resize says.
pub(crate) fn grow(serial: &str, at_least: u64) -> io::Result<u64> {
    let device = device_by_serial(serial).ok_or(io::ErrorKind::NotFound)?;
    let drive = File::open(device)?;
    let mut bytes = size(&drive)?;
    let deadline = Instant::now() + DRIVE_PATIENCE;
    while bytes < at_least {
        if Instant::now() >= deadline {
            return Err(io::Error::other(format!("the drive has {bytes} bytes and not {at_least}")));
        }
        std::thread::sleep(Duration::from_millis(5));
        bytes = size(&drive)?;
    }
    let root = File::open("/")?;
    let (block_size, blocks) = superblock(&drive)?;
    let wanted = bytes / block_size;
    // A rest smaller than a block group's metadata cannot be used.
    if wanted <= blocks {
        return Ok(blocks * block_size);
    }
    #[expect(unsafe_code, reason = "ioctl")]
    // SAFETY: EXT4_IOC_RESIZE_FS reads one u64 where the pointer says, which outlives the call.
    unsafe {
        ext4_resize_fs(root.as_raw_fd(), &raw const wanted)?;
    }
    let (block_size, blocks) = superblock(&drive)?;
    Ok(blocks * block_size)
}

/// Of a block device, in bytes.
fn size(drive: &File) -> io::Result<u64> {
    let mut bytes = 0;
    #[expect(unsafe_code, reason = "ioctl")]
    // SAFETY: BLKGETSIZE64 stores one u64 where the pointer says, which outlives the call.
    unsafe {
        blkgetsize64(drive.as_raw_fd(), &raw mut bytes)?;
    }
    Ok(bytes)
}

/// Block size in bytes and number of blocks, from the superblock at byte 1024 of the drive
/// (Documentation/filesystems/ext4/super.rst). statfs(2) would not do: it leaves out the filesystem's overhead.
fn superblock(drive: &File) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::FileExt;
    let mut block = [0; 1024];
    drive.read_exact_at(&mut block, 1024)?;
    let u32_at = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    if u16::from_le_bytes([block[0x38], block[0x39]]) != 0xef53 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the root is not ext4"));
    }
    let high = if u32_at(0x60) & 0x80 == 0 { 0 } else { u64::from(u32_at(0x150)) };
    Ok((1024 << u32_at(0x18), u64::from(u32_at(0x4)) | high << 32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drives_without_serials_are_known_by_the_order_of_their_devices() {
        let devices =
            |names: &[(u32, &str)]| names.iter().map(|(n, name)| (*n, (*name).to_owned())).collect();
        let found = in_order(devices(&[(10, "vdb"), (2, "vda"), (11, "vdc")]), "root,data");
        let pairs: Vec<_> = found.iter().map(|(name, serial)| (name.as_str(), serial.as_str())).collect();
        assert_eq!(pairs, [("vda", "root"), ("vdb", "data")]);
        assert!(in_order(devices(&[(2, "vda")]), "root,data").is_empty(), "the other one may be the root");
        assert!(in_order(devices(&[(2, "vda")]), "").is_empty());
    }

    #[test]
    fn links_of_the_image_lead_to_directories_in_the_image() {
        let root = tempfile::tempdir().unwrap();
        symlink("/var/run", root.path().join("run")).unwrap();
        symlink("/var/tmp", root.path().join("tmp")).unwrap();
        symlink("etc", root.path().join("etc")).unwrap();
        fs::write(root.path().join("dev"), "").unwrap();
        assert_eq!(directory(root.path(), "run").unwrap(), root.path().join("var/run"));
        let tmp = directory(root.path(), "tmp").unwrap();
        assert_eq!(fs::metadata(&tmp).unwrap().permissions().mode() & 0o7777, 0o1777);
        for bad in ["etc", "dev"] {
            let hint = directory(root.path(), bad).unwrap_err().hint().unwrap();
            assert!(hint.contains("other than a directory"), "{hint}");
        }
    }
}
