//! How far a transfer is.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::Digest;

/// What happens to one of the blobs of an image: a layer, or its config. Sizes are in bytes, of the blob as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// The manifest is known, and so is how much there is to do.
    Begun {
        /// How many blobs the image has.
        blobs: usize,
        /// Of all of them.
        bytes: u64,
    },
    /// So much of a blob is there. A transfer that begins anew goes back.
    Blob {
        /// Which.
        digest: Digest,
        /// How much of it.
        done: u64,
        /// How large it is.
        size: u64,
    },
    /// A blob is whole where it should be: transferred, or there before.
    Done {
        /// Which.
        digest: Digest,
        /// How large it is.
        size: u64,
        /// Whether it was there before, so that nothing was transferred.
        present: bool,
    },
    /// Something did not work and is tried again.
    Retry {
        /// What was being done and why it did not work, for people.
        reason: String,
        /// After this time.
        wait: Duration,
    },
}

/// Receives progress; of one blob, some ten times a second. It must not block.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;

/// A sink for callers who do not want to know.
pub fn silent() -> ProgressSink {
    Arc::new(|_| {})
}

const INTERVAL: Duration = Duration::from_millis(100);

/// Passes on the progress of one blob, thinned out.
#[derive(Clone)]
pub(crate) struct Reporter {
    sink: ProgressSink,
    digest: Digest,
    /// 0 while nobody knows.
    size: Arc<AtomicU64>,
    last: Arc<Mutex<Option<Instant>>>,
}

impl Reporter {
    pub(crate) fn new(sink: &ProgressSink, digest: Digest, size: u64) -> Self {
        Self { sink: sink.clone(), digest, size: Arc::new(size.into()), last: Arc::default() }
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// The blob, the only one there is, is so large.
    pub(crate) fn expect(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
        (self.sink)(Progress::Begun { blobs: 1, bytes: size });
    }

    pub(crate) fn at(&self, done: u64) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if done == self.size() || last.is_none_or(|last| now.duration_since(last) >= INTERVAL) {
            *last = Some(now);
            (self.sink)(Progress::Blob { digest: self.digest, done, size: self.size() });
        }
    }

    pub(crate) fn done(&self, present: bool) {
        (self.sink)(Progress::Done { digest: self.digest, size: self.size(), present });
    }

    pub(crate) fn retry(&self, reason: String, wait: Duration) {
        (self.sink)(Progress::Retry { reason, wait });
    }
}
