//! Namespace `vm`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jsonrpsee::{
    Extensions, PendingSubscriptionSink,
    core::{RpcResult, SubscriptionResult, async_trait},
    types::ErrorObjectOwned,
};
use tokio::{io::AsyncReadExt, net::UnixStream};
use vm_api::{
    Begun, ConsoleChunk, CreateVm, ErrorKind, GuestAccess, Problem, PruneVms, SetVm, StopVm, VmInfo, VmList,
    VmPlan, VmState, rpc::VmServer,
};
use vm_engine::{
    Engine, EngineError,
    vm::{
        LimitsRequest,
        cell::{Cell, View},
        change::SetRequest,
        create::CreateRequest,
        prune::PruneRequest,
    },
};
use vm_types::vm::Owner;

use super::{
    listing::listed,
    server::{Context, Peer},
};
use crate::problem::problem;

/// The most of a console log that one answer carries.
/// Written as JSON, a control character takes six bytes, and an answer has 10 MB at most.
const CONSOLE_MAX: u64 = 1 << 20;

/// How long a shim may take to tell a VMM's metrics.
const METRICS: std::time::Duration = std::time::Duration::from_secs(2);

/// An engine's error as the wire has it.
pub(super) fn wire(error: EngineError) -> ErrorObjectOwned {
    problem(&error).into()
}

/// A VM as clients see it, as of now.
pub(super) fn info(engine: &Engine, cell: &Cell) -> VmInfo {
    shown(engine, cell.view(), disk_used(cell))
}

/// The same of a view and what the disk takes.
pub(super) fn shown(engine: &Engine, view: View, disk_used_bytes: u64) -> VmInfo {
    let View { record, state, needs_restart, problem, driver: running, .. } = view;
    VmInfo {
        id: record.id,
        name: record.spec.name,
        state,
        image: record.spec.image_reference,
        image_digest: record.spec.image,
        kernel: record.spec.kernel,
        cpus: record.spec.cpus,
        memory_mib: record.spec.memory_mib,
        disk_bytes: record.spec.disk_bytes,
        disk_used_bytes,
        disk_bytes_per_second: record.spec.disk_limits.bytes_per_second,
        disk_operations_per_second: record.spec.disk_limits.operations_per_second,
        network: record.spec.network,
        address: record.address,
        labels: record.spec.labels,
        restart: record.spec.restart,
        expires_at: record.spec.expires_at,
        idle_stop_seconds: record.spec.idle_stop_seconds,
        needs_restart,
        problem: problem.map(str::to_owned),
        ephemeral: record.spec.owner.is_some(),
        created_at: record.created_at,
        vmm: running.or(record.spec.vmm).unwrap_or_else(|| engine.preferred_vmm()).to_string(),
        vmm_metrics: None,
    }
}

/// What the VMM of a VM that is up has told last. A shim that does not answer is no reason to show nothing of the VM.
async fn vmm_metrics(cell: &Cell) -> Option<serde_json::Value> {
    cell.live()?;
    let status = tokio::time::timeout(METRICS, vm_shim::status(&cell.paths())).await;
    status.ok()?.ok()?.vmm_metrics
}

/// Bytes that a VM's root disk takes on the host.
pub(super) fn disk_used(cell: &Cell) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = cell.paths().disk_files();
    files.iter().filter_map(|file| std::fs::metadata(file).ok()).map(|about| about.blocks() * 512).sum()
}

impl Context {
    pub(super) fn find(&self, vm: &str) -> RpcResult<Arc<Cell>> {
        self.engine.find(vm).map_err(wire)
    }
}

#[async_trait]
impl VmServer for Context {
    async fn create(&self, extensions: &Extensions, params: CreateVm) -> RpcResult<Begun> {
        let owner = if params.ephemeral {
            let pid = extensions.get::<Peer>().and_then(|peer| peer.pid);
            let process = pid.and_then(vm_host::process::identify).ok_or_else(|| {
                Problem::new(
                    ErrorKind::InvalidArgument,
                    "an ephemeral VM needs a caller whose process can be watched",
                )
                .hint("call from the daemon's own PID namespace, or make the VM without `ephemeral`")
            })?;
            let boot_id = self.engine.boot_id().to_owned();
            Some(Owner { process, boot_id })
        } else {
            None
        };
        let request = create_request(params, owner);
        let operation = self.engine.create(request).map_err(wire)?;
        Ok(Begun { operation })
    }

