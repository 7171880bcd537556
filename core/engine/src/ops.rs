//! The registry of long operations: progress, wait, cancel; ended ones are kept for a while.
//!
//! ```text
//!   begin::<T>(kind, subject, work) ──> Operation<T>: id, wait -> T, cancel      whoever began it, in the daemon
//!          │
//!          └─ a task of its own ──> Snapshot {progress … Outcome}: list, watch, wait(id), cancel(id)   anybody, by id
//! ```
//!
//! A client that leaves does not end an operation. Cancelling drops the work at its next await and runs its unwinding,
//! which itself cannot be cancelled.

mod output;

use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::watch;
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use vm_host::clock::unix_seconds;
use vm_locks::{Ctx, LockTable, Origin, Unlocked};
use vm_types::{
    OperationId, VmId, VmName,
    image::{ImageRecord, KernelRecord},
    operation::{OperationKind, OperationProgress},
    workspace::{PreparedWorkspace, WorkspaceExport, WorkspacePlan, WorkspaceStatus},
};

use self::output::Said;
pub use self::output::{Listener, Piece};
use crate::error::EngineError;

/// Ended operations that are kept for late readers.
const KEPT: usize = 256;

/// Stages of one operation that a slow watcher can still be told of.
const STAGES: usize = 64;

/// What an operation made, whatever its type: what is shown of it by id.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Nothing to show.
    Done,
    /// A VM in its new state.
    Vm(VmId),
    /// A VM and what a restart will bring.
    VmChanged(VmChanged),
    /// What of many VMs was deleted.
    Pruned(Pruned),
    /// An image.
    Image(Box<ImageRecord>),
    /// An image that was made here.
    Made(Box<Made>),
    /// A kernel.
    Kernel(KernelRecord),
    /// What would be done with a workspace.
    WorkspacePlan(Box<WorkspacePlan>),
    /// A workspace in a VM.
    WorkspacePrepared(Box<PreparedWorkspace>),
    /// What has changed of it.
    WorkspaceStatus(Box<WorkspaceStatus>),
    /// What came back of it.
    WorkspaceExported(Box<WorkspaceExport>),
}

/// An image that was made of a guest's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// The image.
    pub image: ImageRecord,
    /// What is not in it, or not as it was at any one time, for people.
    pub warnings: Vec<String>,
}

/// What became of a change to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmChanged {
    /// The VM.
    pub vm: VmId,
    /// Names of the changed settings that a restart will bring.
    pub needs_restart: Vec<String>,
}

/// What a prune did.
#[derive(Debug, Clone, Default)]
pub struct Pruned {
    /// Those that were deleted, or would be.
    pub deleted: Vec<VmName>,
    /// Those that could not be, with the reason.
    pub failed: BTreeMap<VmName, Arc<EngineError>>,
    /// Bytes their disks took.
    pub freed_bytes: u64,
}

macro_rules! outcomes {
    ($($variant:ident($type:ty),)*) => {
        $(impl From<$type> for Outcome {
            fn from(value: $type) -> Self {
                Self::$variant(value)
            }
        })*
    };
}

outcomes! {
    Vm(VmId),
    VmChanged(VmChanged),
    Pruned(Pruned),
    Kernel(KernelRecord),
}

impl From<ImageRecord> for Outcome {
    fn from(image: ImageRecord) -> Self {
        Self::Image(Box::new(image))
    }
}

impl From<Made> for Outcome {
    fn from(made: Made) -> Self {
        Self::Made(Box::new(made))
    }
}

impl From<()> for Outcome {
    fn from((): ()) -> Self {
        Self::Done
    }
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

impl Status {
    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        !matches!(self, Self::Running(_))
    }
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
    /// Seconds since the Unix epoch; set once it has ended.
    pub ended_at: Option<u64>,
    /// Where it stands.
    pub status: Status,
}

/// A snapshot with the stages that came before, for watchers that were slower than the work.
#[derive(Debug)]
struct State {
    now: Snapshot,
    /// The last of the stages, each with the progress it ended with; the newest one is the current one.
    stages: VecDeque<OperationProgress>,
    /// How many stages there were up to and including the newest.
    reached: u64,
    /// Counts the changes.
    version: u64,
}

