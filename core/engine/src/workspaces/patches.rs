//! Patches that wait for their reader. They may be large, so whoever asked for one reads it in pieces, and writes it where they
//! want it by their own rights.

use std::{
    collections::VecDeque,
    fs::File,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, PoisonError},
};

use vm_types::OperationId;

use super::WorkspacesError;
use crate::{Engine, EngineError};

/// How many are kept.
const KEPT: usize = 8;
/// The most of one that is read at once, in bytes.
const PIECE: usize = 1 << 20;

/// By the operation that made them. The files have no names, so nothing is left of them.
#[derive(Debug, Default)]
pub(crate) struct Patches(Mutex<VecDeque<(OperationId, Arc<File>)>>);

impl Patches {
    pub(super) fn keep(&self, operation: OperationId, file: File) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back((operation, Arc::new(file)));
        while kept.len() > KEPT {
            kept.pop_front();
        }
    }

    fn get(&self, operation: OperationId) -> Option<Arc<File>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().find(|(id, _)| *id == operation).map(|(_, file)| file.clone())
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
