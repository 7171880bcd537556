//! Does what the plan says, in its order, and tells of it.

use std::{
    collections::{BTreeMap, HashMap, hash_map},
    sync::Arc,
    time::Duration,
};

use vm_locks::{Ctx, Unlocked};
use vm_types::{
    Effect, EventKind, Handle, Layer, Observed, ProcessRef, VmId,
    vm::{FailedAt, VmRecord, VmmKind},
};
use vm_vmm::Vmm;

use super::{
    plan::{Action, Found, HostFacts, Plan, Processes, Verdict, VmFacts, Wish},
    report::Recovery,
};
use crate::{
    Engine, EngineError,
    effects::{Scope, cgroups},
    journal::{Entry, Phase},
    vm::{
        cell::{Cell, Live},
        ended, start,
    },
};

/// How long a shim whose VMM has ended may take to write that down.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A VM on its way back, or what is left of one.
enum Subject {
    Vm(Arc<Cell>),
    /// A journal without a record.
    Remains(Scope),
}

impl Subject {
    fn scope(&self) -> &Scope {
        match self {
            Self::Vm(cell) => &cell.scope,
            Self::Remains(scope) => scope,
        }
    }

    fn name(&self, id: &VmId) -> String {
        match self {
            Self::Vm(cell) => format!("VM {}", cell.name()),
            Self::Remains(_) => format!("the former VM {id}"),
        }
    }
}

impl Engine {
    /// Brings host and records together. A VM that cannot be recovered is shown as failed and stops no other.
    ///
    /// # Errors
    /// The store, and a journal that can be neither read nor put aside.
    pub(crate) async fn recover(&self, ctx: &mut Ctx<Unlocked>) -> Result<Recovery, EngineError> {
        self.tidy_journals();
        let mut subjects = HashMap::new();
        for record in self.inner.store.vms().list().await? {
            let cell = self.new_cell(record)?;
            self.publish(&cell);
            subjects.insert(cell.id().clone(), Subject::Vm(cell));
        }
        for id in self.journaled() {
            if let hash_map::Entry::Vacant(place) = subjects.entry(id) {
                let id = place.key();
                let scope = Scope::vm(&self.inner.host, &self.inner.layout, id, None, &self.inner.boot_id)?;
                place.insert(Subject::Remains(scope));
            }
        }
        let mut facts = Vec::with_capacity(subjects.len());
        for (id, subject) in &subjects {
            facts.push(self.facts(ctx, id, subject).await);
        }
        let host = HostFacts { journal: self.inner.host_scope.entries(ctx).await, found: self.look().await };
        let plan = Plan::new(&self.inner.layout, &self.inner.boot_id, &facts, &host);

        let mut work =
            Work { engine: self, subjects: &subjects, failed: HashMap::new(), report: Recovery::new() };
        for action in &plan.actions {
            work.act(ctx, &plan.verdicts, action).await;
        }
        let mut report = work.report;
        let journaled = facts.iter().flat_map(|facts| &facts.journal).chain(&host.journal);
        let taps = journaled.map(|entry| &entry.effect).chain(&host.found.network);
        let names = taps.filter_map(|effect| match effect {
            Effect::Tap { name, .. } => Some(name.clone()),
            _ => None,
        });
        self.recover_taps(ctx, names).await;
        if self.all().iter().any(|cell| cell.live().is_some() && cell.with_record(|it| it.address.is_some()))
            && let Err(error) = self.ensure_network(ctx).await
        {
            // Whoever is up goes on with what there is; the next start tells its caller.
            tracing::warn!(error = %error.chain(), "the network of VMs that are up is not as it should be");
        }
        for cell in self.all() {
            self.watch_owner(&cell);
            if cell.awaits_restart() {
                let reason =
                    cell.with_record(|record| record.failure.as_ref().map(|(_, cause)| cause.clone()));
                let reason = reason.unwrap_or_else(|| "its policy says so".to_owned());
                report.to_restart.push((cell.name().to_string(), reason));
                self.restart_later(&cell);
            }
        }
        self.sweep().await?;
        if !report.nothing_to_do() {
            tracing::info!(summary = %report.summary(), "recovered");
            self.inner.events.record(EventKind::Recovered, None, None, report.summary());
        }
        Ok(report)
    }

