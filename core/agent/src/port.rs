//! The guest's end of the virtio-serial port, as a carrier of channel sessions.
//!
//! The port has no connections, only a host that is attached or not; a host that leaves and comes back
//! quickly goes unnoticed. So besides hang-ups the carrier watches for the opening words of a new session in the stream
//! of the running one, ends that and keeps the words for the next. Payload cannot imitate them: SSH is encrypted
//! and JSON has no NUL.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};
use vm_channel::HELLO;
use vm_types::guest::CHANNEL_PORT;

/// What carries the guest channel in a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// [`Port`].
    VirtioSerial,
    /// [`crate::vsock`].
    Vsock,
}

/// The carrier that this machine has a device for; of several, the one that VMMs with a choice offer it on.
pub(crate) fn carrier() -> Option<Carrier> {
    let entries = fs::read_dir("/sys/bus/virtio/devices").into_iter().flatten().flatten();
    choose(entries.filter_map(|entry| {
        let id = fs::read_to_string(entry.path().join("device")).ok()?;
        u32::from_str_radix(id.trim().strip_prefix("0x")?, 16).ok()
    }))
}

/// By device ids (virtio 1.2, section 5).
fn choose(devices: impl Iterator<Item = u32>) -> Option<Carrier> {
    const CONSOLE: u32 = 3;
    const VSOCK: u32 = 19;
    let ids: Vec<_> = devices.collect();
    match (ids.contains(&CONSOLE), ids.contains(&VSOCK)) {
        (true, _) => Some(Carrier::VirtioSerial),
        (false, true) => Some(Carrier::Vsock),
        (false, false) => None,
    }
}

/// The guest channel's port.
pub(crate) struct Port {
    file: File,
    /// Bytes read in a former session that belong to the next.
    kept: Vec<u8>,
}

impl Port {
    /// Finds the port by name, waiting for it a little.
    pub(crate) async fn open() -> io::Result<Self> {
        let mut pause = Duration::from_millis(5);
        let path = loop {
            match find() {
                Some(path) if path.exists() => break path,
                _ if pause > Duration::from_secs(5) => {
                    return Err(io::Error::new(
                        io::ErrorKind::NotFound,
                        format!("no virtio port {CHANNEL_PORT}"),
                    ));
                }
                _ => tokio::time::sleep(pause).await,
            }
            pause *= 2;
        };
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        Ok(Self { file, kept: Vec::new() })
    }

    /// A carrier for one session, once a host is attached.
    pub(crate) async fn session(&mut self) -> io::Result<Session<'_>> {
        while !attached(&self.file) {
            // A port tells of an attaching host by no event that epoll would report after a hang-up.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Registered anew each time: a hang-up, once seen, stays in tokio's registration.
        let file = watched(self.file.try_clone()?)?;
        Ok(Session {
            file,
            stream: Stream { pending: std::mem::take(&mut self.kept), ..Stream::default() },
            keep: &mut self.kept,
        })
    }
}

/// A file that tokio watches.
pub(crate) fn watched(file: File) -> io::Result<AsyncFd<File>> {
    #[expect(unsafe_code, reason = "AsyncFd trusts its object to keep its descriptor")]
    // SAFETY: a File owns one descriptor, the same from here to its drop.
    let watched = unsafe { AsyncFd::register(file) };
    Ok(watched?)
}

fn find() -> Option<PathBuf> {
    fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim_end() == CHANNEL_PORT).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

fn attached(file: &File) -> bool {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => !fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)),
        Err(_) => false,
    }
}

/// What has been read, and where it belongs.
#[derive(Default)]
struct Stream {
    /// Read before, not yet delivered.
    pending: Vec<u8>,
    /// The handshake is over: another hello means another session.
    established: bool,
    /// How many bytes of a hello the stream ends with.
    matched: usize,
    /// The next session has begun; this one gets nothing more.
    ended: bool,
}

