//! The registry of long operations: progress, wait, cancel; ended ones are kept for a while.
//!
//! An operation runs in a task of its own, so a client that leaves does not end it. Cancelling drops
//! the work at its next await and runs its unwinding, which itself cannot be cancelled.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use vm_types::{
    OperationId, VmId,
    image::{ImageRecord, KernelRecord},
    operation::{OperationKind, OperationProgress},
};

use crate::error::EngineError;

/// Ended operations that are kept for late readers.
const KEPT: usize = 256;

/// What an operation made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing to show.
    Done,
    /// A VM in its new state.
    Vm(VmId),
    /// An image.
    Image(ImageRecord),
    /// A kernel.
    Kernel(KernelRecord),
}

/// Where an operation stands.
#[derive(Debug, Clone)]
pub enum Status {
    /// At work.
    Running(OperationProgress),
    /// Done.
    Succeeded(Outcome),
    /// Undone and given up.
    Failed(Arc<EngineError>),
}

/// An operation as it is now.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Counts up from 1 in one daemon's life.
    pub id: OperationId,
    /// What it does.
    pub kind: OperationKind,
    /// To what, for people.
    pub subject: String,
    /// Seconds since the Unix epoch.
    pub begun_at: u64,
    /// Where it stands.
    pub status: Status,
}

#[derive(Debug)]
struct Operation {
    state: watch::Sender<Snapshot>,
    cancel: CancellationToken,
    preempted: Arc<AtomicBool>,
}

/// Handed to the work of an operation.
#[derive(Debug, Clone)]
pub struct OpContext {
    /// The operation.
    pub id: OperationId,
    state: watch::Sender<Snapshot>,
    cancel: CancellationToken,
    preempted: Arc<AtomicBool>,
}

impl OpContext {
    /// Whether it was cancelled because another operation wanted its VM, and not because nobody wants its outcome any more.
    pub fn preempted(&self) -> bool {
        self.preempted.load(Ordering::Relaxed)
    }

    /// Shows how far the work is.
    pub fn progress(&self, stage: impl Into<String>, done: u64, total: Option<u64>) {
        let progress = OperationProgress { stage: stage.into(), done, total };
        self.state.send_modify(|snapshot| {
            if let Status::Running(current) = &mut snapshot.status {
                *current = progress;
            }
        });
    }

    /// Runs `work` unless or until the operation is cancelled.
    ///
    /// # Errors
    /// Those of the work, or [`EngineError::Cancelled`] after dropping it.
    pub async fn cancellable<T>(
        &self,
        work: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        // Cancel-safe by contract: whatever the dropped work had begun is in a journal and is unwound by the caller.
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(EngineError::Cancelled),
            result = work => result,
        }
    }
}

/// All operations of one daemon.
#[derive(Debug, Clone, Default)]
pub struct Operations {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    table: Mutex<BTreeMap<OperationId, Operation>>,
    tasks: TaskTracker,
}

impl Operations {
    /// Begins an operation. `work` gets a context and is run in a task of its own.
    ///
    /// # Errors
    /// [`EngineError::ShuttingDown`].
    pub fn begin<F, W>(
        &self,
        kind: OperationKind,
        subject: impl Into<String>,
        work: W,
    ) -> Result<OperationId, EngineError>
    where
        W: FnOnce(OpContext) -> F,
        F: Future<Output = Result<Outcome, EngineError>> + Send + 'static,
    {
        if self.inner.tasks.is_closed() {
            return Err(EngineError::ShuttingDown);
        }
        let id = OperationId(self.inner.next.fetch_add(1, Ordering::Relaxed) + 1);
        let begun_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let status = Status::Running(OperationProgress { stage: "queued".into(), ..Default::default() });
        let (state, _) = watch::channel(Snapshot { id, kind, subject: subject.into(), begun_at, status });
        let cancel = CancellationToken::new();
        let preempted = Arc::new(AtomicBool::new(false));
        self.table(|table| {
            let ended: Vec<_> = table
                .iter()
                .filter(|(_, operation)| !matches!(operation.state.borrow().status, Status::Running(_)))
                .map(|(id, _)| *id)
                .collect();
            for id in ended.iter().take(ended.len().saturating_sub(KEPT)) {
                table.remove(id);
            }
            table.insert(
                id,
                Operation { state: state.clone(), cancel: cancel.clone(), preempted: preempted.clone() },
            );
        });
        let work = work(OpContext { id, state: state.clone(), cancel, preempted });
        // The work in a task of its own: a panic in it becomes this operation's failure.
        let task = self.inner.tasks.spawn(work);
        self.inner.tasks.spawn(async move {
            let result =
                task.await.unwrap_or_else(|error| Err(EngineError::Panicked { detail: error.to_string() }));
            if let Err(error) = &result {
                tracing::warn!(operation = %id, ?kind, error = %error.chain(), "operation failed");
            }
            state.send_modify(|snapshot| {
                snapshot.status = match result {
                    Ok(outcome) => Status::Succeeded(outcome),
                    Err(error) => Status::Failed(Arc::new(error)),
                };
            });
        });
        Ok(id)
    }

