//! Bringing a workspace into a VM.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use vm_host::clock::unix_seconds;
use vm_locks::{Ctx, Unlocked};
use vm_types::{
    OperationId,
    operation::OperationKind,
    plugin::Severity,
    workspace::{PreparedWorkspace, WorkspaceRecord, WorkspaceState},
};
use vm_workspace::{Baseline, Cancel, Workspace};

use super::{
    Caller, WorkspacesError, baseline_file,
    choose::{self, Asked, Chosen},
    error::ImportError,
    on_host,
    plan::{Opened, absolute},
    up,
};
use crate::{
    Engine, EngineError,
    ops::{OpContext, Outcome},
    ports::{ImportFailure, ImportRequest, ImportWatch, Imported},
    vm::cell::{Cell, Live},
};

/// What is being done, for errors.
const DOING: &str = "bringing in the workspace";
/// How long an import of little may take.
const TIME_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Bytes that even a slow guest takes in a second.
const SLOW: u64 = 512 << 10;

/// How long an import of so many bytes may take.
fn time_limit(bytes: u64) -> Duration {
    #[cfg(feature = "failpoints")]
    if let Some(limit) = crate::failpoint::import_time() {
        return limit;
    }
    TIME_LIMIT + Duration::from_secs(bytes / SLOW)
}

/// What is to be brought where.
#[derive(Debug, Clone)]
pub struct PrepareRequest {
    /// Name or id.
    pub vm: String,
    /// The directory on the host, or one below it.
    pub path: PathBuf,
    /// The directory in the guest.
    pub to: Option<String>,
    /// `IMPORTER` or `IMPORTER/STRATEGY`.
    pub importer: Option<String>,
    /// All of the history.
    pub full: bool,
    /// The guest's user.
    pub user: Option<String>,
    /// What is at the directory may be thrown away.
    pub replace: bool,
    /// Who asks.
    pub caller: Caller,
}

impl From<PreparedWorkspace> for Outcome {
    fn from(prepared: PreparedWorkspace) -> Self {
        Self::WorkspacePrepared(Box::new(prepared))
    }
}

impl Engine {
    /// Brings a directory of the host into a running VM, in an operation of its own. It does not keep the VM from being stopped,
    /// which ends it.
    ///
    /// # Errors
    /// No such VM, or one that is not running.
    pub fn prepare_workspace(&self, request: PrepareRequest) -> Result<OperationId, EngineError> {
        absolute(&request.path)?;
        let cell = self.find(&request.vm)?;
        up(&cell, DOING)?;
        let engine = self.clone();
        let subject = format!("{} from {}", cell.name(), request.path.display());
        self.operations()
            .begin(OperationKind::WorkspacePrepare, subject, move |context, mut ctx| async move {
                Box::pin(engine.prepare_now(&mut ctx, &cell, request, &context)).await
            })
            .map(|operation| operation.id())
    }

    async fn prepare_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        request: PrepareRequest,
        context: &OpContext,
    ) -> Result<PreparedWorkspace, EngineError> {
        let (live, _entered) = self.enter(ctx, cell, DOING, context).await?;
        let cancel = Cancel::default();
        let _ends = cancel.on_drop();
        let import = Import { engine: self, cell, live, context, cancel };
        let watch = Mutex::new(None);
        let done = Box::pin(self.while_up(cell, live, DOING, context, import.run(&request, &watch))).await;
        let begun: Option<Arc<Watch>> = watch.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let (Err(error), Some(watch)) = (&done, begun) {
            watch.broke_off(error).await;
        }
        done
    }
}

/// One import.
struct Import<'a> {
    engine: &'a Engine,
    cell: &'a Arc<Cell>,
    live: Live,
    context: &'a OpContext,
    cancel: Cancel,
}

