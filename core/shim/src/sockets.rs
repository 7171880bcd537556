//! The shim's listening sockets.

use std::{
    fs,
    future::Future,
    io,
    os::{
        fd::AsFd,
        unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, chown},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};
use tokio_util::task::TaskTracker;
use vm_types::{VmPaths, layout::SOCKET_PATH_MAX};

use crate::error::StartError;

/// How often a peer that is not written to is looked after.
pub(crate) const HANG_UP_CHECK: Duration = Duration::from_secs(1);

/// A listening socket; its file is removed with it.
pub(crate) struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Listens on `path`. Open to `group` where there is one, else to the owner only. The process's umask must deny
    /// others, so that the socket is never more open than it should be.
    pub(crate) fn bind(path: PathBuf, group: Option<u32>) -> Result<Self, StartError> {
        if path.as_os_str().as_bytes().len() > SOCKET_PATH_MAX {
            return Err(StartError::SocketPath { path });
        }
        let bind = || {
            vm_host::files::remove_if_there(&path)?;
            let listener = UnixListener::bind(&path)?;
            open_to(&path, group)?;
            io::Result::Ok(listener)
        };
        match bind() {
            Ok(listener) => Ok(Self { listener, path }),
            Err(source) => Err(StartError::Socket { path, source }),
        }
    }

    /// Serves connections for ever, at most `limit` at once; more wait in the kernel's queue.
    pub(crate) async fn serve<F, Fut>(&self, limit: usize, tasks: &TaskTracker, serve: F)
    where
        F: Fn(UnixStream) -> Fut,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let slots = Arc::new(Semaphore::new(limit));
        loop {
            // Never closed, so this fails never.
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let connection = serve(stream);
                    tasks.spawn(async move {
                        connection.await;
                        drop(slot);
                    });
                }
                // Out of descriptors or memory: others may give some back.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Opens a socket to `group` where there is one, else to the owner only. Closed first, so that no former group gets in between.
fn open_to(path: &Path, group: Option<u32>) -> io::Result<()> {
    let set_mode = |mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    set_mode(0o600)?;
    chown(path, None, Some(group.unwrap_or_else(|| nix::unistd::getegid().as_raw())))?;
    if group.is_some() { set_mode(0o660) } else { Ok(()) }
}

/// Opens those sockets of a shim that runs, which people use, to the `group` that may use the daemon now.
///
/// # Errors
/// A socket that is not there or cannot be changed.
pub fn share(paths: &VmPaths, group: Option<u32>) -> io::Result<()> {
    [paths.ssh_sock(), paths.console_sock()].iter().try_for_each(|path| open_to(path, group))
}

/// Whether the peer has closed its socket altogether. End-of-file alone does not say that: a peer may have shut down
/// only its own direction.
pub(crate) fn hung_up(stream: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
        && fds[0].revents().is_some_and(|r| r.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

/// Ends when the peer has closed its socket altogether.
pub(crate) async fn wait_hang_up(stream: &impl AsFd) {
    while !hung_up(stream) {
        tokio::time::sleep(HANG_UP_CHECK).await;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn sockets_of_a_vm_that_runs_follow_the_group() {
        let dir = tempfile::tempdir().unwrap();
        let paths = VmPaths { run: dir.path().to_owned(), state: dir.path().to_owned() };
        let sockets = [paths.ssh_sock(), paths.console_sock()];
        let _bound = sockets.clone().map(|path| Socket::bind(path, None).unwrap());
        let own = nix::unistd::getegid().as_raw();
        for (group, open_to) in
            [(None, (0o600, own)), (Some(7), (0o660, 7)), (Some(8), (0o660, 8)), (None, (0o600, own))]
        {
            share(&paths, group).unwrap();
            for path in &sockets {
                let about = fs::metadata(path).unwrap();
                assert_eq!((about.mode() & 0o777, about.gid()), open_to, "{}", path.display());
            }
        }
    }
}
