//! The streams between two sides.
//!
//! ```text
//!  host ── pack, on a thread ── Pieces ──▶ Guest::unpack_tar
//!  Guest::pack ──▶ pipe ── unpack, on a thread ── host
//!  Guest::pack ──▶ pipe ──▶ Guest::unpack_tar
//! ```
//!
//! Of two ends that fail the one is told that failed first; the other only lost its partner.

use std::{
    cell::RefCell,
    io::{self, Read},
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use tokio_util::io::SyncIoBridge;
use vm_archive::{CHUNK, Failure, Output, Replaced, Unpacking, copy, pack, unpack};
use vm_guest::GuestError;
use vm_types::guest::files::{FileError, PackOptions, PackReport, UnpackOptions};

use super::place::{InGuest, Item, Side, Target};
use crate::{errors::CliError, stdio::Descriptor};

/// Pieces between a thread and a guest.
const PIECES: usize = 8;
/// Bytes in a pipe.
const PIPE: usize = 512 << 10;
/// On the host nothing gets rights that its owner, another one now, had.
const MODES: u32 = 0o777;

/// Threads that must come to their end before `vm` does: they remove what is not whole.
#[derive(Default)]
pub(super) struct Tasks(RefCell<JoinSet<()>>);

impl Tasks {
    fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> oneshot::Receiver<T> {
        let (end, result) = oneshot::channel();
        self.0.borrow_mut().spawn_blocking(move || drop(end.send(work())));
        result
    }

    /// Waits for all; their streams must be gone.
    pub(super) async fn end(self) {
        let mut tasks = self.0.into_inner();
        while tasks.join_next().await.is_some() {}
    }
}

/// What was copied.
#[derive(Debug, Default)]
pub(super) struct Copied {
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) warnings: Vec<String>,
}

impl Copied {
    /// One file.
    fn content(bytes: u64) -> Self {
        Self { files: 1, bytes, warnings: Vec::new() }
    }

    fn of(report: &PackReport) -> Self {
        Self { files: report.files, bytes: report.content, warnings: Vec::new() }
    }

    fn told(mut self, side: &Side, report: PackReport) -> Self {
        let place = match side {
            Side::Host => "on the host".to_owned(),
            Side::Guest(side) => format!("in VM {}", side.vm),
        };
        let told = |warning: FileError| format!("{place}: {}", warning.message);
        self.warnings.extend(report.warnings.into_iter().map(told));
        if report.more > 0 {
            self.warnings.push(format!("{place}: {} warnings more", report.more));
        }
        self
    }
}

pub(super) struct Transfer<'a> {
    pub(super) tasks: &'a Tasks,
    /// Bytes that have passed.
    pub(super) done: &'a Arc<AtomicU64>,
}

