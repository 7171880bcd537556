//! Taps as VMMs have them: one queue, no packet information (Linux, Documentation/networking/tuntap.rst).

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::libc;

/// An open tap. Whoever has one has it alone.
#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Opens a tap that nobody has open; where there is none it is made, and goes with the descriptor unless it is [kept](Self::keep).
    ///
    /// # Errors
    /// `/dev/net/tun` cannot be opened; the name is another device's, is in use (`EBUSY`), is another user's, or is too long.
    pub fn create(name: &str) -> io::Result<Self> {
        Self::open(name, libc::IFF_TAP | libc::IFF_NO_PI)
    }

    /// Opens a tap that is there and that nobody has open, with virtio's header before each frame.
    ///
    /// # Errors
    /// As of [`Self::create`]; there is none (`ENODEV`).
    pub fn attach(name: &str) -> io::Result<Self> {
        // It would be made if it were not there, and go with the VMM unseen.
        nix::net::if_::if_nametoindex(name)?;
        Self::open(name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
    }

    #[expect(unsafe_code, reason = "nix wraps no TUNSETIFF")]
    fn open(name: &str, flags: libc::c_int) -> io::Result<Self> {
        // The last byte stays the final NUL.
        if name.len() >= libc::IFNAMSIZ {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: ifreq is plain data for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the descriptor is open and `request` is an ifreq that lives through the call.
        let set = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(tun)) }
    }

    /// From now on only this user attaches to it, and who may configure the network. Without an owner it is anybody's who can open
    /// `/dev/net/tun`, as everybody can.
    ///
    /// # Errors
    /// ioctl(2).
    #[expect(unsafe_code, reason = "nix wraps no TUNSETOWNER")]
    pub fn give_to(&self, user: u32) -> io::Result<()> {
        // SAFETY: the descriptor is open, and TUNSETOWNER takes an integer.
        let set = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(user)) };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// It outlives the descriptor.
    ///
    /// # Errors
    /// ioctl(2).
    #[expect(unsafe_code, reason = "nix wraps no TUNSETPERSIST")]
    pub fn keep(&self) -> io::Result<()> {
        // SAFETY: the descriptor is open, and TUNSETPERSIST takes an integer.
        let set = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETPERSIST, 1 as libc::c_ulong) };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_too_long_is_not_cut_off() {
        let error = Tap::create("sixteen-bytes-ab").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
    }
}
