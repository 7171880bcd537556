//! Client data that waits for slow readers in the guest.
//!
//! Two things must not happen when a command does not read its input: that memory fills up, and that the
//! connection stands still, because the window adjustment that the command's *output* waits for, or the
//! signal that shall end it, comes in behind that input. So reading the connection never stops; it slows down,
//! the more the further the backlog has grown.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf},
    sync::{Notify, mpsc},
};
use tokio_util::sync::PollSender;

/// A channel's window in bytes: what a client may have on the way, ahead of a signal.
pub(crate) const WINDOW: u32 = 256 << 10;
/// A window while more than [`FREE`] waits. It is all that a signal has to wait for, at the pace of the pauses.
const NARROW: u32 = 32 << 10;
/// Bytes that may wait without slowing anything down: one channel window.
const FREE: usize = WINDOW as usize;
/// The pause between two packets doubles with each of these beyond [`FREE`].
const STEP: usize = 2 << 20;
/// Bytes read between two pauses: one SSH packet, so that reading keeps pace with what is used.
const QUANTUM: usize = 32 << 10;
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What waits in all channels of one connection.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    bytes: AtomicUsize,
    drained: Notify,
}

impl Backlog {
    fn pause(&self) -> Option<Duration> {
        let over = self.bytes.load(Ordering::Relaxed).checked_sub(FREE + 1)?;
        let doublings = u32::try_from(over / STEP).unwrap_or(u32::MAX).min(16);
        Some((FIRST_PAUSE * (1 << doublings)).min(LONGEST_PAUSE))
    }

    /// To which size windows are opened again.
    pub(crate) fn window(&self) -> u32 {
        if self.bytes.load(Ordering::Relaxed) > FREE { NARROW } else { WINDOW }
    }

    fn remove(&self, length: usize) {
        if self.bytes.fetch_sub(length, Ordering::Relaxed) > FREE {
            self.drained.notify_one();
        }
    }
}

/// A queue of one channel's inbound data.
pub(crate) fn queue(backlog: &Arc<Backlog>) -> (Sender, Receiver) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let whole = Arc::<AtomicBool>::default();
    (
        Sender { queue: Some(sender), backlog: Arc::clone(backlog), whole: Arc::clone(&whole) },
        Receiver { queue: receiver, backlog: Arc::clone(backlog), last: 0, whole },
    )
}

/// The connection's end of a queue.
#[derive(Debug)]
pub(crate) struct Sender {
    queue: Option<mpsc::UnboundedSender<Bytes>>,
    backlog: Arc<Backlog>,
    whole: Arc<AtomicBool>,
}

impl Sender {
    /// Queues data; it is dropped if nobody will ever read it.
    pub(crate) fn send(&self, data: &[u8]) {
        let Some(queue) = &self.queue else { return };
        self.backlog.bytes.fetch_add(data.len(), Ordering::Relaxed);
        if queue.send(Bytes::copy_from_slice(data)).is_err() {
            self.backlog.remove(data.len());
        }
    }

    /// The client sends no more.
    pub(crate) fn end(&mut self) {
        self.whole.store(true, Ordering::Release);
        self.queue = None;
    }
}

/// The reader's end of a queue.
#[derive(Debug)]
pub(crate) struct Receiver {
    queue: mpsc::UnboundedReceiver<Bytes>,
    backlog: Arc<Backlog>,
    last: usize,
    whole: Arc<AtomicBool>,
}

impl Receiver {
    /// Whether the client has said that it sends no more. Behind the end of the data this tells a client that is done from
    /// one that has gone.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole.load(Ordering::Acquire)
    }

    /// The next piece; the one before it counts as used. `None` at the end. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        self.backlog.remove(std::mem::take(&mut self.last));
        let data = self.queue.recv().await?;
        self.last = data.len();
        Some(data)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.queue.close();
        let mut left = self.last;
        while let Ok(data) = self.queue.try_recv() {
            left += data.len();
        }
        self.backlog.remove(left);
    }
}

/// A connection that is read the more slowly the more waits, and written by a task of its own.
///
/// The latter because russh does not read while it writes: two such ends, each with much to say, would
/// wait for each other. What may be on the way is bounded by the channels' windows, and by [`ON_THE_WAY`].
pub(crate) struct Throttled<S> {
    stream: ReadHalf<S>,
    writes: PollSender<Bytes>,
    backlog: Arc<Backlog>,
    pause: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// Bytes that may be read before the next pause.
    due: usize,
}

/// Writes of at most a packet or two that may be on the way to the client.
const ON_THE_WAY: usize = 512;

impl<S: AsyncRead + AsyncWrite + Send + 'static> Throttled<S> {
    pub(crate) fn new(stream: S, backlog: Arc<Backlog>) -> Self {
        let (stream, write) = tokio::io::split(stream);
        let (writes, queue) = mpsc::channel(ON_THE_WAY);
        tokio::spawn(write_all(write, queue));
        Self { stream, writes: PollSender::new(writes), backlog, pause: None, due: 0 }
    }
}

/// Ends when the connection does, or its reader.
async fn write_all<S: AsyncWrite>(mut to: WriteHalf<S>, mut from: mpsc::Receiver<Bytes>) {
    while let Some(data) = from.recv().await {
        if to.write_all(&data).await.is_err() {
            return;
        }
        if from.is_empty() && to.flush().await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

impl<S: AsyncRead + Unpin> AsyncRead for Throttled<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.due == 0 {
            if let Some(length) = this.backlog.pause() {
                let backlog = &this.backlog;
                let pause = this.pause.get_or_insert_with(|| {
                    let backlog = Arc::clone(backlog);
                    Box::pin(async move {
                        // Cancel-safe: neither arm holds anything.
                        tokio::select! {
                            () = tokio::time::sleep(length) => {}
                            () = backlog.drained.notified() => {}
                        }
                    })
                });
                ready!(pause.as_mut().poll(context));
                this.pause = None;
            }
            this.due = QUANTUM;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
        this.due = this.due.saturating_sub(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<S: Unpin> AsyncWrite for Throttled<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.writes.poll_reserve(context)).map_err(gone)?;
        self.writes.send_item(Bytes::copy_from_slice(bytes)).map_err(gone)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writes.close();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_with_the_backlog_and_go_with_it() {
        let backlog = Arc::<Backlog>::default();
        let (sender, receiver) = queue(&backlog);
        sender.send(&vec![0; FREE]);
        assert_eq!(backlog.pause(), None);
        sender.send(&[0]);
        assert_eq!(backlog.pause(), Some(FIRST_PAUSE));
        sender.send(&vec![0; STEP]);
        assert_eq!(backlog.pause(), Some(FIRST_PAUSE * 2));
        sender.send(&vec![0; STEP * 40]);
        assert_eq!(backlog.pause(), Some(LONGEST_PAUSE));
        drop(receiver);
        assert_eq!(backlog.pause(), None);
        sender.send(&vec![0; 2 * FREE]);
        assert_eq!(backlog.pause(), None, "nobody reads: nothing waits");
    }
}