impl Stream {
    /// Takes note of what was read; `false` if a new session has begun in it.
    fn accept(&mut self, bytes: &[u8]) -> bool {
        if !self.established {
            return true;
        }
        let mut at = 0;
        while at < bytes.len() {
            if self.matched == 0 {
                // All payload comes by here, so it is not looked at byte by byte.
                let Some(next) = memchr::memchr(HELLO[0], &bytes[at..]) else { break };
                at += next;
            }
            // The first byte occurs in the words only there, so a mismatch can restart only at it.
            self.matched = if bytes[at] == HELLO[self.matched] {
                self.matched + 1
            } else {
                usize::from(bytes[at] == HELLO[0])
            };
            at += 1;
            if self.matched == HELLO.len() {
                self.ended = true;
                self.pending = [HELLO.as_slice(), &bytes[at..]].concat();
                return false;
            }
        }
        true
    }

    /// What the next session must begin with.
    fn rest(&mut self) -> Vec<u8> {
        if self.ended { std::mem::take(&mut self.pending) } else { HELLO[..self.matched].to_vec() }
    }
}

/// One session's carrier.
pub(crate) struct Session<'port> {
    file: AsyncFd<File>,
    stream: Stream,
    keep: &'port mut Vec<u8>,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        *self.keep = self.stream.rest();
    }
}

impl AsyncRead for Session<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.stream.ended {
            return Poll::Ready(Ok(()));
        }
        if !this.stream.pending.is_empty() {
            let length = buffer.remaining().min(this.stream.pending.len());
            buffer.put_slice(&this.stream.pending[..length]);
            this.stream.pending.drain(..length);
            return Poll::Ready(Ok(()));
        }
        loop {
            let mut guard = ready!(this.file.poll_read_ready(context))?;
            let hung_up = guard.ready().is_read_closed();
            let result = guard.try_io(|file| file.get_ref().read(buffer.initialize_unfilled()));
            match result {
                Ok(Ok(length)) => {
                    let start = buffer.filled().len();
                    buffer.advance(length);
                    if !this.stream.accept(&buffer.filled()[start..]) {
                        buffer.set_filled(start);
                    }
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) if hung_up => return Poll::Ready(Ok(())),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for Session<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        // The guest's first words are its answer to the hello.
        this.stream.established = true;
        loop {
            let mut guard = ready!(this.file.poll_write_ready(context))?;
            let hung_up = guard.ready().is_write_closed();
            match guard.try_io(|file| file.get_ref().write(bytes)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_) if hung_up => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                Err(_) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_goes_before_vsock() {
        assert_eq!(choose([1, 2, 19].into_iter()), Some(Carrier::Vsock));
        assert_eq!(choose([19, 3, 2].into_iter()), Some(Carrier::VirtioSerial));
        assert_eq!(choose([1, 2].into_iter()), None);
    }

    #[test]
    fn a_hello_amid_a_session_begins_the_next() {
        for split in 0..HELLO.len() {
            let mut stream = Stream { established: true, ..Stream::default() };
            let bytes = [b"fra\0\0vmd\0".as_slice(), HELLO, b"nonce"].concat();
            let (first, second) = bytes.split_at(9 + split);
            assert!(stream.accept(first));
            assert!(!stream.accept(second));
            assert!(stream.ended);
            assert_eq!(stream.rest(), [HELLO.as_slice(), b"nonce"].concat());
        }
    }

    #[test]
    fn a_session_that_fails_amid_a_hello_leaves_its_beginning() {
        let mut stream = Stream { established: true, ..Stream::default() };
        assert!(stream.accept(&[b"data", &HELLO[..9]].concat()));
        assert_eq!(stream.rest(), &HELLO[..9]);
        // The handshake's own hello is none of that.
        let mut stream = Stream::default();
        assert!(stream.accept(HELLO));
        assert!(stream.rest().is_empty());
    }
}
