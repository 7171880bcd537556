//! What the guest has of a workspace comes to the host: a survey, then the files that whoever brings them back asks for.

use std::sync::Arc;

use tokio::io::AsyncRead;
use tokio_util::io::SyncIoBridge;
use vm_guest::Guest;
use vm_types::{guest::files::Seen, workspace::WorkspaceRecord};
use vm_workspace::{
    Baseline, Workspace,
    export::{Export, ExportError, Wish},
};

use super::on_host;
use crate::{Engine, EngineError, ops::OpContext, vm::cell::Cell};

/// Bytes that are on their way from the guest.
const PIPE: usize = 1 << 20;

/// A workspace in a guest that is reached.
pub(super) struct Reached {
    pub(super) guest: Arc<Guest>,
    pub(super) directory: String,
}

impl Reached {
    pub(super) async fn new(
        engine: &Engine,
        cell: &Cell,
        record: &WorkspaceRecord,
    ) -> Result<Self, EngineError> {
        let guest = Arc::new(engine.guest_of(cell).await?);
        Ok(Self { guest, directory: record.path.clone() })
    }

    /// Says goodbye; what goes wrong with that is nobody's matter.
    pub(super) async fn close(self) {
        if let Ok(guest) = Arc::try_unwrap(self.guest) {
            guest.close().await;
        }
    }

    /// What it has.
    pub(super) async fn survey(&self, context: &OpContext) -> Result<Vec<Seen>, EngineError> {
        context.progress("looking at the guest's files", 0, None);
        Ok(self.guest.survey(&self.directory).await?)
    }

    /// Brings over what is needed for a wish.
    pub(super) async fn export(
        &self,
        workspace: &Arc<Workspace>,
        baseline: &Baseline,
        survey: Vec<Seen>,
        wish: Wish,
        context: &OpContext,
    ) -> Result<Export, EngineError> {
        let (workspace, baseline) = (workspace.clone(), baseline.clone());
        let mut export = on_host(move || Export::begin(&workspace, baseline, survey, wish)).await?;
        loop {
            let (wanted, bytes);
            (export, wanted, bytes) = on_host(move || {
                let wanted = export.wanted()?;
                let bytes = export.wanted_bytes()?;
                Ok::<_, ExportError>((export, wanted, bytes))
            })
            .await?;
            if wanted.is_empty() {
                return Ok(export);
            }
            let step = format!("fetching {} files from the guest", wanted.len());
            context.progress(step.clone(), 0, Some(bytes));
            let (to, from) = tokio::io::duplex(PIPE);
            let from = SyncIoBridge::new(Counted { from, done: 0, bytes, step, context: context.clone() });
            let taking = on_host(move || {
                let mut from = from;
                export.take(&mut from)?;
                // What is behind the archive's end: who writes must not find that nobody reads.
                std::io::copy(&mut from, &mut std::io::sink())
                    .map_err(|source| ExportError::Archive { source })?;
                Ok::<_, ExportError>(export)
            });
            let packing = async {
                self.guest.pack_selected(&self.directory, &wanted, to).await.map_err(EngineError::from)
            };
            // Where taking fails, that is why packing does.
            let (packed, taken) = tokio::join!(packing, taking);
            export = taken?;
            packed?;
        }
    }
}

/// Tells how much has come.
struct Counted<R> {
    from: R,
    done: u64,
    bytes: u64,
    step: String,
    context: OpContext,
}

impl<R: AsyncRead + Unpin> AsyncRead for Counted<R> {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        task: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let polled = std::pin::Pin::new(&mut this.from).poll_read(task, buffer);
        let read = (buffer.filled().len() - before) as u64;
        if read > 0 {
            this.done += read;
            // Archives have more than their files.
            this.context.progress(this.step.clone(), this.done.min(this.bytes), Some(this.bytes));
        }
        polled
    }
}
