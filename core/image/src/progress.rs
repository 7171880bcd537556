//! Progress of long work, and its cancellation by dropping the future.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::ImageError;

/// How far a long piece of work is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, for people, e.g. `downloading packages`.
    pub stage: String,
    /// How much of it, in the unit of `total`: bytes, or percent where `total` is 100.
    pub done: u64,
    /// How much there is, where that is known.
    pub total: Option<u64>,
}

/// Receives progress, some ten times a second at most within one stage. It must not block.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;

const INTERVAL: Duration = Duration::from_millis(100);

/// Passes progress on, thinned out.
#[derive(Clone)]
pub(crate) struct Reporter {
    sink: ProgressSink,
    last: Arc<Mutex<Option<(String, Instant)>>>,
}

impl Reporter {
    pub(crate) fn new(sink: ProgressSink) -> Self {
        Self { sink, last: Arc::default() }
    }

    /// Reports unless this stage was reported just now; the end of a stage always gets through.
    pub(crate) fn report(&self, stage: &str, done: u64, total: Option<u64>) {
        {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let recent = matches!(&*last, Some((former, at)) if former == stage && at.elapsed() < INTERVAL);
            if recent && total != Some(done) {
                return;
            }
            *last = Some((stage.to_owned(), Instant::now()));
        }
        (self.sink)(Progress { stage: stage.to_owned(), done, total });
    }
}

/// Tells a thread that nobody waits for it any more.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// # Errors
    /// [`ImageError::Cancelled`] once the waiting future was dropped.
    pub(crate) fn check(&self) -> Result<(), ImageError> {
        if self.0.load(Ordering::Relaxed) { Err(ImageError::Cancelled) } else { Ok(()) }
    }
}

struct CancelOnDrop(Cancel);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Runs blocking work on a thread of its own. Dropping the future makes the work's [`Cancel`] fail; what the work owns
/// it drops itself, so a temporary directory moved into it is removed however it ends.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&Cancel) -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    let cancel = Cancel::default();
    let guard = CancelOnDrop(cancel.clone());
    let result = tokio::task::spawn_blocking(move || work(&cancel)).await;
    drop(guard);
    result.map_err(|source| ImageError::Worker { source })?
}