impl State {
    fn progress(&mut self, progress: OperationProgress) {
        let Status::Running(current) = &mut self.now.status else { return };
        if current.stage == progress.stage {
            self.stages.pop_back();
        } else {
            self.reached += 1;
            if self.stages.len() == STAGES {
                self.stages.pop_front();
            }
        }
        self.stages.push_back(progress.clone());
        *current = progress;
        self.version += 1;
    }

    fn end(&mut self, status: Status) {
        self.now.status = status;
        self.now.ended_at = Some(unix_seconds());
        self.version += 1;
    }
}

/// What the registry, the work and the handles share of one operation.
#[derive(Debug)]
struct Entry {
    id: OperationId,
    state: watch::Sender<State>,
    output: watch::Sender<Said>,
    cancel: CancellationToken,
    preempted: AtomicBool,
}

/// An operation, as whoever began it has it. Dropping the handle leaves the operation as it is.
#[derive(Debug)]
pub struct Operation<T> {
    entry: Arc<Entry>,
    result: Arc<OnceLock<Result<T, Arc<EngineError>>>>,
}

impl<T> Clone for Operation<T> {
    fn clone(&self) -> Self {
        Self { entry: self.entry.clone(), result: self.result.clone() }
    }
}

impl<T: Clone> Operation<T> {
    /// Its name for everybody else.
    pub fn id(&self) -> OperationId {
        self.entry.id
    }

    /// Waits for its end; cancel-safe. The result stays as long as the handle, whatever the registry forgets.
    ///
    /// # Errors
    /// That of the operation.
    pub async fn wait(&self) -> Result<T, Arc<EngineError>> {
        let mut receiver = self.entry.state.subscribe();
        // The sender is in our own hands, so this ends with the operation only.
        let _ = receiver.wait_for(|state| state.now.status.ended()).await;
        self.result.get().cloned().unwrap_or_else(|| Err(Arc::new(vanished())))
    }

    /// Asks it to give up; an ended one is left as it is.
    pub fn cancel(&self) {
        self.entry.cancel.cancel();
    }

    /// As it is now.
    pub fn snapshot(&self) -> Snapshot {
        self.entry.state.borrow().now.clone()
    }
}

/// Handed to the work of an operation.
#[derive(Debug, Clone)]
pub struct OpContext {
    /// The operation.
    pub id: OperationId,
    entry: Arc<Entry>,
}

impl OpContext {
    /// Whether it was cancelled because another operation wanted its VM, and not because nobody wants its outcome any more.
    pub fn preempted(&self) -> bool {
        self.entry.preempted.load(Ordering::Relaxed)
    }

    /// Shows how far the work is.
    pub fn progress(&self, stage: impl Into<String>, done: u64, total: Option<u64>) {
        let progress = OperationProgress { stage: stage.into(), done, total };
        self.entry.state.send_modify(|state| state.progress(progress));
    }

    /// Says something beside that, in whole lines or not, to those who listen.
    pub fn say(&self, bytes: &[u8]) {
        self.entry.output.send_modify(|said| said.say(bytes));
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
            () = self.entry.cancel.cancelled() => Err(EngineError::Cancelled),
            result = work => result,
        }
    }
}

/// Follows one operation: its state now, each stage after it, and its end.
#[derive(Debug)]
pub struct Watcher {
    receiver: watch::Receiver<State>,
    told: Option<Told>,
}

/// What a watcher has been told of.
#[derive(Debug, Clone, Copy)]
struct Told {
    stages: u64,
    version: u64,
    end: bool,
}

impl Watcher {
    /// The next state; `None` after the end was told. The first comes at once. A stage is never left out, unless there were
    /// more than 64 since the last look; counts within one are as new as can be. Cancel-safe.
    pub async fn next(&mut self) -> Option<Snapshot> {
        while self.told.is_none_or(|told| !told.end) {
            if let Some(snapshot) = self.look() {
                return Some(snapshot);
            }
            self.receiver.changed().await.ok()?;
        }
        None
    }

