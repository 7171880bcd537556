//! What is known of one VM now, and who works on it.
//!
//! Everybody may look; only who holds the VM's lock may change what is seen ([`Writer`]). Long work holds no lock: it
//! reserves the VM ([`Reserved`]), and whoever comes next finds it taken.

use std::{
    any::Any,
    ops::{Deref, DerefMut},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use vm_locks::{Ctx, Held, Lock, LockAfter, Unlocked, Vm, Workspace};
use vm_types::{
    Layout, OperationId, ProcessRef, VmId, VmName, VmPaths,
    vm::{DiskLimits, ExitStatus, VmRecord, VmState, VmmKind},
};

use super::state::{Request, Verdict};
use crate::{Engine, EngineError, effects::Scope};

/// What is told of a VM whose VMM has halted it, as its disk had no room on the host.
pub(crate) const OUT_OF_ROOM: &str = "its disk has no room on the host, and it is halted: free some space there, e.g. with `vm prune` or \
                                      `vm image rm`, and it goes on by itself";

/// What an operation is doing to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// Making it.
    Creating,
    /// Starting it.
    Starting,
    /// Stopping it.
    Stopping,
    /// Deleting it.
    Deleting,
    /// Something that leaves it up or off, as it was.
    Changing,
}

/// A VMM that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Live {
    /// Its shim.
    pub shim: ProcessRef,
    /// The VMM.
    pub vmm: ProcessRef,
    /// Whose driver controls it.
    pub driver: VmmKind,
    /// Start, seconds since the Unix epoch.
    pub since: u64,
    /// Virtual CPUs it was started with.
    pub cpus: u32,
    /// Memory it was started with, MiB.
    pub memory_mib: u64,
    /// How fast it was started to use its root disk at most.
    pub disk_limits: DiskLimits,
}

/// Whether a VMM runs.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Power {
    Off {
        last_exit: Option<ExitStatus>,
    },
    On {
        live: Live,
        paused: bool,
        /// It was paused by its VMM, as its disk had no room on the host.
        out_of_room: bool,
    },
}

#[derive(Debug)]
struct Shared {
    record: VmRecord,
    power: Power,
    activity: Option<(Activity, OperationId)>,
    deleted: bool,
    changes: u64,
}

impl Shared {
    /// From the work on it, else from the VMM process, else from how that ended.
    fn state(&self) -> VmState {
        match (self.activity, &self.power) {
            (Some((Activity::Creating, operation)), _) => VmState::Creating { operation },
            (Some((Activity::Starting, operation)), _) => VmState::Starting { operation },
            (Some((Activity::Stopping, operation)), _) => VmState::Stopping { operation },
            (Some((Activity::Deleting, operation)), _) => VmState::Deleting { operation },
            (Some((Activity::Changing, _)) | None, Power::On { live, paused: false, .. }) => {
                VmState::Running { pid: live.vmm.pid, since: live.since }
            }
            (Some((Activity::Changing, _)) | None, Power::On { live, paused: true, .. }) => {
                VmState::Paused { pid: live.vmm.pid, since: live.since }
            }
            (Some((Activity::Changing, _)) | None, Power::Off { last_exit }) => match &self.record.failure {
                Some((at, cause)) => VmState::Failed { at: *at, cause: cause.clone() },
                None if !self.record.complete => VmState::Defined,
                None => VmState::Stopped { last_exit: last_exit.clone() },
            },
        }
    }

    /// Whether this VMM runs it and is not on its way down.
    fn runs(&self, vmm: ProcessRef) -> bool {
        let stays = matches!(self.activity, None | Some((Activity::Changing, _)));
        stays && matches!(&self.power, Power::On { live, .. } if live.vmm == vmm)
    }

    fn out_of_room(&self) -> bool {
        matches!(self.power, Power::On { out_of_room: true, .. })
    }

    fn needs_restart(&self) -> Vec<String> {
        let Power::On { live, .. } = &self.power else { return Vec::new() };
        let spec = &self.record.spec;
        let (had, has) = (live.disk_limits, spec.disk_limits);
        let changed = [
            ("cpus", live.cpus != spec.cpus),
            ("memory", live.memory_mib != spec.memory_mib),
            ("disk-bandwidth", had.bytes_per_second != has.bytes_per_second),
            ("disk-iops", had.operations_per_second != has.operations_per_second),
        ];
        changed.iter().filter(|(_, differs)| *differs).map(|(name, _)| (*name).to_owned()).collect()
    }
}

