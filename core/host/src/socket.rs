//! Connecting to sockets in directories of less trusted users.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::AsRawFd,
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

#[cfg(test)]
mod tests {
    use super::*;

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