    async fn facts(&self, ctx: &mut Ctx<Unlocked>, id: &VmId, subject: &Subject) -> VmFacts {
        let journal = subject.scope().entries(ctx).await;
        let record = match subject {
            Subject::Vm(cell) => Some(
                cell.with_record(|record| Wish { complete: record.complete, running: record.wanted_running }),
            ),
            Subject::Remains(_) => None,
        };
        let processes = match processes(&journal, &self.inner.boot_id) {
            Some((shim, vmm)) if self.inner.host.shims.verify(&self.inner.layout.vm(id), shim, vmm) => {
                Processes::Live
            }
            _ => Processes::Gone,
        };
        VmFacts { id: id.clone(), record, journal, processes }
    }

    /// What on the host carries our names. What cannot be looked at is left alone, and looked at by the next daemon.
    async fn look(&self) -> Found {
        let network = self.inner.host.net.found(&self.inner.instance).await.unwrap_or_else(|error| {
            tracing::warn!(error = %EngineError::from(error).chain(), "the network's leftovers cannot be looked for");
            Vec::new()
        });
        let layout = &self.inner.layout;
        let devices = self.inner.host.cow.found(&self.inner.instance).await.unwrap_or_else(|error| {
            tracing::warn!(error = %EngineError::from(error).chain(), "leftovers of disks cannot be looked for");
            Vec::new()
        });
        let disks = devices.into_iter().map(|id| {
            let disk = self.device_of(&id);
            (id, disk)
        });
        Found {
            network,
            disks: disks.collect(),
            cgroups: cgroups::empty(&self.inner.instance),
            shims: self.inner.host.shims.running(),
            run_directories: vms_in(&layout.run.join("vms"), ""),
            state_directories: vms_in(&layout.state.join("vms"), ""),
        }
    }

    /// Removes what a daemon that was killed while it replaced a file has left beside it.
    fn tidy_journals(&self) {
        let Ok(entries) = std::fs::read_dir(self.inner.layout.journals()) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let half = path.extension().is_some_and(|end| end.as_encoded_bytes().starts_with(b"tmp"));
            if half && let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "could not be removed");
            }
        }
    }

    /// VMs that have a journal.
    fn journaled(&self) -> Vec<VmId> {
        vms_in(&self.inner.layout.journals(), ".jsonl")
    }

    /// Leftovers of ours on the host that nobody's journal has, for `vm doctor`.
    pub async fn leftovers(&self, ctx: &mut Ctx<Unlocked>) -> Vec<Effect> {
        // In this order: what is made meanwhile is journaled before it can be found.
        let found = self.look().await;
        let mut facts = Vec::new();
        for cell in self.all() {
            facts.push(self.facts(ctx, cell.id(), &Subject::Vm(cell.clone())).await);
        }
        let host = HostFacts { journal: self.inner.host_scope.entries(ctx).await, found };
        let plan = Plan::new(&self.inner.layout, &self.inner.boot_id, &facts, &host);
        let mut left = Vec::new();
        for action in plan.actions {
            // What was just being undone is gone by now.
            if let Action::Reclaim(effect) = action
                && !matches!(self.inner.host.observe(&effect).await, Ok(Observed::Absent))
            {
                left.push(effect);
            }
        }
        left
    }
}

/// The work on a plan.
struct Work<'a> {
    engine: &'a Engine,
    subjects: &'a HashMap<VmId, Subject>,
    failed: HashMap<VmId, EngineError>,
    report: Recovery,
}