    /// All that are at work and the last of the ended, oldest first.
    pub fn list(&self) -> Vec<Snapshot> {
        self.table(|table| table.values().map(|operation| operation.state.borrow().clone()).collect())
    }

    /// Follows one; the receiver's value is its state now.
    ///
    /// # Errors
    /// [`EngineError::NotFound`].
    pub fn watch(&self, id: OperationId) -> Result<watch::Receiver<Snapshot>, EngineError> {
        self.table(|table| table.get(&id).map(|operation| operation.state.subscribe()))
            .ok_or_else(|| unknown(id))
    }

    /// Asks one to give up; an ended one is left as it is.
    ///
    /// # Errors
    /// [`EngineError::NotFound`].
    pub fn cancel(&self, id: OperationId) -> Result<(), EngineError> {
        self.table(|table| table.get(&id).map(|operation| operation.cancel.cancel()))
            .ok_or_else(|| unknown(id))
    }

    /// [`Self::cancel`] by another operation that wants the same VM.
    pub(crate) fn preempt(&self, id: OperationId) {
        self.table(|table| {
            if let Some(operation) = table.get(&id) {
                operation.preempted.store(true, Ordering::Relaxed);
                operation.cancel.cancel();
            }
        });
    }

    /// Waits for the end of one; cancel-safe.
    ///
    /// # Errors
    /// That of the operation, or [`EngineError::NotFound`].
    pub async fn wait(&self, id: OperationId) -> Result<Outcome, Arc<EngineError>> {
        let mut receiver = self.watch(id).map_err(Arc::new)?;
        let ended = receiver.wait_for(|snapshot| !matches!(snapshot.status, Status::Running(_))).await;
        match ended.map(|snapshot| snapshot.status.clone()) {
            Ok(Status::Succeeded(outcome)) => Ok(outcome),
            Ok(Status::Failed(error)) => Err(error),
            Ok(Status::Running(_)) | Err(_) => {
                Err(Arc::new(EngineError::Panicked { detail: "its task vanished".into() }))
            }
        }
    }

    /// Takes no more, cancels all that are at work and waits until each has unwound.
    pub async fn shut_down(&self) {
        self.inner.tasks.close();
        self.table(|table| table.values().for_each(|operation| operation.cancel.cancel()));
        self.inner.tasks.wait().await;
    }

    fn table<T>(&self, f: impl FnOnce(&mut BTreeMap<OperationId, Operation>) -> T) -> T {
        // A panic under this lock leaves the map whole; there is nothing to repair.
        f(&mut self.inner.table.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

fn unknown(id: OperationId) -> EngineError {
    EngineError::NotFound {
        what: "operation",
        name: id.to_string(),
        hint: "ended operations are kept for a while only, and none outlives the daemon".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_result_can_be_read_after_the_end() {
        let operations = Operations::default();
        let id = operations.begin(OperationKind::VmStart, "a", |_| async { Ok(Outcome::Done) }).unwrap();
        assert_eq!(operations.wait(id).await.unwrap(), Outcome::Done);
        assert_eq!(operations.wait(id).await.unwrap(), Outcome::Done);
    }

    #[tokio::test]
    async fn a_cancelled_operation_unwinds_before_it_ends() {
        let operations = Operations::default();
        let (unwound, mut seen) = tokio::sync::mpsc::channel(1);
        let id = operations
            .begin(OperationKind::VmStart, "a", |context| async move {
                let result = context.cancellable(std::future::pending()).await;
                unwound.send(()).await.unwrap();
                result
            })
            .unwrap();
        operations.cancel(id).unwrap();
        let error = operations.wait(id).await.unwrap_err();
        assert!(matches!(*error, EngineError::Cancelled), "{error}");
        seen.try_recv().expect("it ended before it had unwound");
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_of_that_operation_only() {
        let operations = Operations::default();
        let id = operations.begin(OperationKind::VmStart, "a", |_| async { panic!("boom") }).unwrap();
        assert!(matches!(*operations.wait(id).await.unwrap_err(), EngineError::Panicked { .. }));
        let id = operations.begin(OperationKind::VmStart, "b", |_| async { Ok(Outcome::Done) }).unwrap();
        assert!(operations.wait(id).await.is_ok());
    }

    #[tokio::test]
    async fn the_registry_is_bounded() {
        let operations = Operations::default();
        for _ in 0..KEPT + 50 {
            let id = operations.begin(OperationKind::VmStart, "a", |_| async { Ok(Outcome::Done) }).unwrap();
            operations.wait(id).await.unwrap();
        }
        assert!(operations.list().len() <= KEPT + 1);
    }
}
