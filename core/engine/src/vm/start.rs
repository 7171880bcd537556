//! Starting a VM: network, run directory, initramfs, tap, shim with VMM, and waiting for the agent.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use vm_host::process::PidFd;
use vm_shim::ControlError;
use vm_types::{
    Effect, Handle, OperationId, ProcessRef, VmPaths,
    guest::control::Phase as GuestPhase,
    machine::{Drive, MachineSpec, Nic},
    operation::OperationKind,
    shim::ShimSpec,
    vm::{ExitStatus, FailedAt, VmRecord},
};

use super::{
    cell::{Activity, Cell, Live},
    guest::{self, Place, ROOT_SERIAL},
};
use crate::{
    Engine, EngineError,
    journal::Phase,
    keys,
    ops::{OpContext, Outcome},
};

/// How much of the console an error carries.
const TAIL_BYTES: u64 = 2048;

impl Engine {
    /// Starts a VM in an operation of its own.
    ///
    /// # Errors
    /// [`EngineError::WrongState`] for one that is up.
    pub fn start_vm(&self, cell: Arc<Cell>) -> Result<OperationId, EngineError> {
        refuse_running(&cell)?;
        let engine = self.clone();
        self.operations()
            .begin(OperationKind::VmStart, cell.name().to_string(), move |context, _locks| async move {
                engine.start_now(&cell, &context).await?;
                Ok(Outcome::Vm(cell.id().clone()))
            })
            .map(|operation| operation.id())
    }

    pub(crate) async fn start_now(&self, cell: &Arc<Cell>, context: &OpContext) -> Result<(), EngineError> {
        let _reserved = cell.reserve(Activity::Starting, context.id)?;
        refuse_running(cell)?;
        if !cell.record().complete {
            return Err(EngineError::WrongState {
                name: cell.name().clone(),
                state: "half made or half deleted",
                wanted: "started",
            });
        }
        // Leftovers of a former run that could not be undone then.
        cell.scope.unwind(Phase::Start).await?;
        let up = async {
            let live = context.cancellable(self.bring_up(cell, context)).await?;
            let store = self.inner.store.vms();
            store.set_failure(cell.id(), None).await?;
            store.set_wanted_running(cell.id(), true).await?;
            Ok(live)
        };
        match up.await {
            Ok(live) => {
                cell.change_record(|record| {
                    record.failure = None;
                    record.wanted_running = true;
                });
                cell.set_live(Some(live));
                self.watch_vmm(cell.clone(), live);
                Ok(())
            }
            Err(error) => {
                if let Err(undo) = cell.scope.unwind(Phase::Start).await {
                    // The next start, or the deletion, tries again.
                    tracing::warn!(vm = %cell.name(), error = %undo.chain(), "its start could not be undone");
                }
                if !matches!(error, EngineError::Cancelled) {
                    self.note_failure(cell, FailedAt::Start, &error).await;
                }
                Err(error)
            }
        }
    }

