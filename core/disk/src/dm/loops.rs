//! Loop devices (loop(4)) that go away with their last user.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use linux_raw_sys::loop_device as sys;
use nix::{errno::Errno, libc, sys::stat::SFlag};

use super::node;

/// `/dev/loop-control` (Documentation/admin-guide/devices.txt).
const CONTROL: (u32, u32) = (10, 237);
const READ_ONLY: u32 = sys::LO_FLAGS_READ_ONLY as u32;
const AUTOCLEAR: u32 = sys::LO_FLAGS_AUTOCLEAR as u32;
const DIRECT_IO: u32 = sys::LO_FLAGS_DIRECT_IO as u32;
/// How often another process may take the free device that we were given.
const TRIES: usize = 64;

/// A loop device that is attached as long as this, or another user of it, is there.
#[derive(Debug)]
pub(crate) struct Loop {
    device: File,
    pub(crate) dev: u64,
}

/// What is behind a loop device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Attached {
    file: (u64, u64),
    flags: u32,
    whole: bool,
}

/// Opens the loop driver's control device.
pub(crate) fn control(nodes: &Path) -> io::Result<File> {
    node::open(nodes, SFlag::S_IFCHR, libc::makedev(CONTROL.0, CONTROL.1), true)
}

/// The loop device of a file: the one that is there, else a new one.
///
/// # Errors
/// EBUSY where a writable one is to be made and somebody else's loop is on the file.
pub(crate) fn attach(nodes: &Path, listed: &Listed, path: &Path, read_only: bool) -> io::Result<Loop> {
    let file = fs::OpenOptions::new().read(true).write(!read_only).open(path)?;
    let about = file.metadata()?;
    for &index in listed.of(path) {
        let Some((found, attached)) = look(nodes, index, !read_only)? else { continue };
        if attached.file != (about.dev(), about.ino()) {
            continue;
        }
        let wanted = AUTOCLEAR | if read_only { READ_ONLY } else { 0 };
        if attached.whole && attached.flags & (AUTOCLEAR | READ_ONLY) == wanted {
            return Ok(found);
        }
        if !read_only {
            return Err(Errno::EBUSY.into());
        }
    }
    let control = control(nodes)?;
    for _ in 0..TRIES {
        let index = get_free(&control)?;
        let dev = node::number_in(&sysfs(index).join("dev"))?;
        let device = match node::open(nodes, SFlag::S_IFBLK, dev, true) {
            Ok(device) => device,
            // Removed since, or on its way out.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => continue,
            Err(error) => return Err(error),
        };
        match configure(&device, &file, read_only) {
            Ok(()) => return Ok(Loop { device, dev }),
            // Another process was given it too.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::EBUSY.into())
}

/// The device and inode of the file behind a loop device, by the device's number.
pub(crate) fn file_behind(nodes: &Path, dev: u64) -> io::Result<Option<(u64, u64)>> {
    let device = match node::open(nodes, SFlag::S_IFBLK, dev, false) {
        Ok(device) => device,
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(status(&device)?.map(|attached| attached.file))
}

impl Loop {
    /// Takes the file's new length over.
    pub(crate) fn refresh_size(&self) -> io::Result<()> {
        simple(self.device.as_raw_fd(), sys::LOOP_SET_CAPACITY).map(drop)
    }
}

/// Opens a loop device that is attached.
pub(crate) fn reopen(nodes: &Path, dev: u64) -> io::Result<Loop> {
    let device = node::open(nodes, SFlag::S_IFBLK, dev, true)?;
    match status(&device)? {
        Some(_) => Ok(Loop { device, dev }),
        None => Err(Errno::ENXIO.into()),
    }
}

fn sysfs(index: u32) -> PathBuf {
    format!("/sys/block/loop{index}").into()
}

/// Which loop devices may be of which file, as sysfs had it once.
#[derive(Debug)]
pub(crate) struct Listed(HashMap<PathBuf, Vec<u32>>);

impl Listed {
    /// Looks at all of them.
    pub(crate) fn now() -> io::Result<Self> {
        let mut listed: HashMap<_, Vec<_>> = HashMap::new();
        for entry in fs::read_dir("/sys/block")?.flatten() {
            let index = entry.file_name().to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
            let Some(index) = index else { continue };
            let Ok(file) = fs::read_to_string(sysfs(index).join("loop/backing_file")) else { continue };
            listed.entry(end(Path::new(file.trim_end_matches('\n')))).or_default().push(index);
        }
        Ok(Self(listed))
    }

    fn of(&self, path: &Path) -> &[u32] {
        // A registered image's base is a symbolic link; the kernel knows the file.
        let real = fs::canonicalize(path);
        self.0.get(&end(real.as_deref().unwrap_or(path))).map_or(&[], Vec::as_slice)
    }
}

/// The last two names of a path, which may be shown as another mount namespace has it. All deltas have the same last name.
fn end(path: &Path) -> PathBuf {
    let mut names: Vec<_> = path.components().rev().take(2).collect();
    names.reverse();
    names.into_iter().collect()
}

/// `None` for one that is detached, or just being.
fn look(nodes: &Path, index: u32, write: bool) -> io::Result<Option<(Loop, Attached)>> {
    let Ok(dev) = node::number_in(&sysfs(index).join("dev")) else { return Ok(None) };
    let device = match node::open(nodes, SFlag::S_IFBLK, dev, write) {
        Ok(device) => device,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => return Ok(None),
        // A read-only one that was asked for to write to: somebody else's.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EROFS)) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(status(&device)?.map(|attached| (Loop { device, dev }, attached)))
}

fn configure(device: &File, file: &File, read_only: bool) -> io::Result<()> {
    let mut config =
        sys::loop_config { fd: file.as_raw_fd() as u32, block_size: 0, info: blank(), __reserved: [0; 8] };
    // What is written is cached already by whoever uses the disk; the base is best cached once for all.
    config.info.lo_flags = AUTOCLEAR | if read_only { READ_ONLY } else { DIRECT_IO };
    set(device.as_raw_fd(), &config)
}

fn status(device: &File) -> io::Result<Option<Attached>> {
    let mut info = blank();
    match get(device.as_raw_fd(), &mut info) {
        Ok(()) => Ok(Some(Attached {
            file: (info.lo_device, info.lo_inode),
            flags: info.lo_flags,
            whole: info.lo_offset == 0 && info.lo_sizelimit == 0,
        })),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

fn blank() -> sys::loop_info64 {
    sys::loop_info64 {
        lo_device: 0,
        lo_inode: 0,
        lo_rdevice: 0,
        lo_offset: 0,
        lo_sizelimit: 0,
        lo_number: 0,
        lo_encrypt_type: 0,
        lo_encrypt_key_size: 0,
        lo_flags: 0,
        lo_file_name: [0; 64],
        lo_crypt_name: [0; 64],
        lo_encrypt_key: [0; 32],
        lo_init: [0; 2],
    }
}

fn get_free(control: &File) -> io::Result<u32> {
    simple(control.as_raw_fd(), sys::LOOP_CTL_GET_FREE).map(|index| index as u32)
}

#[expect(unsafe_code, reason = "nix wraps no ioctl of loop devices")]
fn simple(fd: RawFd, request: u32) -> io::Result<i32> {
    // SAFETY: these requests take no argument.
    Ok(Errno::result(unsafe { libc::ioctl(fd, request as _, 0) })?)
}

#[expect(unsafe_code, reason = "nix wraps no ioctl of loop devices")]
fn set(fd: RawFd, config: &sys::loop_config) -> io::Result<()> {
    // SAFETY: LOOP_CONFIGURE reads a `loop_config`.
    Errno::result(unsafe { libc::ioctl(fd, sys::LOOP_CONFIGURE as _, std::ptr::from_ref(config)) })?;
    Ok(())
}

#[expect(unsafe_code, reason = "nix wraps no ioctl of loop devices")]
fn get(fd: RawFd, info: &mut sys::loop_info64) -> io::Result<()> {
    // SAFETY: LOOP_GET_STATUS64 writes a `loop_info64`.
    Errno::result(unsafe { libc::ioctl(fd, sys::LOOP_GET_STATUS64 as _, std::ptr::from_mut(info)) })?;
    Ok(())
}
