//! Starting a VM: network, run directory, initramfs, tap, shim with VMM, and waiting for the agent.

use std::{net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use vm_host::process::PidFd;
use vm_locks::{Ctx, Unlocked};
use vm_shim::ControlError;
use vm_types::{
    Effect, EventKind, Handle, OperationId, ProcessRef, VmPaths,
    guest::{config::GuestConfig, control::Phase as GuestPhase},
    machine::{Drive, MachineSpec, Nic},
    operation::OperationKind,
    shim::{GuestEnd, ShimSpec},
    vm::{ExitStatus, FailedAt, VmRecord, VmState},
};

use super::{
    cell::{Activity, Admitted, Cell, Live, Reserved},
    guest::{self, Place, ROOT_SERIAL},
    hooks::Asked,
    now,
    planned::Extras,
    state::{Request, Verdict},
};
use crate::{
    Engine, EngineError, admission::Reservation, journal::Phase, keys, network::Network, ops::OpContext,
};

/// How much of the console an error carries.
const TAIL_BYTES: u64 = 2048;

/// What a start brings up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Boot {
    /// All of it.
    Whole,
    /// The guest without the image's own init: nothing runs in it that nobody asked for.
    Quiet,
    /// Likewise, and without a network.
    Alone,
}

/// The VM's place on the host is made: run directory, network, tap, initramfs.
struct Placed {
    nics: Vec<Nic>,
    extras: Extras,
    /// For what a plugin wants above the specification.
    memory: Option<Reservation>,
}

/// Shim and VMM run.
struct Launched {
    live: Live,
    _memory: Option<Reservation>,
}

impl Engine {
    /// Starts a VM in an operation of its own.
    ///
    /// # Errors
    /// [`EngineError::WrongState`] for one that is up.
    pub fn start_vm(&self, cell: Arc<Cell>) -> Result<OperationId, EngineError> {
        refuse(&cell, Request::Start)?;
        let engine = self.clone();
        let operation = self.operations().begin(
            OperationKind::VmStart,
            cell.name().to_string(),
            move |context, mut ctx| async move {
                engine.start_now(&mut ctx, &cell, &context).await?;
                Ok(cell.id().clone())
            },
        )?;
        Ok(operation.id())
    }

    pub(crate) async fn start_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        let admitted = self.reserve(ctx, cell, Request::Start, Activity::Starting, context.id).await?;
        match admitted {
            Admitted::Reserved(reserved) => self.start_reserved(ctx, &reserved, context).await,
            Admitted::Already => Ok(()),
        }
    }

    /// Brings a VM up that is ours alone, or leaves nothing of the attempt.
    pub(crate) async fn start_reserved(
        &self,
        ctx: &mut Ctx<Unlocked>,
        reserved: &Reserved,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        self.start_as(ctx, reserved, Boot::Whole, context).await
    }

    /// [`Self::start_reserved`], or less.
    pub(crate) async fn start_as(
        &self,
        ctx: &mut Ctx<Unlocked>,
        reserved: &Reserved,
        boot: Boot,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        reserved.turn(Activity::Starting);
        let cell = reserved.cell();
        if !cell.with_record(|record| record.complete) {
            return Err(Request::Start.refused(cell.name(), &VmState::Defined));
        }
        // A refusal is no failure of the VM: it stays as it was.
        let _memory = self.admit_start(cell)?;
        let mut asked = self.ask(cell).await?;
        if let Some(asked) = &mut asked {
            context.cancellable(self.preflight(ctx, asked)).await?;
        }
        // Leftovers of a former run that could not be undone then.
        cell.scope.unwind(ctx, Phase::Start).await?;
        let up = async {
            let live = context.cancellable(self.bring_up(ctx, cell, asked.as_mut(), boot, context)).await?;
            cell.scope.answered(ctx).await?;
            let mut writer = cell.lock(ctx).await;
            self.inner.store.vms().set_started(cell.id()).await?;
            writer.change_record(|record| {
                record.failure = None;
                record.wanted_running = true;
            });
            writer.set_on(live, false);
            Ok(live)
        };
        match up.await {
            Ok(live) => {
                cell.scope.settle(ctx).await;
                self.watch_vmm(cell, live);
                self.event(EventKind::VmStarted, cell, Some(context.id), "started".into());
                Ok(())
            }
            Err(error) => {
                if let Err(undo) = self.unwind_run(ctx, cell).await {
                    // The next start, or the deletion, tries again.
                    tracing::warn!(vm = %cell.name(), error = %undo.chain(), "its start could not be undone");
                }
                if let Some(asked) = &asked {
                    self.clean_up_by(ctx, &asked.plugins, &asked.facts, "start-failed").await;
                }
                if !matches!(error, EngineError::Cancelled) {
                    self.note_failure(ctx, cell, FailedAt::Start, &error).await;
                }
                Err(error)
            }
        }
    }

    pub(super) async fn bring_up(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        mut asked: Option<&mut Asked>,
        boot: Boot,
        context: &OpContext,
    ) -> Result<Live, EngineError> {
        context.progress("starting", 0, None);
        let placed = Placed::new(self, ctx, cell, asked.as_deref_mut(), boot).await?;
        let launched = placed.launch(self, ctx, cell).await?;
        context.progress("booting", 0, None);
        let live = launched.wait(self, ctx, cell).await?;
        if let Some(asked) = asked {
            self.post_start(ctx, cell, live, asked, context).await?;
        }
        Ok(live)
    }
}