    /// What there is to tell without waiting.
    fn look(&mut self) -> Option<Snapshot> {
        let state = self.receiver.borrow_and_update();
        let end = state.now.status.ended();
        if let Some(told) = self.told {
            if told.version == state.version {
                return None;
            }
            let missed = usize::try_from(state.reached - told.stages).unwrap_or(usize::MAX);
            let missed = missed.min(state.stages.len());
            // A running operation's newest stage is what it is doing now.
            if missed > usize::from(!end) {
                let progress = state.stages.get(state.stages.len() - missed)?.clone();
                self.told = Some(Told { stages: state.reached - missed as u64 + 1, ..told });
                let status = Status::Running(progress);
                return Some(Snapshot { status, ended_at: None, ..state.now.clone() });
            }
        }
        self.told = Some(Told { stages: state.reached, version: state.version, end });
        Some(state.now.clone())
    }
}

/// All operations of one daemon. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Operations {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    table: Mutex<Table>,
    tasks: TaskTracker,
    locks: LockTable,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    entries: BTreeMap<OperationId, Arc<Entry>>,
    /// In the order of their ends.
    ended: VecDeque<OperationId>,
    closed: bool,
}

impl Operations {
    /// The table of locks that operations hold or wait for; requests make their own roots from it.
    pub fn locks(&self) -> &LockTable {
        &self.inner.locks
    }

    /// Begins an operation. `work` gets a context and the right to lock, and is run in a task of its own.
    ///
    /// # Errors
    /// [`EngineError::ShuttingDown`].
    pub fn begin<T, F, W>(
        &self,
        kind: OperationKind,
        subject: impl Into<String>,
        work: W,
    ) -> Result<Operation<T>, EngineError>
    where
        T: Clone + Into<Outcome> + Send + Sync + 'static,
        W: FnOnce(OpContext, Ctx<Unlocked>) -> F + Send + 'static,
        F: Future<Output = Result<T, EngineError>> + Send + 'static,
    {
        let subject = subject.into();
        let what = format!("{} {subject}", <&str>::from(kind));
        let (entry, token) = self.enter(kind, subject)?;
        let origin = Origin::operation(entry.id.0, what);
        let result = Arc::new(OnceLock::new());
        let operation = Operation { entry: entry.clone(), result: result.clone() };
        let context = OpContext { id: entry.id, entry: entry.clone() };
        // The work in a task of its own: a panic in it becomes this operation's failure. Here its one lock context is made.
        let task = tokio::spawn(self.inner.locks.root(origin, move |locks| work(context, locks)));
        let operations = self.clone();
        tokio::spawn(async move {
            let ended = match task.await {
                Ok(ended) => ended.map_err(Arc::new),
                Err(error) => Err(Arc::new(EngineError::Panicked { detail: error.to_string() })),
            };
            let id = entry.id;
            let status = match &ended {
                Ok(made) => Status::Succeeded(made.clone().into()),
                Err(error) => {
                    tracing::warn!(operation = %id, ?kind, error = %error.chain(), "operation failed");
                    Status::Failed(error.clone())
                }
            };
            // First, so that whoever sees the end finds the result. Nobody else sets it.
            let _ = result.set(ended);
            entry.output.send_modify(Said::end);
            entry.state.send_modify(|state| state.end(status));
            operations.retain(id);
            drop(token);
        });
        Ok(operation)
    }

    /// Registers an operation. The token keeps the daemon from going down before it is dropped.
    fn enter(
        &self,
        kind: OperationKind,
        subject: String,
    ) -> Result<(Arc<Entry>, TaskTrackerToken), EngineError> {
        let queued = OperationProgress { stage: "queued".into(), ..Default::default() };
        self.table(|table| {
            if table.closed {
                return Err(EngineError::ShuttingDown);
            }
            table.last += 1;
            let id = OperationId(table.last);
            let status = Status::Running(queued.clone());
            let now = Snapshot { id, kind, subject, begun_at: unix_seconds(), ended_at: None, status };
            let state = State { now, stages: VecDeque::from([queued]), reached: 1, version: 0 };
            let entry = Arc::new(Entry {
                id,
                state: watch::Sender::new(state),
                output: watch::Sender::new(Said::default()),
                cancel: CancellationToken::new(),
                preempted: AtomicBool::new(false),
            });
            table.entries.insert(id, entry.clone());
            Ok((entry, self.inner.tasks.token()))
        })
    }

