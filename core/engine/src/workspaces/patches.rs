//! Patches that wait for their reader. They may be large, so whoever asked for one reads it in pieces, and writes it where they
//! want it by their own rights.

use std::{
    collections::VecDeque,
    fs::File,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::time::Instant;
use vm_types::OperationId;

use super::WorkspacesError;
use crate::{Engine, EngineError};

/// How many are kept.
const KEPT: usize = 8;
/// How long one is kept that nobody reads.
const PATIENCE: Duration = Duration::from_secs(10 * 60);
/// The most of one that is read at once, in bytes.
const PIECE: usize = 1 << 20;

/// By the operation that made them. The files have no names, so nothing is left of them.
#[derive(Debug, Default)]
pub(crate) struct Patches(Mutex<VecDeque<Patch>>);

#[derive(Debug)]
struct Patch {
    operation: OperationId,
    file: Arc<File>,
    /// When it was made, or read.
    used: Instant,
}

impl Patches {
    /// Keeps one until it was not read for a while, or others take its place.
    pub(super) fn keep(self: &Arc<Self>, operation: OperationId, file: File) {
        let mut kept = self.kept();
        kept.push_back(Patch { operation, file: Arc::new(file), used: Instant::now() });
        while kept.len() > KEPT {
            kept.pop_front();
        }
        drop(kept);
        tokio::spawn(Self::forget(Arc::downgrade(self), operation));
    }

    /// Drops one once nobody has read it for long. It may be as large as the disk has room.
    async fn forget(kept: Weak<Self>, operation: OperationId) {
        let mut until = Instant::now() + PATIENCE;
        loop {
            tokio::time::sleep_until(until).await;
            let Some(patches) = kept.upgrade() else { return };
            let mut kept = patches.kept();
            let Some(at) = kept.iter().position(|patch| patch.operation == operation) else { return };
            until = kept[at].used + PATIENCE;
            if until <= Instant::now() {
                kept.remove(at);
                return;
            }
        }
    }

    fn get(&self, operation: OperationId) -> Option<Arc<File>> {
        let mut kept = self.kept();
        let patch = kept.iter_mut().find(|patch| patch.operation == operation)?;
        patch.used = Instant::now();
        Some(patch.file.clone())
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<Patch>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// A piece of the patch that an operation has made, from `offset` on; empty at its end.
    ///
    /// # Errors
    /// There is no such patch any more.
    pub async fn read_patch(&self, operation: OperationId, offset: u64) -> Result<Vec<u8>, EngineError> {
        let file = self.inner.patches.get(operation).ok_or(WorkspacesError::NoPatch { operation })?;
        let read = tokio::task::spawn_blocking(move || {
            let mut piece = vec![0; PIECE];
            let mut length = 0;
            while length < PIECE {
                match file.read_at(&mut piece[length..], offset.saturating_add(length as u64))? {
                    0 => break,
                    read => length += read,
                }
            }
            piece.truncate(length);
            Ok(piece)
        });
        let path = self.inner.layout.workspace_scratch();
        let failed = |source| WorkspacesError::File { action: "read a patch in", path, source };
        Ok(read.await.map_err(std::io::Error::other).flatten().map_err(failed)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_patch_is_kept_while_it_is_read_and_not_much_longer() {
        let patches = Arc::<Patches>::default();
        let operation = OperationId(1);
        patches.keep(operation, tempfile::tempfile().unwrap());
        for _ in 0..3 {
            tokio::time::advance(PATIENCE * 3 / 4).await;
            assert!(patches.get(operation).is_some());
        }
        // Time that is paused goes on when all wait.
        tokio::time::sleep(PATIENCE * 2).await;
        assert!(patches.get(operation).is_none());
    }
}