/// What is known of a VM.
#[derive(Debug)]
struct Known {
    shared: Mutex<Shared>,
    changed: Notify,
}

impl Known {
    fn look<T>(&self, look: impl FnOnce(&Shared) -> T) -> T {
        look(&self.guard())
    }

    fn change(&self) -> Change<'_> {
        Change { shared: self.guard(), changed: &self.changed }
    }

    fn guard(&self) -> MutexGuard<'_, Shared> {
        // Changes are a few assignments each; a panic cannot leave one half done in a way that matters.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The only way to what may be written: whatever is done with it counts as a change, and those who wait for one look again.
struct Change<'a> {
    shared: MutexGuard<'a, Shared>,
    changed: &'a Notify,
}

impl Deref for Change<'_> {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl DerefMut for Change<'_> {
    fn deref_mut(&mut self) -> &mut Shared {
        self.shared.changes += 1;
        &mut self.shared
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.changed.notify_waiters();
    }
}

/// All that is shown of a VM, as of one moment.
#[derive(Debug, Clone)]
pub struct View {
    /// See [`Cell::changes`].
    pub changes: u64,
    /// What it should be.
    pub record: VmRecord,
    /// What it is.
    pub state: VmState,
    /// Names of settings that differ between the VM that runs and what it should be.
    pub needs_restart: Vec<String>,
    /// Why its guest does not go on although nobody paused it, and what to do.
    pub problem: Option<&'static str>,
    /// What runs it now, if anything does.
    pub driver: Option<VmmKind>,
    /// It is off and nobody works on it: its files stay as they are until the next change.
    pub at_rest: bool,
}

/// One VM.
#[derive(Debug)]
pub struct Cell {
    id: VmId,
    name: VmName,
    layout: Layout,
    pub(crate) scope: Scope,
    lock: Lock<Vm, Writer>,
    workspaces: Lock<Workspace, ()>,
    /// Held for single reads and writes, never across an await.
    shared: Arc<Known>,
    kept: Mutex<Option<Arc<dyn Any + Send + Sync>>>,
    released: Notify,
    gone: CancellationToken,
    restarts: AtomicU32,
    killers: AtomicU32,
    /// What is wanted of it is known here and could not be written down.
    unwritten: AtomicBool,
}

/// The right to change what is known of a VM; guarded by the VM's lock.
#[derive(Debug)]
pub(crate) struct Writer(Arc<Known>);

impl Cell {
    pub(crate) fn new(record: VmRecord, scope: Scope, layout: Layout) -> Self {
        let (id, name) = (record.id.clone(), record.spec.name.clone());
        let power = Power::Off { last_exit: None };
        let shared = Shared { record, power, activity: None, deleted: false, changes: 0 };
        let shared = Arc::new(Known { shared: Mutex::new(shared), changed: Notify::new() });
        Self {
            lock: Lock::new(format!("vm {name}"), Writer(shared.clone())),
            workspaces: Lock::new(format!("workspaces of vm {name}"), ()),
            id,
            name,
            layout,
            scope,
            shared,
            kept: Mutex::default(),
            released: Notify::new(),
            gone: CancellationToken::new(),
            restarts: AtomicU32::new(0),
            killers: AtomicU32::new(0),
            unwritten: AtomicBool::new(false),
        }
    }

    /// Notes whether what is wanted of it could be written down; says whether it could before.
    pub(crate) fn written(&self, now: bool) -> bool {
        !self.unwritten.swap(!now, Ordering::Relaxed)
    }

    /// Its id.
    pub fn id(&self) -> &VmId {
        &self.id
    }

    /// Its name.
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// Its files.
    pub fn paths(&self) -> VmPaths {
        self.layout.vm(&self.id)
    }

    /// What it should be.
    pub fn record(&self) -> VmRecord {
        self.look(|shared| shared.record.clone())
    }

    /// Looks at what it should be without copying it.
    pub(crate) fn with_record<T>(&self, look: impl FnOnce(&VmRecord) -> T) -> T {
        self.look(|shared| look(&shared.record))
    }

    /// What it is.
    pub fn state(&self) -> VmState {
        self.look(Shared::state)
    }

    /// The VMM that runs.
    pub fn live(&self) -> Option<Live> {
        self.look(|shared| match &shared.power {
            Power::On { live, .. } => Some(*live),
            Power::Off { .. } => None,
        })
    }

    /// Whether its CPUs are halted.
    pub(crate) fn paused(&self) -> bool {
        self.look(|shared| matches!(shared.power, Power::On { paused: true, .. }))
    }

