//! The one place where the host is changed.
//!
//! ```text
//!   intent -> apply -> applied      undoing -> undo -> undone
//! ```
//!
//! [`Scope::apply`] and [`Scope::unwind`] are the only ways to the layers' `apply` and `undo`. An
//! effect whose `apply` fails or is dropped half way stays in the journal as an intent; unwinding undoes it like an applied one.

pub(crate) mod cgroups;
mod names;
mod shims;
mod tools;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::sync::oneshot;
use vm_disk::{Cow, Disks, Files};
use vm_host::Runner;
use vm_locks::{Ctx, Level, Lock, LockAfter, LockTable};
use vm_net::Net;
use vm_types::{Effect, EffectId, Handle, Layer, Layout, Observed, VmId, VmName};

pub use self::{
    cgroups::limitable,
    names::NameTable,
    shims::{FakeShims, HostShims, Shims},
};
#[cfg(feature = "failpoints")]
use crate::failpoint::{self, Change, Side};
use crate::{
    error::EngineError,
    journal::{By, Entry, Journal, Phase, Step},
};

/// From the end of a phase until its outcome is written for readers.
const SOON: Duration = Duration::from_millis(200);

/// The layers that know how to apply each effect.
#[derive(Debug, Clone)]
pub struct Host {
    /// Network effects.
    pub net: Arc<dyn Net>,
    /// Copy-on-write disks.
    pub cow: Arc<dyn Cow>,
    /// Plugins' disks.
    pub disks: Disks,
    /// Directories and files.
    pub files: Files,
    /// VMs' processes.
    pub shims: Arc<dyn Shims>,
    /// Records of the name service.
    pub names: NameTable,
    /// Tools of the host.
    pub runner: Arc<dyn Runner>,
}

impl Host {
    /// Files and disks are only touched below `roots`.
    pub fn new(
        net: Arc<dyn Net>,
        cow: Arc<dyn Cow>,
        shims: Arc<dyn Shims>,
        roots: impl IntoIterator<Item = PathBuf>,
        runner: Arc<dyn Runner>,
    ) -> Self {
        let roots: Vec<_> = roots.into_iter().collect();
        let disks = Disks::new(roots.clone(), runner.clone());
        Self { net, cow, disks, files: Files::new(roots), shims, names: NameTable::default(), runner }
    }
}

/// The effects of each layer, for the matches below: whoever adds a kind learns here where it belongs.
macro_rules! of {
    (net) => {
        Effect::Sysctl { .. }
            | Effect::Bridge { .. }
            | Effect::Firewall { .. }
            | Effect::Rules { .. }
            | Effect::Port { .. }
            | Effect::LinkDns { .. }
            | Effect::Tap { .. }
    };
    (files) => {
        Effect::Directory { .. } | Effect::File { .. } | Effect::AppendedFile { .. }
    };
}

impl Host {
    /// What undo will need and only the host before the change can tell.
    async fn former(&self, effect: &Effect) -> Result<Handle, EngineError> {
        match effect {
            of!(net) => Ok(self.net.former(effect).await?),
            of!(files)
            | Effect::CowDisk { .. }
            | Effect::DmSnapshot { .. }
            | Effect::Disk { .. }
            | Effect::Tool { .. }
            | Effect::NameRecord { .. }
            | Effect::Cgroup { .. }
            | Effect::Shim { .. } => Ok(Handle::None),
        }
    }

    async fn apply(&self, effect: &Effect) -> Result<Handle, EngineError> {
        Ok(match effect {
            of!(files) => self.files.apply(effect).await?,
            of!(net) => self.net.apply(effect).await?,
            Effect::CowDisk { .. } | Effect::DmSnapshot { .. } => self.cow.apply(effect).await?,
            Effect::Disk { .. } => self.disks.apply(effect).await?,
            Effect::Tool { program, arguments, .. } => {
                Handle::Value { value: tools::run(&*self.runner, program, arguments).await? }
            }
            Effect::NameRecord { .. } => {
                self.names.add(effect);
                Handle::None
            }
            Effect::Cgroup { groups, .. } => cgroups::make(groups).map(|()| Handle::None)?,
            Effect::Shim { run_dir, spec } => self.shims.apply(run_dir, spec).await?,
        })
    }

