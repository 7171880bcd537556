//! The guest's work back on the host.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use vm_locks::{Ctx, Unlocked};
use vm_types::{
    OperationId,
    guest::files::{Seen, SeenKind},
    operation::OperationKind,
    workspace::{ExportOutcome, SubmoduleBranch, WorkspaceExport},
};
use vm_workspace::{
    Baseline, Cancel, Difference, EntryKind, Selection, Workspace, WorkspaceError,
    export::{ApplyReport, Export, ExportError, SubmoduleReport, Wish},
};

use super::{
    Caller,
    fetch::Reached,
    on_host,
    plan::absolute,
    status::{text, texts},
    up,
};
use crate::{
    Engine, EngineError,
    ops::{OpContext, Outcome},
    vm::cell::Cell,
};

const DOING: &str = "bringing back the guest's work";

/// What is to be brought back, and as what.
#[derive(Debug, Clone)]
pub struct ExportRequest {
    /// Name or id.
    pub vm: String,
    /// The workspace's directory in the guest, or that one's name; not needed where there is only one.
    pub at: Option<String>,
    /// As what.
    pub to: ExportTo,
    /// Only look what would be done.
    pub dry_run: bool,
    /// Who asks.
    pub caller: Caller,
}

/// As what a guest's work is brought back.
#[derive(Debug, Clone)]
pub enum ExportTo {
    /// A patch, to be read with [`Engine::read_patch`].
    Patch,
    /// A branch of the host's repository.
    Branch {
        /// Its name.
        name: String,
        /// Of the commit for what the guest has not committed.
        message: Option<String>,
    },
    /// Files in a directory.
    Files {
        /// It.
        directory: PathBuf,
        /// Also what git ignores in the guest.
        ignored: bool,
    },
    /// The workspace's own files.
    Apply,
}

impl ExportTo {
    fn wish(&self) -> Wish {
        match self {
            Self::Patch => Wish::Patch,
            Self::Branch { .. } => Wish::Branch,
            Self::Files { ignored, .. } => Wish::Files { ignored: *ignored },
            Self::Apply => Wish::Files { ignored: false },
        }
    }
}

impl From<WorkspaceExport> for Outcome {
    fn from(export: WorkspaceExport) -> Self {
        Self::WorkspaceExported(Box::new(export))
    }
}

impl Engine {
    /// Brings a guest's work back, in an operation of its own.
    ///
    /// # Errors
    /// No such VM, one that is not running, or a directory that is no absolute path.
    pub fn export_workspace(&self, request: ExportRequest) -> Result<OperationId, EngineError> {
        if let ExportTo::Files { directory, .. } = &request.to {
            absolute(directory)?;
        }
        let cell = self.find(&request.vm)?;
        up(&cell, DOING)?;
        let engine = self.clone();
        let subject = cell.name().to_string();
        self.operations()
            .begin(OperationKind::WorkspaceExport, subject, move |context, mut ctx| async move {
                Box::pin(engine.export_now(&mut ctx, &cell, request, &context)).await
            })
            .map(|operation| operation.id())
    }

    async fn export_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        request: ExportRequest,
        context: &OpContext,
    ) -> Result<WorkspaceExport, EngineError> {
        let (live, _entered) = self.enter(ctx, cell, DOING, context).await?;
        let cancel = Cancel::default();
        let _ends = cancel.on_drop();
        let ExportRequest { at, to, dry_run, caller, .. } = request;
        let fetched = async {
            let record = self.workspace_meant(cell, at.as_deref()).await?;
            let baseline = self.whole(cell, &record).await?;
            context.progress(format!("looking at {}", record.source.display()), 0, None);
            let workspace = self.reopen(&record, caller, &cancel).await?;
            let reached = Reached::new(self, cell, &record).await?;
            let survey = reached.survey(context).await?;
            let export = reached.export(&workspace, &baseline, survey.clone(), to.wish(), context).await?;
            Ok((record, export, Agreement { reached, baseline, survey }))
        };
        let (workspace, export, agreement) =
            Box::pin(self.while_up(cell, live, DOING, context, fetched)).await?;
        // From here on the guest has no part in it: what is written is written, though the VM goes down.
        context.progress("writing on the host", 0, None);
        let write = async {
            match to {
                ExportTo::Patch => self.patch(export, context).await,
                ExportTo::Branch { name, message } => {
                    let message = message.unwrap_or_else(|| format!("Work in VM {}", cell.name()));
                    branch(export, name, message, dry_run).await
                }
                ExportTo::Files { directory, .. } => {
                    let write = move |export: &mut Export, to: &Path| export.files(to, dry_run);
                    Ok(files(export, directory, write).await?.0)
                }
                ExportTo::Apply => {
                    let write = move |export: &mut Export, _: &Path| export.apply(dry_run);
                    let (written, same) = files(export, workspace.source.clone(), write).await?;
                    if !dry_run {
                        let agreed = async {
                            let opened = self.reopen(&workspace, caller, &cancel).await?;
                            let baseline = agreement.after(opened, same).await?;
                            self.save_baseline(cell, live, &workspace.path, baseline, DOING).await
                        };
                        // Then a later export finds conflicts where there are none, which does no harm.
                        if let Err(error) = agreed.await {
                            tracing::warn!(vm = %cell.name(), error = %error.chain(), "what host and guest now both have could not be written down");
                        }
                    }
                    Ok(written)
                }
            }
        };
        let (outcome, warnings) = context.cancellable(write).await?;
        Ok(WorkspaceExport { workspace, outcome, dry_run, warnings })
    }

    /// Writes the patch into a file that its reader finds by the operation.
    async fn patch(&self, mut export: Export, context: &OpContext) -> Result<Written, EngineError> {
        let scratch = self.inner.layout.workspace_scratch();
        let (file, written) = on_host(move || {
            let failed = |source| ExportError::Output { source };
            let file = tempfile::tempfile_in(scratch).map_err(failed)?;
            let mut to = BufWriter::new(&file);
            let report = export.patch(&mut to)?;
            to.flush().map_err(failed)?;
            drop(to);
            let outcome = ExportOutcome::Patch { bytes: report.bytes, left_out: texts(report.left_out) };
            Ok::<_, ExportError>((file, (outcome, export.warnings())))
        })
        .await?;
        let file: File = file;
        self.inner.patches.keep(context.id, file);
        Ok(written)
    }
}