impl Placed {
    async fn new(
        engine: &Engine,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        asked: Option<&mut Asked>,
        boot: Boot,
    ) -> Result<Self, EngineError> {
        let paths = cell.paths();
        let connected = |address: &Ipv4Addr| (boot != Boot::Alone).then_some(*address);
        let mut network = match cell.with_record(|record| record.address.as_ref().and_then(connected)) {
            Some(_) => {
                let network = engine.ensure_network(ctx).await?;
                engine.move_into(ctx, cell, network.subnet).await?;
                Some(network)
            }
            None => None,
        };
        let record = cell.record();
        let initramfs = engine.initramfs_base(ctx, &record.spec.kernel).await?;
        let mut extras = match asked {
            Some(asked) => {
                let plans = engine.ask_for_plans(ctx, cell, asked).await?;
                engine.apply_plans(ctx, cell, asked, &mut network, plans).await?
            }
            None => Extras::default(),
        };
        let memory = match extras.memory_mib > record.spec.memory_mib {
            true => Some(engine.admit_memory(cell, extras.memory_mib)?),
            false => None,
        };
        cell.scope
            .apply(ctx, Effect::Directory { path: paths.run.clone(), mode: 0o711 }, Phase::Start)
            .await?;
        let mut nics = Vec::new();
        if let Some(address) = record.address.as_ref().and_then(connected) {
            let tap = engine.take_tap(ctx, cell).await?;
            nics.push(Nic { tap, mac: vm_net::names::mac_for(address) });
        }
        let mut config = engine.guest_config(cell, network).await?;
        config.agent_init = boot != Boot::Whole;
        extras.extend_guest(&mut config);
        let segment = Effect::AppendedFile {
            path: paths.initramfs(),
            mode: 0o600,
            base: initramfs,
            tail: vm_image::kernel::segment(&config).map_err(|error| EngineError::Panicked {
                detail: format!("the guest's configuration: {error}"),
            })?,
        };
        cell.scope.apply(ctx, segment, Phase::Start).await?;
        Ok(Self { nics, extras, memory })
    }