impl Work<'_> {
    async fn act(&mut self, ctx: &mut Ctx<Unlocked>, verdicts: &BTreeMap<VmId, Verdict>, action: &Action) {
        let engine = self.engine;
        match action {
            Action::Adopt(id) => {
                let (Some(Subject::Vm(cell)), Some(verdict)) = (self.subjects.get(id), verdicts.get(id))
                else {
                    return;
                };
                let Some((shim, vmm)) = verdict.live() else { return };
                engine.adopt(ctx, cell, shim, vmm).await;
                self.report.adopted += 1;
                let mut line = format!("VM {} is up: adopted", cell.name());
                if matches!(verdict, Verdict::GoOnStopping { .. }) {
                    line.push_str(", and stopped as somebody wanted");
                    if let Err(error) = engine.stop(cell.clone(), None) {
                        tracing::warn!(vm = %cell.name(), error = %error.chain(), "not stopped");
                    }
                }
                self.report.lines.push(line);
            }
            Action::Undo(id, layer) => {
                let (Some(subject), Some(verdict)) = (self.subjects.get(id), verdicts.get(id)) else {
                    return;
                };
                // A disk or a tap is not taken away from a VMM that could not be ended.
                if self.failed.contains_key(id) {
                    return;
                }
                if let (Layer::Vmm, &Verdict::Ended { shim, vmm }) = (layer, verdict) {
                    let _ = tokio::time::timeout(LAST_WORDS, start::ended(vmm, shim)).await;
                }
                if let Err(error) = subject.scope().unwind_layer(ctx, verdict.undone(), *layer).await {
                    self.failed.insert(id.clone(), error);
                }
            }
            Action::Forget(effect) => engine.inner.host_scope.forget(ctx, effect).await,
            Action::UndoHost => {
                if let Err(error) = engine.release_network(ctx).await {
                    self.fail(format!("the former network could not be taken down: {}", error.chain()));
                }
            }
            Action::Reclaim(effect) => match engine.inner.host_scope.reclaim(ctx, effect).await {
                Ok(()) => {
                    self.report.reclaimed += 1;
                    self.report.lines.push(format!("{} belonged to nobody: reclaimed", effect.id()));
                }
                Err(error) => self.fail(format!("{} could not be reclaimed: {}", effect.id(), error.chain())),
            },
            Action::Settle(id) => {
                let (Some(subject), Some(verdict)) = (self.subjects.get(id), verdicts.get(id)) else {
                    return;
                };
                let name = subject.name(id);
                let done = match self.failed.remove(id) {
                    Some(error) => Err(error),
                    None => engine.settle(ctx, subject, *verdict).await,
                };
                match done {
                    Ok(None) => {}
                    Ok(Some(line)) => {
                        match verdict {
                            Verdict::Remove | Verdict::Discard => self.report.removed += 1,
                            _ => self.report.undone += 1,
                        }
                        self.report.lines.push(format!("{name} {line}"));
                    }
                    Err(error) => {
                        if let Subject::Vm(cell) = subject {
                            let at =
                                if *verdict == Verdict::Remove { FailedAt::Delete } else { FailedAt::Stop };
                            engine.note_failure(ctx, cell, at, &error).await;
                        }
                        self.fail(format!("{name} could not be recovered: {}", error.chain()));
                    }
                }
            }
        }
    }

    fn fail(&mut self, line: String) {
        tracing::warn!("{line}");
        self.report.failed += 1;
        self.report.lines.push(line);
    }
}

impl Engine {
    async fn adopt(&self, ctx: &mut Ctx<Unlocked>, cell: &Arc<Cell>, shim: ProcessRef, vmm: ProcessRef) {
        let record: VmRecord = cell.record();
        let paths = cell.paths();
        let since = vm_shim::status(&paths).await.map_or(record.created_at, |status| status.started_at);
        let (kind, machine) =
            vm_shim::spec(&paths).ok().flatten().map_or((None, None), |spec| (spec.vmm, spec.machine));
        // A shim that an older daemon started says nothing of it; those knew QEMU alone, and the fake.
        let former = || match self.inner.vmm.get(VmmKind::Qemu) {
            Ok(_) => VmmKind::Qemu,
            Err(_) => self.preferred_vmm(),
        };
        let driver = kind.or(record.spec.vmm).unwrap_or_else(former);
        let spec = &record.spec;
        let (cpus, memory_mib, disk_limits) =
            machine.map_or((spec.cpus, spec.memory_mib, spec.disk_limits), |machine| {
                let root = machine.drives.first();
                (machine.cpus, machine.memory_mib, root.map(|drive| drive.limits).unwrap_or_default())
            });
        let live = Live { shim, vmm, driver, since, cpus, memory_mib, disk_limits };
        // The configured group may be another than that of the daemon that started it.
        if let Err(error) = vm_shim::share(&paths, self.inner.settings.socket_group) {
            tracing::warn!(vm = %cell.name(), %error, "its sockets could not be opened to the configured group alone");
        }
        for entry in cell.scope.entries(ctx).await {
            match &entry.effect {
                Effect::NameRecord { .. } => self.inner.host.names.add(&entry.effect),
                // Looked at, it is held again.
                Effect::Port { .. } => drop(self.inner.host.observe(&entry.effect).await),
                // Held back, if the former daemon died while it grew.
                Effect::DmSnapshot { .. } => {
                    if let Err(error) = self.inner.host.cow.apply(&entry.effect).await {
                        tracing::error!(vm = %cell.name(), error = %EngineError::from(error).chain(), "its disk");
                    }
                }
                _ => {}
            }
        }
        let paused = match self.inner.vmm.get(driver).ok().and_then(Vmm::pause) {
            Some(pause) => pause.is_paused(&paths).await.unwrap_or(false),
            None => false,
        };
        cell.lock(ctx).await.set_on(live, paused);
        self.watch_vmm(cell, live);
    }

