//! From what is known and what is there to what is to be done. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
};

use strum::VariantArray;
use vm_types::{Effect, EffectId, Handle, Layer, Layout, ProcessRef, VmId};

use crate::journal::{Entry, Phase, Step};

/// What is known of one VM.
#[derive(Debug, Clone)]
pub struct VmFacts {
    /// Which.
    pub id: VmId,
    /// What the store has of it.
    pub record: Option<Wish>,
    /// Its journal's fold.
    pub journal: Vec<Entry>,
    /// What the host shows of the processes that the journal names.
    pub processes: Processes,
}

/// What a record asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// It was made, and nobody has begun to delete it.
    pub complete: bool,
    /// It is to be up.
    pub running: bool,
}

/// What the host shows of the shim and VMM of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processes {
    /// Both run and are this VM's.
    Live,
    /// One of them does not, or its pid is another process's now.
    Gone,
}

/// What is known of the daemon's own effects, and found on the host.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    /// The host journal's fold.
    pub journal: Vec<Entry>,
    /// What there is.
    pub found: Found,
}

/// What on the host carries our names, whoever made it.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// Devices and tables.
    pub network: Vec<Effect>,
    /// Disks of VMs that are put together, whole or in part.
    pub disks: Vec<(VmId, Effect)>,
    /// Control groups of VMMs in which nothing is.
    pub cgroups: Vec<Effect>,
    /// Run directories of shims that run.
    pub shims: Vec<PathBuf>,
    /// VMs that have a run directory.
    pub run_directories: Vec<VmId>,
    /// VMs that have a state directory.
    pub state_directories: Vec<VmId>,
}

/// What becomes of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is off, as it should be.
    Rest,
    /// It is up, as it should be.
    Adopt {
        /// Its shim.
        shim: ProcessRef,
        /// Its VMM.
        vmm: ProcessRef,
    },
    /// It is up, and somebody had begun to stop it.
    GoOnStopping {
        /// Its shim.
        shim: ProcessRef,
        /// Its VMM.
        vmm: ProcessRef,
    },
    /// It was up and its VMM has ended since.
    Ended {
        /// Its shim, which may still be writing down how.
        shim: ProcessRef,
        /// Its VMM.
        vmm: ProcessRef,
    },
    /// It was up when the host was booted anew.
    HostRebooted,
    /// It is to be up and is off: the daemon ended before it was started again.
    Due,
    /// The daemon ended while it was started: its guest has not answered.
    HalfStarted,
    /// The daemon ended while it was stopped, or cleaned up after.
    HalfStopped,
    /// The daemon ended while it was made or deleted.
    Remove,
    /// It has a journal and no record.
    Discard,
}

impl Verdict {
    /// Phases whose effects are undone.
    pub fn undone(&self) -> &'static [Phase] {
        match self {
            Self::Rest | Self::Adopt { .. } | Self::GoOnStopping { .. } => &[],
            Self::Ended { .. } | Self::HostRebooted | Self::Due | Self::HalfStarted | Self::HalfStopped => {
                &[Phase::Start]
            }
            Self::Remove | Self::Discard => &[Phase::Start, Phase::Create],
        }
    }

    /// Its processes, if they run and it is taken over with them.
    pub fn live(&self) -> Option<(ProcessRef, ProcessRef)> {
        match *self {
            Self::Adopt { shim, vmm } | Self::GoOnStopping { shim, vmm } => Some((shim, vmm)),
            _ => None,
        }
    }

    /// Whether the VM is there when all is done.
    fn stays(&self) -> bool {
        !matches!(self, Self::Remove | Self::Discard)
    }
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Take a running VM over.
    Adopt(VmId),
    /// Undo what of a VM is in this layer.
    Undo(VmId, Layer),
    /// Strike out of the host's journal what is a VM's.
    Forget(Effect),
    /// Take the daemon's network down.
    UndoHost,
    /// Undo what no journal tells of.
    Reclaim(Effect),
    /// Write down what has become of a VM.
    Settle(VmId),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What becomes of each VM.
    pub verdicts: BTreeMap<VmId, Verdict>,
    /// In this order.
    pub actions: Vec<Action>,
}

