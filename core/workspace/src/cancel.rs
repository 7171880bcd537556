//! Tells blocking work that nobody waits for it any more.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::WorkspaceError;

/// Shared by who works and who may give the work up.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

/// Cancels when it is dropped. Held by a future beside the work it waits for, it ends that work with the future.
#[derive(Debug)]
pub struct CancelOnDrop(Cancel);

impl Cancel {
    /// The work that has this ends with [`WorkspaceError::Cancelled`], a running git within a tenth of a second.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the work was given up.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// A guard that cancels.
    pub fn on_drop(&self) -> CancelOnDrop {
        CancelOnDrop(self.clone())
    }

    /// # Errors
    /// [`WorkspaceError::Cancelled`] once the work was given up.
    pub fn check(&self) -> Result<(), WorkspaceError> {
        if self.is_cancelled() { Err(WorkspaceError::Cancelled) } else { Ok(()) }
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}
