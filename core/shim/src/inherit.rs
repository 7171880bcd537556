//! What the shim opens for its VMM: descriptors with numbers that the VMM's command line names.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
};

use vm_host::tap::Tap;
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
        Inherited::Tap { name } => Tap::attach(name)
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