impl Transfer<'_> {
    /// Copies files, directories and links.
    pub(super) async fn tree(
        &self,
        from: &Side,
        to: &Side,
        item: &Item,
        target: &Target,
    ) -> Result<Copied, CliError> {
        match (from, to) {
            (Side::Host, Side::Guest(guest)) => {
                let report = self.to_guest(guest, item, target).await?;
                Ok(Copied::of(&report).told(from, report))
            }
            (Side::Guest(guest), Side::Host) => {
                let (packed, unpacked) = self.onto_host(guest, item, target).await?;
                Ok(Copied::of(&unpacked).told(from, packed).told(to, unpacked))
            }
            (Side::Guest(source), Side::Guest(guest)) => {
                let report = self.between(source, guest, item, target).await?;
                Ok(Copied::of(&report).told(from, report))
            }
            // Refused by the command line.
            (Side::Host, Side::Host) => Ok(Copied::default()),
        }
    }

    async fn to_guest(&self, to: &InGuest, item: &Item, target: &Target) -> Result<PackReport, CliError> {
        let (output, pieces) = mpsc::channel(PIECES);
        let (path, name) = (item.path.clone(), target.name.clone());
        let end = self.tasks.spawn(move || {
            let options = PackOptions { sparse: true, ..PackOptions::default() };
            pack(&path, name.as_deref(), &options, Replaced::new(), &Output(output))
        });
        let mut pieces = Pieces::new(pieces, end, self.done);
        let directory = target.directory.to_string_lossy();
        let (uid, gid) = (to.account.uid, to.account.gid);
        let unpacked = to.guest.unpack_tar(&mut pieces, &directory, uid, gid).await;
        pieces.outcome(unpacked.map_err(|error| to.failed(error))).await
    }

    async fn onto_host(
        &self,
        from: &InGuest,
        item: &Item,
        target: &Target,
    ) -> Result<(PackReport, PackReport), CliError> {
        let (near, far) = tokio::io::duplex(PIPE);
        let (directory, name) = (target.directory.clone(), target.name.clone());
        let unpacking = self.tasks.spawn(move || {
            let mut archive = SyncIoBridge::new(far);
            let how = Unpacking {
                owner: None,
                modes: MODES,
                only: name.as_deref(),
                careful: true,
                options: UnpackOptions::default(),
            };
            let report = unpack(&directory, how, &mut archive)?;
            // Whoever sends is to come to its end.
            let _ = copy(&mut archive, &mut io::sink());
            Ok(report)
        });
        let packing = async {
            let options = options(target)?;
            let to = Counted { inner: near, done: Arc::clone(self.done) };
            from.guest
                .pack(&item.path.to_string_lossy(), options, to)
                .await
                .map_err(|error| from.failed(error))
        };
        let (packed, unpacked) = tokio::join!(packing, unpacking);
        let unpacked = unpacked.unwrap_or(Err(Failure::Gone));
        match (packed, unpacked) {
            (Ok(packed), Ok(unpacked)) => Ok((packed.report, unpacked)),
            (Err(error), Err(_)) if !is_of_sink(&error) => Err(error),
            (_, Err(failure)) => {
                let place = format!("on the host, in {}", target.directory.display());
                Err(CliError::Archive { place, source: failure })
            }
            (Err(error), Ok(_)) => Err(error),
        }
    }

    async fn between(
        &self,
        from: &InGuest,
        to: &InGuest,
        item: &Item,
        target: &Target,
    ) -> Result<PackReport, CliError> {
        let (near, far) = tokio::io::duplex(PIPE);
        let options = options(target)?;
        let directory = target.directory.to_string_lossy();
        let near = Counted { inner: near, done: Arc::clone(self.done) };
        let path = item.path.to_string_lossy();
        let (packed, unpacked) = tokio::join!(
            from.guest.pack(&path, options, near),
            to.guest.unpack_tar(far, &directory, to.account.uid, to.account.gid)
        );
        match (packed, unpacked) {
            (Ok(packed), Ok(())) => Ok(packed.report),
            (Err(GuestError::Sink { .. }) | Ok(_), Err(error)) => Err(to.failed(error)),
            (Err(error), _) => Err(from.failed(error)),
        }
    }

    /// Unpacks stdin.
    pub(super) async fn archive_in(&self, to: &Side, directory: &str) -> Result<Copied, CliError> {
        let Side::Guest(to) = to else { return Ok(Copied::default()) };
        let mut pieces = self.stdin();
        let (uid, gid) = (to.account.uid, to.account.gid);
        let unpacked = to.guest.unpack(&mut pieces, directory, uid, gid).await;
        pieces.outcome(unpacked.map_err(|error| to.failed(error))).await?;
        Ok(Copied::default())
    }

    /// Writes stdin into a file.
    pub(super) async fn content_in(&self, to: &Side, path: &str, mode: u32) -> Result<Copied, CliError> {
        let Side::Guest(to) = to else { return Ok(Copied::default()) };
        let mut pieces = self.stdin();
        let (uid, gid) = (to.account.uid, to.account.gid);
        let written = to.guest.write_file(path, &mut pieces, mode, uid, gid).await;
        pieces.outcome(written.map_err(|error| to.failed(error))).await.map(Copied::content)
    }

    /// Stdin is read on a thread that nobody waits for: it may be stuck in a read.
    fn stdin(&self) -> Pieces<u64> {
        let (output, pieces) = mpsc::channel(PIECES);
        let (ended, end) = oneshot::channel();
        tokio::task::spawn_blocking(move || ended.send(read(io::stdin(), &Output(output))));
        Pieces::new(pieces, end, self.done)
    }

    /// Packs to stdout.
    pub(super) async fn archive_out(&self, from: &Side, item: &Item) -> Result<Copied, CliError> {
        let Side::Guest(guest) = from else { return Ok(Copied::default()) };
        let name = item.name.clone();
        // With its holes as zeros, for any program that reads archives.
        let options = PackOptions {
            sparse: false,
            ..options(&Target { directory: PathBuf::new(), name, mode: None })?
        };
        let path = item.path.to_string_lossy();
        let packed = self.stdout(guest, |to| guest.guest.pack(&path, options, to)).await?;
        Ok(Copied::of(&packed.report).told(from, packed.report))
    }

    /// Writes a file's content to stdout.
    pub(super) async fn content_out(&self, from: &Side, item: &Item) -> Result<Copied, CliError> {
        let Side::Guest(guest) = from else { return Ok(Copied::default()) };
        let path = item.path.to_string_lossy();
        self.stdout(guest, |to| guest.guest.read_to(&path, to)).await.map(Copied::content)
    }

    /// Stdout is written on a thread that nobody waits for after a signal: it may be stuck in a write.
    async fn stdout<T, W: Future<Output = Result<T, GuestError>>>(
        &self,
        from: &InGuest,
        work: impl FnOnce(Counted) -> W,
    ) -> Result<T, CliError> {
        let (near, far) = tokio::io::duplex(PIPE);
        let writing = tokio::task::spawn_blocking(move || {
            copy(&mut SyncIoBridge::new(far), &mut Descriptor::of(io::stdout())?)
        });
        let (done, written) =
            tokio::join!(work(Counted { inner: near, done: Arc::clone(self.done) }), writing);
        match (done, written) {
            (Ok(done), Ok(Ok(_))) => Ok(done),
            (Err(GuestError::Sink { .. }) | Ok(_), Ok(Err(source))) => Err(CliError::Output { source }),
            (Err(error), _) => Err(from.failed(error)),
            (Ok(_), Err(panic)) => Err(CliError::Output { source: io::Error::other(panic) }),
        }
    }
}