    async fn start(&self, vm: String) -> RpcResult<Begun> {
        let operation = self.engine.start_vm(self.find(&vm)?).map_err(wire)?;
        Ok(Begun { operation })
    }

    async fn stop(&self, vm: String, params: StopVm) -> RpcResult<Begun> {
        let grace = params.grace_seconds.map(Duration::from_secs);
        Ok(Begun { operation: self.engine.stop(self.find(&vm)?, grace).map_err(wire)? })
    }

    async fn kill(&self, vm: String) -> RpcResult<Begun> {
        Ok(Begun { operation: self.engine.kill(self.find(&vm)?).map_err(wire)? })
    }

    async fn restart(&self, vm: String, params: StopVm) -> RpcResult<Begun> {
        let grace = params.grace_seconds.map(Duration::from_secs);
        Ok(Begun { operation: self.engine.restart(self.find(&vm)?, grace).map_err(wire)? })
    }

    async fn pause(&self, vm: String) -> RpcResult<Begun> {
        Ok(Begun { operation: self.engine.pause(self.find(&vm)?).map_err(wire)? })
    }

    async fn resume(&self, vm: String) -> RpcResult<Begun> {
        Ok(Begun { operation: self.engine.resume(self.find(&vm)?).map_err(wire)? })
    }

    async fn set(&self, vm: String, params: SetVm) -> RpcResult<Begun> {
        let request = SetRequest {
            cpus: params.cpus,
            memory_mib: params.memory_mib,
            disk_bytes: params.disk_bytes,
            disk_limits: LimitsRequest {
                bytes_per_second: params.disk_bytes_per_second,
                operations_per_second: params.disk_operations_per_second,
            },
            labels: params.labels,
            restart: params.restart,
            ttl_seconds: params.ttl_seconds,
            idle_stop_seconds: params.idle_stop_seconds,
            keep: params.keep,
        };
        Ok(Begun { operation: self.engine.set(self.find(&vm)?, request).map_err(wire)? })
    }

    async fn prune(&self, params: PruneVms) -> RpcResult<Begun> {
        let request = PruneRequest {
            older_than_seconds: params.older_than_seconds,
            labels: params.labels,
            failed: params.failed,
            dry_run: params.dry_run,
        };
        Ok(Begun { operation: self.engine.prune(request).map_err(wire)?.id() })
    }

    async fn delete(&self, vm: String, force: bool) -> RpcResult<Begun> {
        let operation = self.engine.delete(self.find(&vm)?, force).map_err(wire)?;
        Ok(Begun { operation: operation.id() })
    }

    async fn list(&self) -> RpcResult<VmList> {
        let now = Instant::now();
        let vms: serde_json::Result<_> =
            self.engine.all().iter().map(|cell| listed(&self.engine, cell, now)).collect();
        vms.map_err(|error| Problem::new(ErrorKind::Internal, format!("a VM has no JSON: {error}")).into())
    }

    async fn get(&self, vm: String) -> RpcResult<VmInfo> {
        let cell = self.find(&vm)?;
        let vmm_metrics = vmm_metrics(&cell).await;
        Ok(VmInfo { vmm_metrics, ..info(&self.engine, &cell) })
    }

    async fn plan(&self, vm: String) -> RpcResult<VmPlan> {
        let cell = self.find(&vm)?;
        self.planned(cell).await.map_err(wire)
    }

    async fn plan_create(&self, params: CreateVm) -> RpcResult<VmPlan> {
        let request = create_request(params, None);
        let facts = self.engine.facts_of_request(request).await.map_err(wire)?;
        self.planned_anew(facts).await.map_err(wire)
    }

    async fn access(&self, vm: String) -> RpcResult<GuestAccess> {
        let cell = self.find(&vm)?;
        let state = cell.state();
        if !matches!(state, VmState::Running { .. }) {
            let mut problem = Problem::new(
                ErrorKind::WrongState,
                format!("VM {} is {}; nobody can log in", cell.name(), state.word()),
            );
            let verb = if matches!(state, VmState::Paused { .. }) { "resume" } else { "start" };
            problem.hint = Some(format!("{verb} it with `vm {verb} {}`", cell.name()));
            return Err(problem.into());
        }
        Ok(GuestAccess {
            id: cell.id().clone(),
            name: cell.name().clone(),
            ssh_socket: cell.paths().ssh_sock(),
            host_key: self.engine.host_public_key(&cell).map_err(wire)?,
            client_key: self.engine.layout().client_key(),
        })
    }

