//! What the shim opens for its VMM: descriptors with numbers that the VMM's command line names.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
};

use nix::libc;
use vm_types::{
    layout::SOCKET_PATH_MAX,
    shim::{FIRST_INHERITED, Inherited},
};

use crate::error::StartError;

/// Opens these, in order, each with its number.
pub(crate) fn open(wanted: &[Inherited]) -> Result<Vec<OwnedFd>, StartError> {
    (FIRST_INHERITED..).zip(wanted).map(|(number, wanted)| open_one(number, wanted)).collect()
}

fn open_one(number: i32, wanted: &Inherited) -> Result<OwnedFd, StartError> {
    match wanted {
        Inherited::Listener { path } => {
            if path.as_os_str().len() > SOCKET_PATH_MAX {
                return Err(StartError::SocketPath { path: path.clone() });
            }
            let listen = || {
                vm_host::files::remove_if_there(path)?;
                at(number, UnixListener::bind(path)?.as_fd())
            };
            listen().map_err(|source| StartError::Socket { path: path.clone(), source })
        }
        Inherited::Tap { name } => attach(name)
            .and_then(|tap| at(number, tap.as_fd()))
            .map_err(|source| StartError::Tap { name: name.clone(), source }),
        Inherited::File { path } => OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .and_then(|file| at(number, file.as_fd()))
            .map_err(|source| StartError::Open { path: path.clone(), source }),
    }
}

/// The same descriptor under this number, which must be free. It is closed on exec, as all are until [`pass_on`].
pub(crate) fn at(number: i32, descriptor: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let same = rustix::io::fcntl_dupfd_cloexec(descriptor, number)?;
    if same.as_raw_fd() == number {
        Ok(same)
    } else {
        Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("descriptor {number} is in use")))
    }
}

/// Lets the program that is run next have them. Fit for a forked child.
pub(crate) fn pass_on(descriptors: &[OwnedFd]) -> io::Result<()> {
    for descriptor in descriptors {
        rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty())?;
    }
    Ok(())
}

/// Attaches to a tap that is there, as QEMU does by itself: no packet information, and virtio's header before each frame
/// (Linux, Documentation/networking/tuntap.rst).
#[expect(unsafe_code, reason = "nix wraps no TUNSETIFF")]
pub(crate) fn attach(name: &str) -> io::Result<File> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // It would be made if it were not there, and go with the VMM unseen.
    nix::net::if_::if_nametoindex(name)?;
    // SAFETY: ifreq is plain data for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // There is no device whose name is too long; the last byte stays the final NUL.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open and `request` is an ifreq that lives through the call.
    let set = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(tun) }
}