/// How a guest packs what goes to a target.
fn options(target: &Target) -> Result<PackOptions, CliError> {
    let name = match &target.name {
        None => None,
        Some(name) => Some(name.clone().into_string().map_err(|name| CliError::Usage {
            message: format!("{} is not UTF-8", name.display()),
            hint: "give it another name, or copy the directory that it is in".to_owned(),
        })?),
    };
    Ok(PackOptions { name, sparse: true, ..PackOptions::default() })
}

/// Reads a stream to its end; how many bytes it had.
fn read(stream: io::Stdin, output: &Output) -> Result<u64, Failure> {
    let failed = |error: io::Error| Failure::of("stdin", &error);
    let mut stream = Descriptor::of(stream).map_err(failed)?;
    let mut all = 0;
    loop {
        let mut piece = BytesMut::zeroed(CHUNK);
        match stream.read(&mut piece) {
            Ok(0) => return Ok(all),
            Ok(length) => {
                piece.truncate(length);
                all += length as u64;
                output.send(piece.freeze())?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// What a thread makes, as a stream that fails where the thread does.
struct Pieces<T> {
    pieces: mpsc::Receiver<Bytes>,
    current: Bytes,
    end: oneshot::Receiver<Result<T, Failure>>,
    result: Option<Result<T, Failure>>,
    done: Arc<AtomicU64>,
}

impl<T> Pieces<T> {
    fn new(
        pieces: mpsc::Receiver<Bytes>,
        end: oneshot::Receiver<Result<T, Failure>>,
        done: &Arc<AtomicU64>,
    ) -> Self {
        Self { pieces, current: Bytes::new(), end, result: None, done: Arc::clone(done) }
    }

    /// What became of both ends.
    async fn outcome(mut self, taken: Result<(), CliError>) -> Result<T, CliError> {
        let result = match (self.result.take(), &taken) {
            (Some(result), _) => result,
            // Whoever took it all need not have seen the end: archives have more behind theirs.
            (None, Ok(())) => {
                while self.pieces.recv().await.is_some() {}
                self.end.await.unwrap_or(Err(Failure::Gone))
            }
            (None, Err(_)) => Err(Failure::Gone),
        };
        match (result, taken) {
            (Ok(result), taken) => taken.map(|()| result),
            (Err(Failure::Gone), Err(error)) => Err(error),
            (Err(failure), _) => Err(CliError::Archive { place: "on the host".to_owned(), source: failure }),
        }
    }
}

impl<T: Unpin> AsyncRead for Pieces<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.current.is_empty() {
            if let Some(piece) = ready!(this.pieces.poll_recv(context)) {
                this.current = piece;
                continue;
            }
            if this.result.is_none() {
                let end = ready!(Pin::new(&mut this.end).poll(context));
                this.result = Some(end.unwrap_or(Err(Failure::Gone)));
            }
            return Poll::Ready(match this.result {
                Some(Ok(_)) => Ok(()),
                _ => Err(io::Error::other("what is to be sent cannot be read")),
            });
        }
        let length = buffer.remaining().min(this.current.len());
        buffer.put_slice(&this.current[..length]);
        this.current.advance(length);
        this.done.fetch_add(length as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

/// A pipe's end that counts what goes in.
struct Counted {
    inner: DuplexStream,
    done: Arc<AtomicU64>,
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let length = ready!(Pin::new(&mut self.inner).poll_write(context, bytes))?;
        self.done.fetch_add(length as u64, Ordering::Relaxed);
        Poll::Ready(Ok(length))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

/// Whether an archive could not be handed on where it went.
fn is_of_sink(error: &CliError) -> bool {
    matches!(error, CliError::Guest { source, .. } if matches!(**source, GuestError::Sink { .. }))
}
