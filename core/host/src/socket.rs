//! Connecting to sockets in directories of less trusted users, and knowing who has connected.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
};

use nix::libc;
use tokio::net::UnixStream;

/// Connects to the Unix socket that is at `path` itself. Who may write to its directory can put another of their sockets there, but cannot
/// have us connect to somebody else's by a symbolic link. The directories above are not looked at.
///
/// # Errors
/// As connect(2) on a Unix socket; also what is there being no socket.
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    let held = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
    if !held.metadata()?.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::ConnectionRefused,
            "there is something else than a socket",
        ));
    }
    UnixStream::connect(format!("/proc/self/fd/{}", held.as_raw_fd())).await
}

/// The supplementary groups of who is at the other end of a Unix socket, as they were at its connect(2), see unix(7).
///
/// # Errors
/// As getsockopt(2).
#[expect(unsafe_code, reason = "the libraries do not have this option")]
pub fn peer_groups(socket: &impl AsFd) -> io::Result<Vec<u32>> {
    /// `asm-generic/socket.h`; the C library's bindings leave it out.
    const SO_PEERGROUPS: libc::c_int = 59;
    let mut groups: Vec<u32> = vec![0; 32];
    loop {
        let room = size_of_val(groups.as_slice());
        let mut length = libc::socklen_t::try_from(room).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `length` bytes, which the vector has.
        let answer = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = length as usize / size_of::<u32>();
        match answer {
            0 => {
                groups.truncate(count);
                return Ok(groups);
            }
            // There are more than there is room for.
            _ if io::Error::last_os_error().raw_os_error() == Some(libc::ERANGE) && count > groups.len() => {
                groups.resize(count, 0);
            }
            _ => return Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(unsafe_code, reason = "the C library would change the groups of all threads")]
    fn groups_are_those_of_the_process_that_connected() {
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let own: Vec<_> = nix::unistd::getgroups().unwrap().iter().map(|group| group.as_raw()).collect();
        assert_eq!(peer_groups(&near).unwrap(), own);
        // More than there is room for at first, had by this thread only.
        let many: Vec<u32> = (100_000..100_100).collect();
        let wanted = many.clone();
        let near = std::thread::spawn(move || {
            // SAFETY: the kernel reads as many numbers as the vector has.
            let set = unsafe { libc::syscall(libc::SYS_setgroups, many.len(), many.as_ptr()) };
            assert_eq!(set, 0, "needs root: {}", io::Error::last_os_error());
            std::os::unix::net::UnixStream::pair().unwrap()
        });
        assert_eq!(peer_groups(&near.join().unwrap().0).unwrap(), wanted);
    }

    #[tokio::test]
    async fn a_socket_is_reached_and_a_link_to_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, link) = (dir.path().join("socket"), dir.path().join("link"));
        assert_eq!(connect(&socket).await.unwrap_err().kind(), io::ErrorKind::NotFound);
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        connect(&socket).await.unwrap();
        assert_eq!(connect(&link).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        drop(listener);
        assert_eq!(connect(&socket).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