/// What was done, and what people should know of it.
type Written = (ExportOutcome, Vec<String>);

async fn branch(
    mut export: Export,
    name: String,
    message: String,
    dry_run: bool,
) -> Result<Written, EngineError> {
    on_host(move || {
        let report = export.branch(&name, &message, dry_run)?;
        let outcome = ExportOutcome::Branch {
            branch: name,
            commit: report.commit,
            before: report.before,
            commits: report.commits,
            uncommitted: report.uncommitted,
            continues: report.continues,
            submodules: report.submodules.into_iter().map(submodule).collect(),
        };
        Ok::<_, ExportError>((outcome, export.warnings()))
    })
    .await
}

fn submodule(report: SubmoduleReport) -> SubmoduleBranch {
    let SubmoduleReport { path, commit, before, commits } = report;
    SubmoduleBranch { path: text(&path), commit, before, commits }
}

/// Writes files below a directory. What was done, and which paths both sides now have alike.
async fn files(
    mut export: Export,
    directory: PathBuf,
    write: impl FnOnce(&mut Export, &Path) -> Result<ApplyReport, ExportError> + Send + 'static,
) -> Result<(Written, Vec<Vec<u8>>), EngineError> {
    on_host(move || {
        let ApplyReport { written, removed, unchanged, conflicts, failed } = write(&mut export, &directory)?;
        let same = [&written, &removed, &unchanged].into_iter().flatten().cloned().collect();
        let outcome = ExportOutcome::Files {
            directory,
            written: texts(written),
            removed: texts(removed),
            unchanged: unchanged.len() as u64,
            conflicts: texts(conflicts),
            failed: failed.into_iter().map(|(path, why)| (text(&path), why)).collect(),
        };
        Ok::<_, ExportError>(((outcome, export.warnings()), same))
    })
    .await
}

/// A path, and all above it.
fn upwards(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::successors(Some(path), |path| Some(&path[..path.iter().rposition(|byte| *byte == b'/')?]))
}

/// What host and guest have alike once the guest's work was applied: as good as sent, so that work which goes on from there is
/// none that clashes with itself.
struct Agreement {
    reached: Reached,
    baseline: Arc<Baseline>,
    survey: Vec<Seen>,
}

impl Agreement {
    /// The record after `paths` were brought back to `workspace`, which was opened since. Of a file that either side has changed
    /// by now, it says what it said.
    async fn after(self, workspace: Arc<Workspace>, paths: Vec<Vec<u8>>) -> Result<Baseline, EngineError> {
        let Self { reached, baseline, survey } = self;
        let (there, gone): (Vec<_>, Vec<_>) =
            paths.into_iter().partition(|path| workspace.entry(path).is_some());
        let digests = reached.guest.digests(&reached.directory, &there).await?;
        reached.close().await;
        on_host(move || {
            // The directories above came with them.
            let with_directories: BTreeSet<_> = there.iter().flat_map(|path| upwards(path)).collect();
            let with_directories: Vec<_> = with_directories.into_iter().map(<[u8]>::to_vec).collect();
            let mut now = workspace.archive(Selection::Paths(&with_directories), std::io::sink())?;
            let seen: BTreeMap<&[u8], &Seen> =
                survey.iter().map(|seen| (seen.path.as_slice(), seen)).collect();
            let guests: BTreeMap<&[u8], _> = there.iter().map(Vec::as_slice).zip(digests).collect();
            now.entries.retain(|path, entry| match (entry.kind, seen.get(path.as_slice())) {
                (EntryKind::File, Some(_)) => {
                    entry.sha256.is_some() && guests.get(path.as_slice()).copied().flatten() == entry.sha256
                }
                (EntryKind::Symlink, Some(seen)) => seen.target == entry.target,
                (EntryKind::Directory, Some(seen)) => seen.kind == SeenKind::Directory,
                _ => false,
            });
            let removed = gone.into_iter().filter(|path| !seen.contains_key(path.as_slice())).collect();
            let difference = Difference { remove: removed, ..Difference::default() };
            let mut after = baseline.after(&workspace, &difference, now, None, survey.clone());
            // The guest still starts from where it did.
            (after.base, after.branch) = (baseline.base.clone(), baseline.branch.clone());
            Ok::<_, WorkspaceError>(after)
        })
        .await
    }
}