    async fn console(&self, vm: String, bytes: u64) -> RpcResult<ConsoleChunk> {
        let cell = self.find(&vm)?;
        Ok(ConsoleChunk { end: cell.live().is_none(), ..chunk(&mut tail(&cell, bytes).map_err(wire)?) })
    }

    async fn console_follow(
        &self,
        pending: PendingSubscriptionSink,
        vm: String,
        bytes: u64,
    ) -> SubscriptionResult {
        let cell = match self.find(&vm) {
            Ok(cell) => cell,
            Err(error) => {
                pending.reject(error).await;
                return Ok(());
            }
        };
        // Connected before the log is read, so that nothing falls between the two; a little may come twice.
        let live = UnixStream::connect(cell.paths().console_sock()).await;
        let mut bytes = match tail(&cell, bytes) {
            Ok(bytes) => bytes,
            Err(error) => {
                pending.reject(wire(error)).await;
                return Ok(());
            }
        };
        let sink = pending.accept().await?;
        sink.send(serde_json::value::to_raw_value(&chunk(&mut bytes))?).await?;
        if let Ok(mut live) = live {
            let mut buffer = vec![0; 16 * 1024];
            loop {
                // Cancel-safe: a read that is dropped has taken nothing.
                let got = tokio::select! {
                    () = sink.closed() => return Ok(()),
                    got = live.read(&mut buffer) => got.unwrap_or(0),
                };
                if got == 0 {
                    break;
                }
                bytes.extend_from_slice(&buffer[..got]);
                sink.send(serde_json::value::to_raw_value(&chunk(&mut bytes))?).await?;
            }
        }
        let last = ConsoleChunk { text: String::from_utf8_lossy(&bytes).into_owned(), end: true };
        sink.send(serde_json::value::to_raw_value(&last)?).await?;
        Ok(())
    }
}

fn create_request(params: CreateVm, owner: Option<Owner>) -> CreateRequest {
    CreateRequest {
        name: params.name,
        image: params.image,
        kernel: params.kernel,
        cpus: params.cpus,
        memory_mib: params.memory_mib,
        disk_bytes: params.disk_bytes,
        disk_limits: LimitsRequest {
            bytes_per_second: params.disk_bytes_per_second,
            operations_per_second: params.disk_operations_per_second,
        },
        network: params.network,
        labels: params.labels,
        owner,
        restart: params.restart,
        ttl_seconds: params.ttl_seconds,
        idle_stop_seconds: params.idle_stop_seconds,
        vmm: params.vmm,
        start: params.start,
    }
}

fn tail(cell: &Cell, bytes: u64) -> Result<Vec<u8>, EngineError> {
    Ok(vm_shim::console_tail(&cell.paths(), bytes.min(CONSOLE_MAX))?)
}

/// A chunk of the text in `bytes`, see [`text`].
fn chunk(bytes: &mut Vec<u8>) -> ConsoleChunk {
    ConsoleChunk { text: text(bytes), end: false }
}

/// Takes the text out of `bytes`; a character that is cut short at their end stays there for what comes next.
pub(super) fn text(bytes: &mut Vec<u8>) -> String {
    let cut = match std::str::from_utf8(bytes) {
        // No length: the end of the input, not a wrong byte.
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => bytes.len(),
    };
    // A wrong byte further ahead hides a cut one; then it is replaced, as wrong ones are.
    let taken: Vec<u8> = bytes.drain(..cut).collect();
    String::from_utf8_lossy(&taken).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_that_is_cut_in_two_comes_whole() {
        let mut bytes = "aé".as_bytes()[..2].to_vec();
        assert_eq!(chunk(&mut bytes).text, "a");
        bytes.extend_from_slice(&"é".as_bytes()[1..]);
        assert_eq!(chunk(&mut bytes).text, "é");
        assert!(bytes.is_empty());
        assert_eq!(chunk(&mut b"a\xffb".to_vec()).text, "a\u{fffd}b");
    }
}