    /// What the host shows of an effect.
    ///
    /// # Errors
    /// The layer.
    pub async fn observe(&self, effect: &Effect) -> Result<Observed, EngineError> {
        Ok(match effect {
            of!(files) => self.files.observe(effect).await?,
            of!(net) => self.net.observe(effect).await?,
            Effect::CowDisk { .. } | Effect::DmSnapshot { .. } => self.cow.observe(effect).await?,
            Effect::Disk { .. } => self.disks.observe(effect).await?,
            // Nothing on the host tells whether a tool was run. Its manifest says that once more is no harm.
            Effect::Tool { .. } => Observed::Absent,
            Effect::NameRecord { .. } => self.names.observe(effect),
            Effect::Cgroup { groups, .. } => cgroups::observe(groups),
            Effect::Shim { run_dir, .. } => self.shims.observe(run_dir).await,
        })
    }

    async fn undo(&self, effect: &Effect, handle: &Handle) -> Result<(), EngineError> {
        match effect {
            of!(files) => self.files.undo(effect, handle).await?,
            of!(net) => self.net.undo(effect, handle).await?,
            Effect::CowDisk { .. } | Effect::DmSnapshot { .. } => self.cow.undo(effect, handle).await?,
            Effect::Disk { .. } => self.disks.undo(effect, handle).await?,
            Effect::Tool { program, undo, .. } => {
                tools::run(&*self.runner, program, undo).await?;
            }
            Effect::NameRecord { .. } => self.names.remove(effect),
            Effect::Cgroup { groups, .. } => cgroups::remove(groups).await?,
            Effect::Shim { run_dir, .. } => self.shims.undo(run_dir, handle).await?,
        }
        Ok(())
    }
}

/// A journal with the host it speaks of. Steps of one scope are taken one after the other.
#[derive(Debug)]
pub struct Scope {
    host: Host,
    path: PathBuf,
    journal: Lock<vm_locks::Journal, Journal>,
}

impl Scope {
    /// A VM's scope; `name` is what people know it by, and `None` where there is no record of it any more.
    ///
    /// # Errors
    /// An unreadable journal.
    pub fn vm(
        host: &Host,
        layout: &Layout,
        id: &VmId,
        name: Option<&VmName>,
        boot_id: &str,
    ) -> Result<Self, EngineError> {
        let lock = match name {
            Some(name) => format!("journal of vm {name}"),
            None => format!("journal of the former vm {id}"),
        };
        Self::open(host, lock, layout.vm_journal(id), layout.vm_handles(id), boot_id)
    }

    /// The daemon's own scope.
    ///
    /// # Errors
    /// An unreadable journal.
    pub fn host(host: &Host, layout: &Layout, boot_id: &str) -> Result<Self, EngineError> {
        let lock = "journal of the host".to_owned();
        Self::open(host, lock, layout.host_journal(), layout.host_handles(), boot_id)
    }

    fn open(
        host: &Host,
        lock: String,
        path: PathBuf,
        handles: PathBuf,
        boot_id: &str,
    ) -> Result<Self, EngineError> {
        let opened = Journal::open(&path, &handles, boot_id).or_else(|error| {
            // What cannot be read must not keep all the others from coming up. It is put aside, and what the handles know counts.
            let mut aside = path.clone().into_os_string();
            aside.push(".damaged");
            tracing::error!(journal = %path.display(), %error, "unreadable, and put aside");
            std::fs::rename(&path, aside).and_then(|()| Journal::open(&path, &handles, boot_id))
        });
        let journal = opened.map_err(|source| EngineError::Journal { path: path.clone(), source })?;
        Ok(Self { host: host.clone(), path, journal: Lock::new(lock, journal) })
    }

