//! A stream whose writes never hold up its reads.
//!
//! russh does not read while it writes. Two such ends, each with much to say, would wait for each other once the
//! buffers between them are full; so what we say is queued here and written by a task of its own. The queue is
//! bounded by the SSH windows the server grants, and against one that grants too much by [`LIMIT`].

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf},
    sync::mpsc,
    task::JoinHandle,
};

/// Queued bytes beyond which a write waits after all.
const LIMIT: usize = 32 << 20;

/// The stream.
pub(super) struct Carrier<S> {
    read: ReadHalf<S>,
    queue: Option<mpsc::UnboundedSender<Bytes>>,
    queued: Arc<Queued>,
    writer: JoinHandle<io::Result<()>>,
}

#[derive(Default)]
struct Queued(Mutex<(usize, Option<Waker>)>);

impl Queued {
    /// Counts bytes in, unless there are too many: then the task is woken when some have left.
    fn add(&self, count: usize, context: &Context<'_>) -> Poll<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0 >= LIMIT {
            state.1 = Some(context.waker().clone());
            return Poll::Pending;
        }
        state.0 += count;
        Poll::Ready(())
    }

    fn remove(&self, count: usize) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 -= count;
        if let Some(waker) = state.1.take() {
            waker.wake();
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Send + 'static> Carrier<S> {
    pub(super) fn new(stream: S) -> Self {
        let (read, write) = tokio::io::split(stream);
        let (sender, chunks) = mpsc::unbounded_channel();
        let queued = Arc::new(Queued::default());
        let writer = tokio::spawn(write_all(write, chunks, Arc::clone(&queued)));
        Self { read, queue: Some(sender), queued, writer }
    }
}

async fn write_all<S: AsyncWrite>(
    mut to: WriteHalf<S>,
    mut chunks: mpsc::UnboundedReceiver<Bytes>,
    queued: Arc<Queued>,
) -> io::Result<()> {
    while let Some(chunk) = chunks.recv().await {
        let written = to.write_all(&chunk).await;
        queued.remove(chunk.len());
        written?;
    }
    to.shutdown().await
}

impl<S: AsyncRead> AsyncRead for Carrier<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.read).poll_read(context, buffer)
    }
}

impl<S> AsyncWrite for Carrier<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let closed = || io::Error::from(io::ErrorKind::BrokenPipe);
        let Some(queue) = self.queue.as_ref().filter(|queue| !queue.is_closed()) else {
            return Poll::Ready(Err(closed()));
        };
        ready!(self.queued.add(bytes.len(), context));
        Poll::Ready(queue.send(Bytes::copy_from_slice(bytes)).map(|()| bytes.len()).map_err(|_| closed()))
    }

    /// What was queued is on its way; waiting for it is what this type exists to avoid.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ready when all was written.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.queue.take().is_none() && self.writer.is_finished() {
            return Poll::Ready(Ok(()));
        }
        let result = ready!(Pin::new(&mut self.writer).poll(context));
        Poll::Ready(result.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into())))
    }
}