    async fn launch(
        self,
        engine: &Engine,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
    ) -> Result<Launched, EngineError> {
        let (record, paths) = (cell.record(), cell.paths());
        let Self { nics, mut extras, memory } = self;
        let disk = engine.open_disk(ctx, cell).await?;
        let mut machine = engine.machine(&record, &paths, disk, nics);
        extras.extend_machine(&mut machine);
        let driver = engine.vmm_of(cell)?;
        if !driver.unpacks_kernels() {
            machine.kernel =
                vm_image::kernel::vmlinux(&engine.inner.layout.kernel(&record.spec.kernel)).await?;
        }
        let (cpus, memory_mib, disk_limits) = (machine.cpus, machine.memory_mib, record.spec.disk_limits);
        let mut launch = driver.plan(&machine, &paths).await?;
        if let Some(jail) = &mut launch.jail {
            engine.limit(ctx, cell, jail, &machine).await?;
        }
        let spec = ShimSpec {
            vm: record.id.clone(),
            run_dir: paths.run.clone(),
            state_dir: paths.state.clone(),
            launch,
            vmm: Some(driver.kind()),
            machine: Some(machine),
            console_log_bytes: engine.inner.settings.console_log_bytes,
            socket_group: engine.inner.settings.socket_group,
        };
        let content = serde_json::to_vec(&spec).map_err(|error| EngineError::Panicked {
            detail: format!("the shim's specification: {error}"),
        })?;
        cell.scope
            .apply(ctx, Effect::File { path: paths.shim_spec(), mode: 0o600, content }, Phase::Start)
            .await?;
        let shim = Effect::Shim { run_dir: paths.run.clone(), spec: paths.shim_spec() };
        let Handle::Processes { shim, vmm, .. } = cell.scope.apply(ctx, shim, Phase::Start).await? else {
            return Err(EngineError::Panicked { detail: "a started shim has no processes".into() });
        };
        let live = Live { shim, vmm, driver: driver.kind(), since: now(), cpus, memory_mib, disk_limits };
        Ok(Launched { live, _memory: memory })
    }
}

impl Launched {
    /// Waits until the guest's agent answers; no lock is held meanwhile.
    async fn wait(self, engine: &Engine, _: &mut Ctx<Unlocked>, cell: &Cell) -> Result<Live, EngineError> {
        let paths = cell.paths();
        let limit = engine.inner.settings.start_timeout;
        let Live { shim, vmm, .. } = self.live;
        // Cancel-safe: both arms only wait.
        tokio::select! {
            biased;
            ended = ended(vmm, shim) => {
                ended?;
                Err(died(&paths))
            }
            ready = agent_ready(&paths, limit) => match ready {
                Ok(()) => Ok(Live { since: now(), ..self.live }),
                Err(ControlError::NotRunning { .. }) => {
                    // The shim closes its sockets only when the VMM has ended.
                    ended(vmm, shim).await?;
                    Err(died(&paths))
                }
                Err(ControlError::TimedOut { .. }) => Err(EngineError::GuestUnresponsive {
                    seconds: limit.as_secs(),
                    console: console(&paths),
                }),
                Err(source) => Err(EngineError::Guest { what: "finish its start", source }),
            },
        }
    }
}

impl Engine {
    /// What a guest is told, without what plugins add.
    pub(super) async fn guest_config(
        &self,
        cell: &Cell,
        network: Option<Network>,
    ) -> Result<GuestConfig, EngineError> {
        let (record, paths) = (cell.record(), cell.paths());
        let place = record.address.zip(network).map(|(address, network)| Place {
            subnet: network.subnet,
            gateway: network.gateway,
            address,
            mac: vm_net::names::mac_for(address),
            resolvers: network.resolvers,
            search: network.search,
            mtu: network.mtu,
        });
        let host_key = std::fs::read_to_string(paths.host_key()).map_err(|error| EngineError::Key {
            action: "read",
            path: paths.host_key(),
            source: Box::new(error),
        })?;
        let mut config = guest::config(&record, place.as_ref(), host_key, &self.inner.client_public_key);
        if let Some(image) = self.inner.store.images().by_digest(record.spec.image.hex()).await? {
            config.environment = guest::environment(&image.config);
        }
        Ok(config)
    }