impl Import<'_> {
    async fn run(
        &self,
        request: &PrepareRequest,
        begun: &Mutex<Option<Arc<Watch>>>,
    ) -> Result<PreparedWorkspace, EngineError> {
        let Self { engine, cell, context, .. } = self;
        let opened = engine.look_at(&request.path, request.caller, &self.cancel, context).await?;
        let workspace = opened.workspace.clone();
        let settings = opened.settings.as_ref();
        let to = choose::destination(request.to.as_deref(), settings, &workspace.facts().name)?;
        let former = engine.inner.store.workspaces().get(cell.id(), &to).await?;
        let anew = request.replace && request.importer.is_none();
        let baseline = match &former {
            // What came from elsewhere says nothing of this one.
            // Nor does it matter if what came is to be thrown away.
            Some(former) if former.source == workspace.top() && !anew => self.baseline(former).await?,
            _ => None,
        };
        let free = request.importer.is_none() && settings.is_none_or(|settings| settings.importer.is_none());
        let known = baseline.is_some();
        let attempt =
            |baseline| Box::pin(self.attempt(request, &opened, to.clone(), former.as_ref(), baseline, begun));
        match attempt(baseline).await {
            // What was sent is of no use any more, which only a look into the guest can tell: so another way, as at first.
            Err(error) if free && known && is_not_prepared(&error) => {
                tracing::info!(vm = %cell.name(), path = to, "what was sent is of no use any more");
                attempt(None).await
            }
            done => done,
        }
    }

    /// Has the importer that is best for it, `baseline` being what was sent before, bring the workspace.
    async fn attempt(
        &self,
        request: &PrepareRequest,
        opened: &Opened,
        to: String,
        former: Option<&WorkspaceRecord>,
        baseline: Option<Arc<Baseline>>,
        begun: &Mutex<Option<Arc<Watch>>>,
    ) -> Result<PreparedWorkspace, EngineError> {
        let Self { engine, cell, context, .. } = self;
        let (workspace, settings) = (&opened.workspace, opened.settings.as_ref());
        let unfinished =
            former.is_some_and(|former| matches!(former.state, WorkspaceState::Unfinished { .. }));
        let probed = engine.offers(opened, baseline.clone(), context).await;
        let asked = Asked { importer: request.importer.as_deref(), full: request.full };
        let Chosen { offer, .. } = choose::choose(asked, settings, &probed)?;

        // Who worked in it before goes on doing so.
        let again = former.filter(|_| request.user.is_none()).map(|former| former.user.clone());
        let user = match again.or_else(|| opened.user(request.user.as_ref())) {
            Some(user) => user,
            None => self.default_user().await?,
        };
        let facts = workspace.facts();
        let record = WorkspaceRecord {
            path: to.clone(),
            source: workspace.top().to_owned(),
            is_git: facts.is_git,
            importer: offer.plugin.clone(),
            strategy: offer.strategy.clone(),
            base: facts.head.clone(),
            branch: facts.branch.clone(),
            user: user.clone(),
            by: request.caller.uid,
            at: unix_seconds(),
            state: WorkspaceState::Unfinished { cause: None },
        };
        let way = record.way();
        let watch = Arc::new(Watch::new(self, record));
        *begun.lock().unwrap_or_else(PoisonError::into_inner) = Some(watch.clone());
        context.progress(way.clone(), 0, None);
        let vm = cell.record();
        let job = ImportRequest {
            plugin: offer.plugin.clone(),
            strategy: offer.strategy.clone(),
            source: engine.import_source(opened, baseline),
            vm: engine.facts_of(cell.id(), &vm.spec, vm.address).await?,
            guest: cell.paths(),
            destination: to.clone(),
            user,
            replace: request.replace || unfinished,
            time_limit: time_limit(facts.bytes),
            watch: watch.clone(),
        };
        let imported =
            engine.inner.importers.import(job).await.map_err(|source| match source.code.as_str() {
                CANCELLED => EngineError::Cancelled,
                _ => WorkspacesError::Import(Box::new(ImportError {
                    way,
                    workspace: workspace.top().to_owned(),
                    to,
                    vm: cell.name().clone(),
                    step: watch.step(),
                    source,
                }))
                .into(),
            })?;
        let mut warnings = facts.warnings.clone();
        warnings.extend(offer.warnings);
        self.keep(&watch, imported, warnings).await
    }

    /// What was sent before. One that cannot be read any more is as good as none.
    async fn baseline(&self, former: &WorkspaceRecord) -> Result<Option<Arc<Baseline>>, EngineError> {
        match self.engine.baseline_of(self.cell, former).await {
            Err(error) => {
                tracing::warn!(vm = %self.cell.name(), path = former.path, error = %error.chain(), "what was sent is not known any more");
                Ok(None)
            }
            Ok(baseline) => Ok(baseline),
        }
    }

    /// Whom a command in the VM runs as where nobody says otherwise.
    async fn default_user(&self) -> Result<String, EngineError> {
        let image = self.cell.record().spec.image;
        let image = self.engine.inner.store.images().by_digest(image.hex()).await?;
        let user = image.and_then(|image| image.config.user).filter(|user| !user.is_empty());
        Ok(user.unwrap_or_else(|| "root".to_owned()))
    }

    /// Writes down what the guest has now.
    async fn keep(
        &self,
        watch: &Watch,
        imported: Imported,
        mut warnings: Vec<String>,
    ) -> Result<PreparedWorkspace, EngineError> {
        let Imported { baseline, findings, bytes } = imported;
        self.context.progress("writing down what was sent", 0, None);
        warnings.extend(baseline.sent.warnings.iter().cloned());
        let told = findings.into_iter().filter(|finding| finding.severity != Severity::Ok);
        warnings.extend(told.map(|finding| finding.message));
        let mut seen = std::collections::BTreeSet::new();
        warnings.retain(|warning| seen.insert(warning.clone()));
        let files =
            baseline.sent.entries.values().filter(|entry| entry.kind != vm_workspace::EntryKind::Directory);
        let state = WorkspaceState::Prepared { files: files.count() as u64, bytes: baseline.sent.bytes() };
        let workspace = WorkspaceRecord { at: unix_seconds(), state, ..watch.record.clone() };
        self.engine.save_baseline(self.cell, self.live, &workspace.path, baseline, DOING).await?;
        self.engine.inner.store.workspaces().put(self.cell.id(), workspace.clone()).await?;
        Ok(PreparedWorkspace { workspace, sent_bytes: bytes, warnings })
    }
}

