//! One output stream of a session: a thread that writes, and how far it is behind.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
};

use bytes::Bytes;
use tokio::sync::{Notify, oneshot};

/// Takes chunks without waiting; the sender stops by [`Sink::behind`].
pub(super) struct Sink {
    queue: Option<mpsc::Sender<Bytes>>,
    state: Arc<State>,
    end: oneshot::Receiver<io::Result<()>>,
}

#[derive(Default)]
struct State {
    behind: AtomicUsize,
    broken: AtomicBool,
    changed: Notify,
}

impl Sink {
    /// Starts the thread.
    pub(super) fn new(mut writer: Box<dyn Write + Send>) -> io::Result<Self> {
        let (queue, chunks) = mpsc::channel::<Bytes>();
        let (ended, end) = oneshot::channel();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        std::thread::Builder::new().name("output".to_owned()).spawn(move || {
            let result = (|| {
                for chunk in chunks {
                    writer.write_all(&chunk)?;
                    shared.behind.fetch_sub(chunk.len(), Ordering::Relaxed);
                    shared.changed.notify_one();
                }
                writer.flush()
            })();
            shared.broken.store(result.is_err(), Ordering::Release);
            shared.changed.notify_one();
            let _ = ended.send(result);
        })?;
        Ok(Self { queue: Some(queue), state, end })
    }

    /// Queues a chunk. One for a broken stream is dropped.
    pub(super) fn send(&self, chunk: Bytes) {
        if let Some(queue) = &self.queue {
            self.state.behind.fetch_add(chunk.len(), Ordering::Relaxed);
            let _ = queue.send(chunk);
        }
    }

    /// Bytes queued and not yet written.
    pub(super) fn behind(&self) -> usize {
        if self.broken() { 0 } else { self.state.behind.load(Ordering::Relaxed) }
    }

    /// Whether writing has failed.
    pub(super) fn broken(&self) -> bool {
        self.state.broken.load(Ordering::Acquire)
    }

    /// Returns when something was written or broke since the last call. Cancel-safe.
    pub(super) async fn changed(&self) {
        self.state.changed.notified().await;
    }

    /// Waits until all is written. Cancel-safe; to be called until it returns, and not again after.
    pub(super) async fn finish(&mut self) -> io::Result<()> {
        self.queue = None;
        (&mut self.end).await.unwrap_or_else(|_| Err(io::Error::other("the output thread died")))
    }
}