    fn machine(&self, record: &VmRecord, paths: &VmPaths, disk: PathBuf, nics: Vec<Nic>) -> MachineSpec {
        MachineSpec {
            vm: record.id.clone(),
            cpus: record.spec.cpus,
            memory_mib: record.spec.memory_mib,
            kernel: self.inner.layout.kernel(&record.spec.kernel).join("vmlinuz"),
            initramfs: paths.initramfs(),
            kernel_args: Vec::new(),
            drives: vec![Drive {
                serial: ROOT_SERIAL.into(),
                path: disk,
                read_only: false,
                limits: record.spec.disk_limits,
            }],
            nics,
            vsock_cid: None,
        }
    }

    /// The guest's SSH host key, public half.
    ///
    /// # Errors
    /// The key file.
    pub fn host_public_key(&self, cell: &Cell) -> Result<String, EngineError> {
        keys::public_of(&cell.paths().host_key())
    }
}

/// Refuses at once what the state does not allow and waiting would not change.
pub(super) fn refuse(cell: &Cell, request: Request) -> Result<(), EngineError> {
    let state = cell.state();
    match request.verdict(&state, false) {
        Verdict::Refuse => Err(request.refused(cell.name(), &state)),
        _ => Ok(()),
    }
}

async fn agent_ready(paths: &VmPaths, limit: Duration) -> Result<(), ControlError> {
    let deadline = tokio::time::Instant::now() + limit;
    let (mut control, agent) = vm_shim::connect_control(paths, limit).await?;
    tracing::debug!(?agent, "agent answered");
    let left = deadline.saturating_duration_since(tokio::time::Instant::now());
    for warning in control.wait_ready(GuestPhase::Agent, left).await? {
        tracing::warn!(%warning, "from the guest's agent");
    }
    Ok(())
}

/// Waits for the VMM's end, and then for the shim's, which has written the exit record by then.
pub(crate) async fn ended(vmm: ProcessRef, shim: ProcessRef) -> Result<(), EngineError> {
    for process in [vmm, shim] {
        let watch = |source| EngineError::File {
            action: "watch",
            path: format!("/proc/{}", process.pid).into(),
            source,
        };
        if let Some(held) = PidFd::open(process).map_err(watch)? {
            held.ended().await.map_err(watch)?;
        }
    }
    Ok(())
}

/// How the VMM ended and what the guest had to do with it, from the shim's record.
pub(crate) fn exit(paths: &VmPaths) -> (ExitStatus, Option<GuestEnd>) {
    match vm_shim::exit_record(paths) {
        Ok(Some(record)) => (record.status, record.guest),
        Ok(None) => (ExitStatus::Unknown, None),
        Err(error) => {
            tracing::warn!(%error, "unreadable exit record");
            (ExitStatus::Unknown, None)
        }
    }
}

/// [`exit`], the status alone.
pub(crate) fn exit_status(paths: &VmPaths) -> ExitStatus {
    exit(paths).0
}

pub(crate) fn died(paths: &VmPaths) -> EngineError {
    let console = console(paths);
    match exit(paths) {
        (_, Some(how)) => EngineError::GuestEnded { how, console },
        (status, None) => {
            let log = std::fs::read_to_string(paths.vmm_log()).unwrap_or_default();
            let lines: Vec<_> = log.lines().rev().take(5).collect();
            let log = lines.into_iter().rev().collect::<Vec<_>>().join("\n");
            EngineError::VmmDied { status, log, console }
        }
    }
}

/// The console's last lines, without a guest's control characters.
pub(crate) fn console(paths: &VmPaths) -> String {
    let bytes = vm_shim::console_tail(paths, TAIL_BYTES).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.chars().filter(|c| *c == '\n' || *c == '\t' || !c.is_control()).collect()
}