impl Plan {
    /// Decides.
    pub fn new(layout: &Layout, boot_id: &str, vms: &[VmFacts], host: &HostFacts) -> Self {
        let verdicts: BTreeMap<VmId, Verdict> =
            vms.iter().map(|facts| (facts.id.clone(), verdict(facts, boot_id))).collect();
        let anybody_up = verdicts.values().any(|verdict| verdict.live().is_some());
        let stale = |entry: &Entry| entry.step != Step::Applied || entry.boot_id != boot_id;
        let undo_host = !anybody_up && host.journal.iter().any(stale);

        // An effect that two journals have was on its way from one to the other. The VM's is the one that counts.
        let of_vms: BTreeSet<EffectId> = ids(vms.iter().flat_map(|facts| &facts.journal));
        let shared: Vec<&Entry> =
            host.journal.iter().filter(|entry| of_vms.contains(&entry.effect.id())).collect();
        let mut orphans = orphans(layout, vms, host, &verdicts, anybody_up);
        // A tap of the pool that is half made or half deleted goes, also under VMs that are up: no start makes it whole, as it does
        // bridge and rules.
        let half_done = |entry: &&Entry| {
            matches!(entry.effect, Effect::Tap { .. }) && stale(entry) && !of_vms.contains(&entry.effect.id())
        };
        orphans.extend(host.journal.iter().filter(half_done).map(|entry| entry.effect.clone()));

        let mut actions: Vec<Action> =
            shared.into_iter().map(|entry| Action::Forget(entry.effect.clone())).collect();
        for &layer in Layer::VARIANTS {
            if layer == Layer::Vmm {
                let live = verdicts.iter().filter(|(_, verdict)| verdict.live().is_some());
                actions.extend(live.map(|(id, _)| Action::Adopt(id.clone())));
            }
            for facts in vms {
                let phases = verdicts[&facts.id].undone();
                let open = |entry: &Entry| phases.contains(&entry.phase) && entry.effect.layer() == layer;
                if facts.journal.iter().any(open) {
                    actions.push(Action::Undo(facts.id.clone(), layer));
                }
            }
            actions.extend(
                orphans.iter().filter(|effect| effect.layer() == layer).cloned().map(Action::Reclaim),
            );
            if layer == Layer::Network && undo_host {
                actions.push(Action::UndoHost);
            }
        }
        let settled = verdicts.iter().filter(|(_, verdict)| verdict.live().is_none());
        actions.extend(settled.map(|(id, _)| Action::Settle(id.clone())));
        Self { verdicts, actions }
    }
}

fn verdict(facts: &VmFacts, boot_id: &str) -> Verdict {
    let Some(wish) = facts.record else { return Verdict::Discard };
    if !wish.complete {
        return Verdict::Remove;
    }
    let mut started = facts.journal.iter().filter(|entry| entry.phase == Phase::Start);
    let undoing = started.clone().any(|entry| entry.step == Step::Undoing);
    let Some(entry) = started.clone().find(|entry| matches!(entry.effect, Effect::Shim { .. })) else {
        return match (undoing, wish.running) {
            (true, _) => Verdict::HalfStopped,
            (false, true) => Verdict::Due,
            (false, false) if started.next().is_some() => Verdict::HalfStarted,
            (false, false) => Verdict::Rest,
        };
    };
    match (entry.step, &entry.handle) {
        (Step::Undoing, _) => Verdict::HalfStopped,
        (Step::Applied, &Handle::Processes { shim, vmm, answered: true }) => {
            let here = entry.boot_id == boot_id;
            match (wish.running, facts.processes) {
                (true, _) if !here => Verdict::HostRebooted,
                (true, Processes::Live) => Verdict::Adopt { shim, vmm },
                (true, Processes::Gone) => Verdict::Ended { shim, vmm },
                (false, Processes::Live) if here => Verdict::GoOnStopping { shim, vmm },
                (false, _) => Verdict::HalfStopped,
            }
        }
        // A start that was under way when the host went down, too.
        _ => Verdict::HalfStarted,
    }
}

fn ids<'a>(entries: impl Iterator<Item = &'a Entry>) -> BTreeSet<EffectId> {
    entries.map(|entry| entry.effect.id()).collect()
}

/// What carries our names and is in nobody's journal.
fn orphans(
    layout: &Layout,
    vms: &[VmFacts],
    host: &HostFacts,
    verdicts: &BTreeMap<VmId, Verdict>,
    anybody_up: bool,
) -> Vec<Effect> {
    let journaled = ids(vms.iter().flat_map(|facts| &facts.journal).chain(&host.journal));
    let mut orphans = Vec::new();
    for run_dir in &host.found.shims {
        let ours = run_dir.parent() == Some(&layout.run.join("vms"));
        let shim = Effect::Shim { run_dir: run_dir.clone(), spec: run_dir.join("shim.json") };
        if ours && !journaled.contains(&shim.id()) {
            orphans.push(shim);
        }
    }
    orphans.extend(host.found.cgroups.iter().filter(|group| !journaled.contains(&group.id())).cloned());
    // Taps first: a bridge goes after its ports. Under a VM that is up nothing is taken away but taps that nobody has.
    let (taps, rest): (Vec<_>, Vec<_>) =
        host.found.network.iter().partition(|effect| matches!(effect, Effect::Tap { .. }));
    let loose = rest.into_iter().filter(|_| !anybody_up);
    orphans.extend(taps.into_iter().chain(loose).filter(|effect| !journaled.contains(&effect.id())).cloned());

    let up: HashMap<&VmId, bool> =
        verdicts.iter().map(|(id, verdict)| (id, verdict.live().is_some())).collect();
    for (id, disk) in &host.found.disks {
        if up.get(id) != Some(&true) && !journaled.contains(&disk.id()) {
            orphans.push(disk.clone());
        }
    }
    for id in &host.found.run_directories {
        let directory = Effect::Directory { path: layout.vm(id).run, mode: 0o711 };
        if up.get(id) != Some(&true) && !journaled.contains(&directory.id()) {
            orphans.push(directory);
        }
    }
    for id in &host.found.state_directories {
        let directory = Effect::Directory { path: layout.vm(id).state, mode: 0o700 };
        if !verdicts.get(id).is_some_and(Verdict::stays) && !journaled.contains(&directory.id()) {
            orphans.push(directory);
        }
    }
    orphans
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