    /// Applies an effect unless it is applied already in this boot. On failure the effect itself is undone at once.
    ///
    /// Dropping the future does not stop an effect that has begun (a blocking call could not be stopped anyhow): it goes on
    /// in a task of its own, and whoever unwinds waits for it. Only the copying of a disk, which may take long, is stopped.
    ///
    /// # Errors
    /// The journal or the layer. What was half done and could not be undone stays in the journal for [`Self::unwind`].
    pub async fn apply<L: Level>(
        &self,
        ctx: &mut Ctx<L>,
        effect: Effect,
        phase: Phase,
    ) -> Result<Handle, EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        self.apply_by(ctx, effect, phase, None).await
    }

    /// [`Self::apply`] of an effect that a plugin planned.
    ///
    /// # Errors
    /// As of [`Self::apply`].
    pub async fn apply_by<L: Level>(
        &self,
        ctx: &mut Ctx<L>,
        effect: Effect,
        phase: Phase,
        by: Option<By>,
    ) -> Result<Handle, EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        if matches!(effect, Effect::CowDisk { .. }) {
            let mut journal = ctx.lock(&self.journal).await;
            return Box::pin(apply(&self.host, &self.path, &mut journal, &effect, phase, by.as_ref())).await;
        }
        // Dropped with this future.
        let (_wanted, wanted) = oneshot::channel();
        let (host, path, journal) = (self.host.clone(), self.path.clone(), self.journal.clone());
        // A root of its own, as in every task. That it locks nothing but the journal, and that its caller, who waits for it,
        // may do so, is what the bound on `L` says.
        let work = ctx.table().root(ctx.origin(), async move |mut ctx| {
            let mut wanted: oneshot::Receiver<()> = wanted;
            // Cancel-safe: whoever does not wait for a lock any more leaves its queue.
            let mut journal = tokio::select! {
                biased;
                _ = &mut wanted => return Err(EngineError::Cancelled),
                held = ctx.lock(&journal) => held,
            };
            // Asked under the lock. Whoever gave up before it was ours may have unwound already, and finds nothing begun after
            // that; whoever gives up from here on unwinds when this is done.
            if wanted.try_recv() == Err(oneshot::error::TryRecvError::Closed) {
                return Err(EngineError::Cancelled);
            }
            apply(&host, &path, &mut journal, &effect, phase, by.as_ref()).await
        });
        tokio::spawn(work).await.map_err(|error| EngineError::Panicked { detail: error.to_string() })?
    }

    /// Notes that the guest of this journal's shim has answered: a daemon that finds both later need not doubt it.
    ///
    /// # Errors
    /// The journal.
    pub async fn answered<L: Level>(&self, ctx: &mut Ctx<L>) -> Result<(), EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        let mut journal = ctx.lock(&self.journal).await;
        let found = journal.entries().iter().find_map(|entry| match entry.handle {
            Handle::Processes { shim, vmm, .. } => Some((entry.effect.clone(), entry.phase, shim, vmm)),
            _ => None,
        });
        let Some((effect, phase, shim, vmm)) = found else { return Ok(()) };
        journal
            .record(&effect, phase, Step::Applied, Handle::Processes { shim, vmm, answered: true })
            .map_err(|source| EngineError::Journal { path: self.path.clone(), source })
    }

    /// Says that a phase has ended: what is open now is what the VM lives on.
    pub async fn settle<L: Level>(&self, ctx: &mut Ctx<L>)
    where
        vm_locks::Journal: LockAfter<L>,
    {
        let table = ctx.table();
        self.rest(table, &mut *ctx.lock(&self.journal).await);
    }

    /// Closes the journal, and has its fold written where nobody waits for it.
    fn rest(&self, table: LockTable, journal: &mut Journal) {
        if !journal.rest() {
            return;
        }
        let (journal, path) = (self.journal.clone(), self.path.clone());
        tokio::spawn(table.root("writing handles", async move |mut ctx| {
            // What is deleted by then, or has changed again, is not written in vain.
            tokio::time::sleep(SOON).await;
            let mut journal = ctx.lock(&journal).await;
            let Some(fold) = journal.settle() else { return };
            // The journal stays locked meanwhile.
            if let Ok(Err(error)) = tokio::task::spawn_blocking(move || fold.write()).await {
                tracing::warn!(journal = %path.display(), %error, "its handles could not be written");
            }
        }));
    }

    /// Undoes all of a phase, newest first. Goes on past an effect that cannot be undone, which stays in the journal.
    ///
    /// # Errors
    /// The first that could not be undone.
    pub async fn unwind<L: Level>(&self, ctx: &mut Ctx<L>, phase: Phase) -> Result<(), EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        self.undo_all(ctx, |entry| entry.phase == phase).await
    }

    /// Undoes what of these phases is part of one layer, newest first, as [`Self::unwind`] does.
    ///
    /// # Errors
    /// The first that could not be undone.
    pub async fn unwind_layer<L: Level>(
        &self,
        ctx: &mut Ctx<L>,
        phases: &[Phase],
        layer: Layer,
    ) -> Result<(), EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        self.undo_all(ctx, |entry| phases.contains(&entry.phase) && entry.effect.layer() == layer).await
    }

    /// Undoes what a plugin has planned, newest first, as [`Self::unwind`] does.
    ///
    /// # Errors
    /// The first that could not be undone.
    pub async fn unwind_plugin<L: Level>(&self, ctx: &mut Ctx<L>, plugin: &str) -> Result<(), EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        self.undo_all(ctx, |entry| entry.by.as_ref().is_some_and(|by| by.plugin == plugin)).await
    }

    /// Undoes these, newest first, as [`Self::unwind`] does.
    ///
    /// # Errors
    /// The first that could not be undone.
    pub async fn unwind_these<L: Level>(&self, ctx: &mut Ctx<L>, ids: &[EffectId]) -> Result<(), EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        self.undo_all(ctx, |entry| ids.contains(&entry.effect.id())).await
    }

    /// Undoes what no journal tells of and the host shows all the same.
    ///
    /// # Errors
    /// The layer's; it stays in this journal then.
    pub async fn reclaim<L: Level>(&self, ctx: &mut Ctx<L>, effect: &Effect) -> Result<(), EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        let table = ctx.table();
        let mut journal = ctx.lock(&self.journal).await;
        let result = undo(&self.host, &mut journal, effect, Phase::Host, &Handle::None).await;
        self.rest(table, &mut journal);
        result
    }

    /// What is applied or half done, in the order in which it was begun.
    pub async fn entries<L: Level>(&self, ctx: &mut Ctx<L>) -> Vec<Entry>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        self.look(ctx, <[Entry]>::to_vec).await
    }

    /// What `look` finds in [`Self::entries`]. Quick: nothing else happens to the journal meanwhile.
    pub async fn look<L: Level, T>(&self, ctx: &mut Ctx<L>, look: impl FnOnce(&[Entry]) -> T) -> T
    where
        vm_locks::Journal: LockAfter<L>,
    {
        look(ctx.lock(&self.journal).await.entries())
    }

    /// Takes an applied effect over from another scope, which is to [`Self::forget`] it afterwards: at every moment a journal has
    /// it, and for one moment both do.
    ///
    /// # Errors
    /// The journal; nothing was taken over.
    pub async fn receive<L: Level>(
        &self,
        ctx: &mut Ctx<L>,
        effect: &Effect,
        phase: Phase,
    ) -> Result<(), EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        let mut journal = ctx.lock(&self.journal).await;
        // Folded first, as all that has happened is: what could not be written is void.
        let recorded = journal.record(effect, phase, Step::Intent, Handle::None);
        recorded
            .and_then(|()| journal.record(effect, phase, Step::Applied, Handle::None))
            .map_err(|source| EngineError::Journal { path: self.path.clone(), source })
    }

    /// Strikes out an effect that is another scope's.
    pub async fn forget<L: Level>(&self, ctx: &mut Ctx<L>, effect: &Effect)
    where
        vm_locks::Journal: LockAfter<L>,
    {
        let table = ctx.table();
        let mut journal = ctx.lock(&self.journal).await;
        note(&mut journal, effect, Phase::Host, Step::Undone);
        self.rest(table, &mut journal);
    }

    async fn undo_all<L: Level>(
        &self,
        ctx: &mut Ctx<L>,
        wanted: impl Fn(&Entry) -> bool,
    ) -> Result<(), EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        let table = ctx.table();
        let mut journal = ctx.lock(&self.journal).await;
        let open: Vec<_> = journal.entries().iter().filter(|entry| wanted(entry)).rev().cloned().collect();
        let mut first_error = None;
        for entry in open {
            let id = entry.effect.id();
            if entry.boot_id != journal.boot_id() && !entry.effect.outlives_reboot() {
                // Gone with its boot. What has its name now, or its pid, is somebody else's.
                note(&mut journal, &entry.effect, entry.phase, Step::Undone);
                continue;
            }
            if entry.by.as_ref().is_some_and(|by| by.keep) {
                note(&mut journal, &entry.effect, entry.phase, Step::Undone);
                continue;
            }
            let started = std::time::Instant::now();
            match undo(&self.host, &mut journal, &entry.effect, entry.phase, &entry.handle).await {
                Ok(()) => tracing::debug!(effect = %id, took = ?started.elapsed(), "undone"),
                Err(error) => {
                    tracing::warn!(effect = %id, error = %error.chain(), "could not be undone");
                    let failure = EngineError::Undo { id, source: Box::new(error) };
                    first_error.get_or_insert(failure);
                }
            }
        }
        self.rest(table, &mut journal);
        first_error.map_or(Ok(()), Err)
    }

    /// Removes the journal of a scope in which nothing is open.
    ///
    /// # Errors
    /// Something still being open, or removal failing.
    pub async fn close<L: Level>(&self, ctx: &mut Ctx<L>) -> Result<(), EngineError>
    where
        vm_locks::Journal: LockAfter<L>,
    {
        let removed = ctx.lock(&self.journal).await.remove();
        removed.map_err(|source| EngineError::Journal { path: self.path.clone(), source })
    }
}