    /// Whether its VMM was found to have halted them, as its disk had no room on the host.
    pub(crate) fn out_of_room(&self) -> bool {
        self.look(Shared::out_of_room)
    }

    /// The reference of its image.
    pub(crate) fn image(&self) -> String {
        self.with_record(|record| record.spec.image_reference.clone())
    }

    /// Restarts in a row that did not hold.
    pub(crate) fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// One more of them; how many there were before.
    pub(crate) fn count_restart(&self) -> u32 {
        self.restarts.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn forget_restarts(&self) {
        self.restarts.store(0, Ordering::Relaxed);
    }

    /// From now on, until the result is dropped, its end is somebody's wish and no failure.
    pub(crate) fn expect_end(self: &Arc<Self>) -> Killing {
        self.killers.fetch_add(1, Ordering::Relaxed);
        Killing(self.clone())
    }

    /// Whether somebody is about to clean up after having ended it.
    pub(crate) fn end_expected(&self) -> bool {
        self.killers.load(Ordering::Relaxed) > 0
    }

    /// Whether it is off although it is to be up: its policy will start it again.
    pub(crate) fn awaits_restart(&self) -> bool {
        self.live().is_none() && self.with_record(|record| record.wanted_running && record.complete)
    }

    /// Names of settings that differ between the VM that runs and what it should be.
    pub fn needs_restart(&self) -> Vec<String> {
        self.look(Shared::needs_restart)
    }

    /// A number that is another one after each change of what is known of the VM: what was made of a [`View`] with this number
    /// still holds. Changes of the VM's files are not counted.
    pub fn changes(&self) -> u64 {
        self.look(|shared| shared.changes)
    }

    /// What is known of it.
    pub fn view(&self) -> View {
        self.look(|shared| View {
            changes: shared.changes,
            record: shared.record.clone(),
            state: shared.state(),
            needs_restart: shared.needs_restart(),
            problem: shared.out_of_room().then_some(OUT_OF_ROOM),
            driver: match &shared.power {
                Power::On { live, .. } => Some(live.driver),
                Power::Off { .. } => None,
            },
            at_rest: shared.activity.is_none() && matches!(shared.power, Power::Off { .. }),
        })
    }

    /// What was last given to [`keep`](Self::keep), if it is a `T`.
    pub fn kept<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).clone();
        kept?.downcast().ok()
    }

    /// Keeps something made of the VM for as long as the VM is there, in place of what was kept before.
    pub fn keep<T: Any + Send + Sync>(&self, thing: Arc<T>) {
        // What was there is dropped after the lock is.
        let _before = self.kept.lock().unwrap_or_else(PoisonError::into_inner).replace(thing);
    }

    /// Cancelled when the VM has been deleted.
    pub(crate) fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// The operation that has the VM.
    pub(crate) fn operation(&self) -> Option<OperationId> {
        self.look(|shared| shared.activity.map(|(_, operation)| operation))
    }

    /// Ends when nobody has the VM, or at once. Somebody else may have it again by then.
    pub(crate) async fn free(&self) {
        loop {
            let released = self.released.notified();
            if self.operation().is_none() {
                return;
            }
            released.await;
        }
    }

    /// Ends when a VMM is not what runs it any more, or is on its way down. Cancel-safe.
    pub(crate) async fn down(&self, vmm: ProcessRef) {
        loop {
            let changed = self.shared.changed.notified();
            if !self.look(|shared| shared.runs(vmm)) {
                return;
            }
            changed.await;
        }
    }

    /// Does something quick, such as giving a file its place, while nobody can begin to bring the VM down; `None` and not done
    /// once that has begun.
    pub(crate) fn while_up<T>(&self, vmm: ProcessRef, quick: impl FnOnce() -> T) -> Option<T> {
        self.look(|shared| shared.runs(vmm).then(quick))
    }

    /// The lock of the workspaces in the VM: who brings one there or back has it for as long as that takes. Whoever holds it waits
    /// for nothing beyond [`Self::down`], so nobody who ends a VM has to know of it.
    pub(crate) async fn lock_workspaces<'c>(&self, ctx: &'c mut Ctx<Unlocked>) -> Held<'c, Workspace, ()> {
        ctx.lock(&self.workspaces).await
    }

    /// The VM's lock: for decisions about it and for writing them down.
    pub(crate) async fn lock<'c, L>(&self, ctx: &'c mut Ctx<L>) -> Held<'c, Vm, Writer>
    where
        Vm: LockAfter<L>,
        L: vm_locks::Level,
    {
        ctx.lock(&self.lock).await
    }

    /// Nothing can be reserved any more.
    pub(crate) fn set_gone(&self, writer: &mut Writer) {
        writer.0.change().deleted = true;
        self.gone.cancel();
    }

    fn look<T>(&self, look: impl FnOnce(&Shared) -> T) -> T {
        self.shared.look(look)
    }
}