    /// Writes down what has become of a VM whose effects are undone; says it where it is more than nothing.
    async fn settle(
        &self,
        ctx: &mut Ctx<Unlocked>,
        subject: &Subject,
        verdict: Verdict,
    ) -> Result<Option<String>, EngineError> {
        let cell = match subject {
            Subject::Vm(cell) => cell,
            Subject::Remains(scope) => {
                scope.close(ctx).await?;
                return Ok(Some("had a journal and no record: removed".to_owned()));
            }
        };
        let policy = cell.with_record(|record| record.spec.restart);
        let line = match verdict {
            Verdict::Adopt { .. } | Verdict::GoOnStopping { .. } | Verdict::Discard => return Ok(None),
            Verdict::Rest => None,
            Verdict::Remove => {
                self.remove_all(ctx, cell).await?;
                return Ok(Some("was half made or half deleted: removed".to_owned()));
            }
            Verdict::Ended { .. } => {
                let end = ended::judge_end(cell);
                let again = end.wants_restart(policy);
                self.finish(ctx, cell, end.failure(), again).await?;
                Some("has ended while the daemon was away: cleaned up".to_owned())
            }
            Verdict::HostRebooted => {
                let end = ended::End::Failed("the host was booted anew".to_owned());
                let again = end.wants_restart(policy);
                self.finish(ctx, cell, end.failure(), again).await?;
                Some("is off: the host was booted anew".to_owned())
            }
            Verdict::Due => Some("is off and due to be started".to_owned()),
            // In these two what is wanted was written down before anything was done. Wanted before it was up, it was started by its
            // policy or again; wanted after it was up, it was not stopped by anybody.
            Verdict::HalfStarted => {
                let failure = Some((FailedAt::Start, "the daemon ended while it booted".to_owned()));
                let again = cell.with_record(|record| record.wanted_running);
                self.finish(ctx, cell, failure, again).await?;
                Some("was half started: undone".to_owned())
            }
            Verdict::HalfStopped => {
                let (failure, again) =
                    cell.with_record(|record| (record.failure.clone(), record.wanted_running));
                self.finish(ctx, cell, failure, again).await?;
                Some("was half stopped: finished".to_owned())
            }
        };
        if cell.paths().exit_record().exists() {
            cell.lock(ctx).await.set_off(Some(start::exit_status(&cell.paths())));
        }
        Ok(line)
    }
}

/// The processes of a shim that was applied in this boot.
fn processes(journal: &[Entry], boot_id: &str) -> Option<(ProcessRef, ProcessRef)> {
    journal.iter().filter(|entry| entry.phase == Phase::Start && entry.boot_id == boot_id).find_map(|entry| {
        match entry.handle {
            Handle::Processes { shim, vmm, .. } => Some((shim, vmm)),
            _ => None,
        }
    })
}

/// VMs by the entries of a directory whose names are a VM's id and `suffix`.
fn vms_in(directory: &std::path::Path, suffix: &str) -> Vec<VmId> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(suffix)?.parse().ok())
        .collect()
}