/// Whether two effects of one id are one, as far as a journal can tell: contents are not in it.
fn same(journaled: &Effect, wanted: &Effect) -> bool {
    match wanted {
        Effect::File { .. } | Effect::AppendedFile { .. } => false,
        _ => journaled == wanted,
    }
}

/// Applies one effect unless it is applied already, and journals that.
async fn apply(
    host: &Host,
    path: &Path,
    journal: &mut Journal,
    effect: &Effect,
    phase: Phase,
    by: Option<&By>,
) -> Result<Handle, EngineError> {
    let failed = |source| EngineError::Journal { path: path.into(), source };
    if let Some(entry) = journal.applied(&effect.id()).filter(|entry| same(&entry.effect, effect)) {
        let handle = entry.handle.clone();
        // The journal says so; somebody else may have taken it away or changed it since.
        if let Observed::Present(_) = host.observe(effect).await? {
            return Ok(handle);
        }
    }
    let started = std::time::Instant::now();
    // What was whole before and holds data is not taken away because it could not be changed.
    let was_whole = journal
        .open_entry(&effect.id())
        .is_some_and(|entry| entry.step == Step::Applied && effect.outlives_reboot());
    // What was there before us is asked once: a second time it would be our own.
    let mut handle = match journal.open_entry(&effect.id()) {
        Some(entry) if entry.boot_id == journal.boot_id() => entry.handle.clone(),
        _ => host.former(effect).await?,
    };
    journal.record_by(effect, phase, Step::Intent, handle.clone(), by).map_err(failed)?;
    let applied = async {
        #[cfg(feature = "failpoints")]
        failpoint::reach(effect, Change::Apply, Side::Before)?;
        match host.apply(effect).await? {
            Handle::None => {}
            new => handle = new,
        }
        #[cfg(feature = "failpoints")]
        failpoint::reach(effect, Change::Apply, Side::After)?;
        Ok(())
    };
    match applied.await {
        Ok(()) => {
            journal.record(effect, phase, Step::Applied, handle.clone()).map_err(failed)?;
            let took = started.elapsed();
            tracing::debug!(effect = %effect.id(), ?took, "applied");
            Ok(handle)
        }
        Err(error) if was_whole => {
            journal.record_by(effect, phase, Step::Applied, handle, by).map_err(failed)?;
            Err(error)
        }
        // It may be there from a run, or a VM, before this one, which no journal tells of any more. If it is not, nothing is: its
        // layer makes it whole or not at all.
        Err(error) if by.is_some_and(|by| by.keep) => {
            note(journal, effect, phase, Step::Undone);
            Err(error)
        }
        Err(error) => {
            if let Err(undo) = undo(host, journal, effect, phase, &handle).await {
                tracing::warn!(effect = %effect.id(), error = %undo.chain(), "half done, and left so");
            }
            Err(error)
        }
    }
}

/// Undoes one effect and journals that.
async fn undo(
    host: &Host,
    journal: &mut Journal,
    effect: &Effect,
    phase: Phase,
    handle: &Handle,
) -> Result<(), EngineError> {
    note(journal, effect, phase, Step::Undoing);
    #[cfg(feature = "failpoints")]
    failpoint::reach(effect, Change::Undo, Side::Before)?;
    host.undo(effect, handle).await?;
    #[cfg(feature = "failpoints")]
    failpoint::reach(effect, Change::Undo, Side::After)?;
    note(journal, effect, phase, Step::Undone);
    Ok(())
}

/// Records a step of undoing. That it could not be written (a full disk, most likely) must not keep anything from being
/// undone: the intent is on record, and undoing once more is no harm.
fn note(journal: &mut Journal, effect: &Effect, phase: Phase, step: Step) {
    if let Err(error) = journal.record(effect, phase, step, Handle::None) {
        tracing::warn!(effect = %effect.id(), %error, "a step of undoing could not be recorded");
    }
}

#[cfg(test)]
mod tests;