    async fn bring_up(&self, cell: &Cell, context: &OpContext) -> Result<Live, EngineError> {
        let paths = cell.paths();
        let settings = &self.inner.settings;
        context.progress("starting", 0, None);
        let network = match cell.record().address {
            Some(_) => {
                let network = self.ensure_network().await?;
                self.move_into(cell, network.subnet).await?;
                Some(network)
            }
            None => None,
        };
        let record = cell.record();

        let initramfs = self.initramfs_base(&record.spec.kernel).await?;
        let place = record.address.zip(network).map(|(address, network)| Place {
            subnet: network.subnet,
            gateway: network.gateway,
            address,
            mac: vm_net::names::mac_for(address),
            resolvers: network.resolvers,
            mtu: network.mtu,
        });
        cell.scope.apply(Effect::Directory { path: paths.run.clone(), mode: 0o711 }, Phase::Start).await?;
        let mut nics = Vec::new();
        if let Some(place) = &place {
            let name = self.tap_name(place);
            nics.push(Nic { tap: name.clone(), mac: place.mac.clone() });
            let bridge = vm_net::names::bridge_name(&self.inner.instance);
            cell.scope.apply(Effect::Tap { name, bridge }, Phase::Start).await?;
        }
        let host_key = std::fs::read_to_string(paths.host_key()).map_err(|error| EngineError::Key {
            action: "read",
            path: paths.host_key(),
            source: Box::new(error),
        })?;
        let config = guest::config(&record, place.as_ref(), host_key, &self.inner.client_public_key);
        let segment = Effect::AppendedFile {
            path: paths.initramfs(),
            mode: 0o600,
            base: initramfs,
            tail: vm_image::kernel::segment(&config).map_err(|error| EngineError::Panicked {
                detail: format!("the guest's configuration: {error}"),
            })?,
        };
        cell.scope.apply(segment, Phase::Start).await?;

        let machine = self.machine(&record, &paths, nics);
        let spec = ShimSpec {
            vm: record.id.clone(),
            run_dir: paths.run.clone(),
            state_dir: paths.state.clone(),
            launch: self.inner.vmm.plan(&machine, &paths).await?,
            machine: Some(machine),
            console_log_bytes: settings.console_log_bytes,
            socket_group: settings.socket_group,
        };
        let content = serde_json::to_vec(&spec).map_err(|error| EngineError::Panicked {
            detail: format!("the shim's specification: {error}"),
        })?;
        cell.scope
            .apply(Effect::File { path: paths.shim_spec(), mode: 0o600, content }, Phase::Start)
            .await?;
        let shim = Effect::Shim { run_dir: paths.run.clone(), spec: paths.shim_spec() };
        let Handle::Processes { shim, vmm } = cell.scope.apply(shim, Phase::Start).await? else {
            return Err(EngineError::Panicked { detail: "a started shim has no processes".into() });
        };

        context.progress("booting", 0, None);
        // Cancel-safe: both arms only wait.
        tokio::select! {
            biased;
            ended = ended(vmm, shim) => {
                ended?;
                Err(died(&paths))
            }
            ready = agent_ready(&paths, settings.start_timeout) => match ready {
                Ok(()) => Ok(Live { shim, vmm, since: now() }),
                Err(ControlError::NotRunning { .. }) => {
                    // The shim closes its sockets only when the VMM has ended.
                    ended(vmm, shim).await?;
                    Err(died(&paths))
                }
                Err(ControlError::TimedOut { .. }) => Err(EngineError::GuestUnresponsive {
                    seconds: settings.start_timeout.as_secs(),
                    console: console(&paths),
                }),
                Err(source) => Err(EngineError::Guest { what: "finish its start", source }),
            },
        }
    }

    fn machine(&self, record: &VmRecord, paths: &VmPaths, nics: Vec<Nic>) -> MachineSpec {
        MachineSpec {
            vm: record.id.clone(),
            cpus: record.spec.cpus,
            memory_mib: record.spec.memory_mib,
            kernel: self.inner.layout.kernel(&record.spec.kernel).join("vmlinuz"),
            initramfs: paths.initramfs(),
            kernel_args: Vec::new(),
            drives: vec![Drive { serial: ROOT_SERIAL.into(), path: paths.disk(), read_only: false }],
            nics,
        }
    }

    /// Numbered by the host part of the VM's address, which is unique among the daemon's VMs.
    fn tap_name(&self, place: &Place) -> String {
        let number = vm_net::addresses::host_number(place.subnet, place.address);
        vm_net::names::tap_name(&self.inner.instance, number)
    }

    /// The guest's SSH host key, public half.
    ///
    /// # Errors
    /// The key file.
    pub fn host_public_key(&self, cell: &Cell) -> Result<String, EngineError> {
        keys::public_of(&cell.paths().host_key())
    }
}

fn refuse_running(cell: &Cell) -> Result<(), EngineError> {
    match cell.live() {
        Some(_) => {
            Err(EngineError::WrongState { name: cell.name().clone(), state: "running", wanted: "started" })
        }
        None => Ok(()),
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
pub(super) async fn ended(vmm: ProcessRef, shim: ProcessRef) -> Result<(), EngineError> {
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

/// How the VMM ended, from the shim's record.
pub(super) fn exit_status(paths: &VmPaths) -> ExitStatus {
    match vm_shim::exit_record(paths) {
        Ok(Some(record)) => record.status,
        Ok(None) => ExitStatus::Unknown,
        Err(error) => {
            tracing::warn!(%error, "unreadable exit record");
            ExitStatus::Unknown
        }
    }
}

pub(super) fn died(paths: &VmPaths) -> EngineError {
    let log = std::fs::read_to_string(paths.vmm_log()).unwrap_or_default();
    let lines: Vec<_> = log.lines().rev().take(5).collect();
    EngineError::VmmDied {
        status: exit_status(paths),
        log: lines.into_iter().rev().collect::<Vec<_>>().join("\n"),
        console: console(paths),
    }
}

/// The console's last lines, without a guest's control characters.
fn console(paths: &VmPaths) -> String {
    let bytes = vm_shim::console_tail(paths, TAIL_BYTES).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.chars().filter(|c| *c == '\n' || *c == '\t' || !c.is_control()).collect()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