impl Engine {
    /// Keeps what was sent to a directory of a VM for as long as the VM is there.
    pub(super) async fn save_baseline(
        &self,
        cell: &Arc<Cell>,
        live: Live,
        path: &str,
        baseline: Baseline,
        doing: &'static str,
    ) -> Result<(), EngineError> {
        let file = baseline_file(cell, path);
        let draft = self.inner.layout.workspace_scratch().join(format!("{}-{}", cell.id(), unix_nanos()));
        let written = draft.clone();
        on_host(move || baseline.save(&written)).await?;
        let directory = cell.paths().workspaces();
        // Not into the directory of a VM that is just being deleted.
        let placed = cell.while_up(live.vmm, || {
            match std::fs::create_dir(&directory) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            std::fs::rename(&draft, &file)
        });
        if !matches!(placed, Some(Ok(()))) {
            let _ = std::fs::remove_file(&draft);
        }
        match placed {
            None => Err(WorkspacesError::down(cell, doing).into()),
            Some(Err(source)) => Err(WorkspacesError::File { action: "write", path: file, source }.into()),
            Some(Ok(())) => Ok(()),
        }
    }
}

fn unix_nanos() -> u128 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap_or_default().as_nanos()
}

/// Of failures to bring only what has changed, as what was brought before is not there.
const NOT_PREPARED: &str = "workspace.not-prepared";

fn is_not_prepared(error: &EngineError) -> bool {
    let EngineError::Workspace(error) = error else { return false };
    matches!(&**error, WorkspacesError::Import(error) if error.source.code == NOT_PREPARED)
}

/// Of failures that are the operation's own end.
const CANCELLED: &str = "workspace.cancelled";

/// Follows an import for the operation and the record.
struct Watch {
    engine: Engine,
    cell: Arc<Cell>,
    context: OpContext,
    /// As long as it is not done.
    record: WorkspaceRecord,
    begun: AtomicBool,
    step: Mutex<Option<String>>,
}

impl Watch {
    fn new(import: &Import<'_>, record: WorkspaceRecord) -> Self {
        Self {
            engine: import.engine.clone(),
            cell: import.cell.clone(),
            context: import.context.clone(),
            record,
            begun: AtomicBool::new(false),
            step: Mutex::default(),
        }
    }

    fn step(&self) -> Option<String> {
        self.step.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes down that what is in the guest now is of no use.
    async fn broke_off(&self, error: &EngineError) {
        if !self.begun.load(Ordering::Relaxed) {
            return;
        }
        let cause = Some(error.chain());
        let record = WorkspaceRecord { state: WorkspaceState::Unfinished { cause }, ..self.record.clone() };
        match self.engine.inner.store.workspaces().put(self.cell.id(), record).await {
            // One that was deleted has no workspaces any more.
            Ok(()) | Err(vm_store::StoreError::NoSuchVm { .. }) => {}
            // It is unfinished there already, without a cause.
            Err(error) => {
                tracing::warn!(vm = %self.cell.name(), %error, "why an import broke off could not be written down")
            }
        }
    }
}

#[async_trait]
impl ImportWatch for Watch {
    async fn begins(&self) -> Result<(), ImportFailure> {
        let failed = |error: &EngineError| ImportFailure {
            plugin: self.record.importer.clone(),
            code: "workspace.record".into(),
            message: error.chain(),
            hint: error.hint(),
        };
        let put = self.engine.inner.store.workspaces().put(self.cell.id(), self.record.clone()).await;
        put.map_err(|error| failed(&error.into()))?;
        self.begun.store(true, Ordering::Relaxed);
        // Not before: one that is recorded as whole has it.
        let path = baseline_file(&self.cell, &self.record.path);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(failed(&WorkspacesError::File { action: "remove", path, source }.into()))
            }
            _ => Ok(()),
        }
    }

    fn progress(&self, step: &str, done: u64, total: Option<u64>) {
        let mut current = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_deref() != Some(step) {
            *current = Some(step.to_owned());
        }
        drop(current);
        self.context.progress(step, done, total);
    }
}

/// A workspace that is opened anew for what was sent of it, as the caller.
impl Engine {
    pub(super) async fn reopen(
        &self,
        record: &WorkspaceRecord,
        caller: Caller,
        cancel: &Cancel,
    ) -> Result<Arc<Workspace>, EngineError> {
        self.open_workspace(&record.source, caller, cancel).await
    }
}
