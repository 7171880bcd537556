//! How far an import is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_engine::ports::ImportWatch;
use vm_plugin::ports::Progress;

/// Bytes after which somebody is told again.
const TELL: u64 = 1 << 20;

/// Adds up what an import sends, and tells of it.
#[derive(Default)]
pub(super) struct Meter {
    watch: Option<Arc<dyn ImportWatch>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    step: String,
    /// Of this step.
    done: u64,
    total: Option<u64>,
    told: u64,
    /// Of all steps.
    sum: u64,
}

impl Meter {
    pub(super) fn new(watch: Arc<dyn ImportWatch>) -> Self {
        Self { watch: Some(watch), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, state: &State) {
        if let Some(watch) = &self.watch {
            watch.progress(&state.step, state.done, state.total.map(|total| total.max(state.done)));
        }
    }

    /// Something is about to be sent: about so many bytes.
    pub(super) fn begin(&self, total: Option<u64>) {
        let mut state = self.state();
        (state.done, state.told, state.total) = (0, 0, total);
        self.tell(&state);
    }

    /// So many bytes more were sent.
    pub(super) fn add(&self, bytes: u64) {
        let mut state = self.state();
        state.done += bytes;
        state.sum += bytes;
        if state.done - state.told >= TELL {
            state.told = state.done;
            self.tell(&state);
        }
    }

    /// What was sent in all.
    pub(super) fn sum(&self) -> u64 {
        self.state().sum
    }
}

impl Progress for Meter {
    fn says(&self, message: &str) {
        let mut state = self.state();
        message.clone_into(&mut state.step);
        (state.done, state.told, state.total) = (0, 0, None);
        self.tell(&state);
    }
}
