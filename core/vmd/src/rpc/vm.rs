//! Namespace `vm`.

use std::{sync::Arc, time::Duration};

use jsonrpsee::{
    Extensions, PendingSubscriptionSink,
    core::{RpcResult, SubscriptionResult, async_trait},
    types::ErrorObjectOwned,
};
use tokio::{io::AsyncReadExt, net::UnixStream};
use vm_api::{
    Begun, ConsoleChunk, CreateVm, ErrorKind, GuestAccess, Problem, StopVm, VmInfo, VmState, rpc::VmServer,
};
use vm_engine::{
    Engine, EngineError,
    vm::{cell::Cell, create::CreateRequest},
};

use super::server::{Context, Peer};
use crate::problem::problem;

/// The most of a console log that one answer carries.
const CONSOLE_MAX: u64 = 16 << 20;

/// An engine's error as the wire has it.
pub(super) fn wire(error: EngineError) -> ErrorObjectOwned {
    problem(&error).into()
}

/// A VM as clients see it.
pub(super) fn info(engine: &Engine, cell: &Cell) -> VmInfo {
    use std::os::unix::fs::MetadataExt;
    let record = cell.record();
    let used = std::fs::metadata(cell.paths().disk()).map_or(0, |about| about.blocks() * 512);
    VmInfo {
        id: record.id,
        name: record.spec.name,
        state: cell.state(),
        image: record.spec.image_reference,
        image_digest: record.spec.image,
        kernel: record.spec.kernel,
        cpus: record.spec.cpus,
        memory_mib: record.spec.memory_mib,
        disk_bytes: record.spec.disk_bytes,
        disk_used_bytes: used,
        network: record.spec.network,
        address: record.address,
        labels: record.spec.labels,
        ephemeral: record.spec.owner.is_some(),
        created_at: record.created_at,
        vmm: engine.vmm_name(),
    }
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
            let owner = pid.and_then(vm_host::process::identify).ok_or_else(|| {
                Problem::new(
                    ErrorKind::InvalidArgument,
                    "an ephemeral VM needs a caller whose process can be watched",
                )
                .hint("call from the daemon's own PID namespace, or make the VM without `ephemeral`")
            })?;
            Some(owner)
        } else {
            None
        };
        let request = CreateRequest {
            name: params.name,
            image: params.image,
            kernel: params.kernel,
            cpus: params.cpus,
            memory_mib: params.memory_mib,
            disk_bytes: params.disk_bytes,
            network: params.network,
            labels: params.labels,
            owner,
            start: params.start,
        };
        let operation = self.engine.create(request).map_err(wire)?;
        Ok(Begun { operation })
    }

    async fn start(&self, vm: String) -> RpcResult<Begun> {
        let operation = self.engine.start_vm(self.find(&vm)?).map_err(wire)?;
        Ok(Begun { operation })
    }

    async fn stop(&self, vm: String, params: StopVm) -> RpcResult<Begun> {
        let grace = params.grace_seconds.map(Duration::from_secs);
        Ok(Begun { operation: self.engine.stop(self.find(&vm)?, grace) })
    }

    async fn kill(&self, vm: String) -> RpcResult<Begun> {
        Ok(Begun { operation: self.engine.kill(self.find(&vm)?) })
    }

    async fn delete(&self, vm: String, force: bool) -> RpcResult<Begun> {
        let operation = self.engine.delete(self.find(&vm)?, force).map_err(wire)?;
        Ok(Begun { operation })
    }

    async fn list(&self) -> RpcResult<Vec<VmInfo>> {
        Ok(self.engine.all().iter().map(|cell| info(&self.engine, cell)).collect())
    }

    async fn get(&self, vm: String) -> RpcResult<VmInfo> {
        Ok(info(&self.engine, &*self.find(&vm)?))
    }

    async fn access(&self, vm: String) -> RpcResult<GuestAccess> {
        let cell = self.find(&vm)?;
        let state = cell.state();
        if !matches!(state, VmState::Running { .. }) {
            let mut problem = Problem::new(
                ErrorKind::WrongState,
                format!("VM {} is {}; nobody can log in", cell.name(), state.word()),
            );
            problem.hint = Some(format!("start it with `vm start {}`", cell.name()));
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
        Ok(chunk(&tail(&cell, bytes).map_err(wire)?))
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
        let sink = pending.accept().await?;
        let past = tail(&cell, bytes).map_err(|error| error.chain())?;
        sink.send(serde_json::value::to_raw_value(&chunk(&past))?).await?;
        let Ok(mut live) = live else { return Ok(()) };
        let mut buffer = vec![0; 16 * 1024];
        loop {
            // Cancel-safe: a read that is dropped has taken nothing.
            let got = tokio::select! {
                () = sink.closed() => break,
                got = live.read(&mut buffer) => got?,
            };
            if got == 0 {
                break;
            }
            sink.send(serde_json::value::to_raw_value(&chunk(&buffer[..got]))?).await?;
        }
        Ok(())
    }
}

fn tail(cell: &Cell, bytes: u64) -> Result<Vec<u8>, EngineError> {
    Ok(vm_shim::console_tail(&cell.paths(), bytes.min(CONSOLE_MAX))?)
}

fn chunk(bytes: &[u8]) -> ConsoleChunk {
    ConsoleChunk { text: String::from_utf8_lossy(bytes).into_owned() }
}