impl Writer {
    pub(crate) fn set_on(&mut self, live: Live, paused: bool) {
        self.0.change().power = Power::On { live, paused, out_of_room: false };
    }

    pub(crate) fn set_off(&mut self, last_exit: Option<ExitStatus>) {
        self.0.change().power = Power::Off { last_exit };
    }

    pub(crate) fn set_paused(&mut self, now: bool) {
        if let Power::On { paused, out_of_room, .. } = &mut self.0.change().power {
            (*paused, *out_of_room) = (now, false);
        }
    }

    /// Notes whether this VMM has halted it, as its disk had no room on the host.
    pub(crate) fn set_out_of_room(&mut self, vmm: ProcessRef, now: bool) {
        match &mut self.0.change().power {
            Power::On { live, paused, out_of_room } if live.vmm == vmm => {
                (*paused, *out_of_room) = (now, now)
            }
            _ => {}
        }
    }

    pub(crate) fn change_record(&mut self, change: impl FnOnce(&mut VmRecord)) {
        change(&mut self.0.change().record);
    }
}

/// Somebody who ends a VM without asking.
#[derive(Debug)]
pub(crate) struct Killing(Arc<Cell>);

impl Drop for Killing {
    fn drop(&mut self) {
        self.0.killers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a request for a VM led to.
#[derive(Debug)]
pub(crate) enum Admitted {
    /// It is the operation's until this is dropped.
    Reserved(Reserved),
    /// There is nothing to do.
    Already,
}

/// A VM reserved for one operation.
#[derive(Debug)]
pub(crate) struct Reserved {
    cell: Arc<Cell>,
    operation: OperationId,
}

impl Reserved {
    /// A VM that nobody else knows yet.
    pub(crate) fn new(cell: &Arc<Cell>, activity: Activity, operation: OperationId) -> Self {
        cell.shared.change().activity = Some((activity, operation));
        Self { cell: cell.clone(), operation }
    }

    /// The VM.
    pub(crate) fn cell(&self) -> &Arc<Cell> {
        &self.cell
    }

    /// Goes on with something else, without anybody coming in between.
    pub(crate) fn turn(&self, activity: Activity) {
        self.cell.shared.change().activity = Some((activity, self.operation));
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // Without the VM's lock: whoever holds it and has found the VM taken is told so, as a moment ago.
        self.cell.shared.change().activity = None;
        self.cell.released.notify_waiters();
    }
}

impl Engine {
    /// Reserves a VM for a request if its state allows that, taking it from another operation where the request is of that kind.
    ///
    /// # Errors
    /// [`EngineError::WrongState`], [`EngineError::Busy`], or [`EngineError::NotFound`] for one that was deleted meanwhile.
    pub(crate) async fn reserve(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        request: Request,
        activity: Activity,
        operation: OperationId,
    ) -> Result<Admitted, EngineError> {
        loop {
            let other = {
                let writer = cell.lock(ctx).await;
                let mut shared = writer.0.change();
                if shared.deleted {
                    return Err(EngineError::NotFound {
                        what: "VM",
                        name: cell.name.to_string(),
                        hint: "it has just been deleted; `vm ls` lists all VMs".into(),
                    });
                }
                let state = shared.state();
                let changing = matches!(shared.activity, Some((Activity::Changing, _)));
                match request.verdict(&state, changing) {
                    Verdict::Proceed => {
                        shared.activity = Some((activity, operation));
                        return Ok(Admitted::Reserved(Reserved { cell: cell.clone(), operation }));
                    }
                    Verdict::Already => return Ok(Admitted::Already),
                    Verdict::Refuse => return Err(request.refused(&cell.name, &state)),
                    Verdict::Busy => {
                        let state = if changing { "being changed" } else { state.word() };
                        return Err(EngineError::Busy { name: cell.name.clone(), state });
                    }
                    // A deletion cannot be cancelled, and what it may be part of (a prune) is not to be.
                    Verdict::TakeOver => match shared.activity {
                        Some((Activity::Deleting, _)) | None => None,
                        Some((_, other)) => Some(other),
                    },
                }
            };
            if let Some(other) = other {
                self.operations().preempt(other);
            }
            cell.free().await;
        }
    }
}