    /// Keeps an ended operation for late readers, and forgets the one that ended longest ago.
    fn retain(&self, id: OperationId) {
        self.table(|table| {
            table.ended.push_back(id);
            while table.ended.len() > KEPT {
                if let Some(oldest) = table.ended.pop_front() {
                    table.entries.remove(&oldest);
                }
            }
        });
    }

    /// All that are at work and the last of the ended, oldest first.
    pub fn list(&self) -> Vec<Snapshot> {
        self.table(|table| table.entries.values().map(|entry| entry.state.borrow().now.clone()).collect())
    }

    /// One as it is now.
    ///
    /// # Errors
    /// [`EngineError::NotFound`].
    pub fn get(&self, id: OperationId) -> Result<Snapshot, EngineError> {
        Ok(self.entry(id)?.state.borrow().now.clone())
    }

    /// Follows one.
    ///
    /// # Errors
    /// [`EngineError::NotFound`].
    pub fn watch(&self, id: OperationId) -> Result<Watcher, EngineError> {
        Ok(Watcher { receiver: self.entry(id)?.state.subscribe(), told: None })
    }

    /// Hears what one says.
    ///
    /// # Errors
    /// [`EngineError::NotFound`].
    pub fn listen(&self, id: OperationId) -> Result<Listener, EngineError> {
        Ok(Listener::new(self.entry(id)?.output.subscribe()))
    }

    /// Asks one to give up; an ended one is left as it is.
    ///
    /// # Errors
    /// [`EngineError::NotFound`].
    pub fn cancel(&self, id: OperationId) -> Result<(), EngineError> {
        self.entry(id)?.cancel.cancel();
        Ok(())
    }

    /// [`Self::cancel`] by another operation that wants the same VM.
    pub(crate) fn preempt(&self, id: OperationId) {
        if let Ok(entry) = self.entry(id) {
            entry.preempted.store(true, Ordering::Relaxed);
            entry.cancel.cancel();
        }
    }

    /// Waits for the end of one that is known by its id only; cancel-safe.
    ///
    /// # Errors
    /// That of the operation, or [`EngineError::NotFound`].
    pub async fn wait(&self, id: OperationId) -> Result<Outcome, Arc<EngineError>> {
        let mut receiver = self.entry(id).map_err(Arc::new)?.state.subscribe();
        let ended = receiver.wait_for(|state| state.now.status.ended()).await;
        match ended.map(|state| state.now.status.clone()) {
            Ok(Status::Succeeded(outcome)) => Ok(outcome),
            Ok(Status::Failed(error)) => Err(error),
            Ok(Status::Running(_)) | Err(_) => Err(Arc::new(vanished())),
        }
    }

    /// Whether the daemon goes down: operations that are cancelled now are the next one's to go on with.
    pub(crate) fn closed(&self) -> bool {
        self.table(|table| table.closed)
    }

    /// Takes no more, cancels all that are at work and waits until each has unwound.
    pub async fn shut_down(&self) {
        self.table(|table| {
            table.closed = true;
            table.entries.values().for_each(|entry| entry.cancel.cancel());
        });
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    fn entry(&self, id: OperationId) -> Result<Arc<Entry>, EngineError> {
        self.table(|table| table.entries.get(&id).cloned()).ok_or_else(|| EngineError::NotFound {
            what: "operation",
            name: id.to_string(),
            hint: "ended operations are kept for a while only, and none outlives the daemon".into(),
        })
    }

    fn table<T>(&self, f: impl FnOnce(&mut Table) -> T) -> T {
        // A panic under this lock leaves the table whole; there is nothing to repair.
        f(&mut self.inner.table.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

/// A work's task ends without a result only where the runtime itself ends.
fn vanished() -> EngineError {
    EngineError::Panicked { detail: "its task vanished".into() }
}

#[cfg(test)]
mod tests;
