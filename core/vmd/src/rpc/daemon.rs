//! Namespace `daemon`.

use jsonrpsee::core::{RpcResult, async_trait};
use vm_api::{
    API_VERSION, DaemonStatus, Finding, LockInfo, LockState, OperationId, Resources, rpc::DaemonServer,
};

use super::{server::Context, vm::wire};
use crate::doctor::{self, Running};

impl Context {
    fn resources(&self) -> RpcResult<Resources> {
        let totals = self.engine.totals().map_err(wire)?;
        Ok(Resources {
            memory_mib: totals.memory_mib,
            memory_limit_mib: totals.memory_limit_mib,
            disk_bytes: totals.disk_bytes,
            disk_limit_bytes: totals.disk_limit_bytes,
            taps_ready: self.engine.taps_ready(),
        })
    }
}

#[async_trait]
impl DaemonServer for Context {
    async fn status(&self) -> RpcResult<DaemonStatus> {
        let layout = self.engine.layout();
        let vms = self.engine.all();
        Ok(DaemonStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            api_version: API_VERSION.into(),
            pid: std::process::id(),
            started_at: self.started_at,
            instance: self.engine.instance().to_string(),
            run_dir: layout.run.clone(),
            state_dir: layout.state.clone(),
            config_file: layout.config_file(),
            vms: vms.len(),
            running: vms.iter().filter(|cell| cell.live().is_some()).count(),
            resources: self.resources()?,
        })
    }

    async fn locks(&self) -> RpcResult<Vec<LockInfo>> {
        let entries = self.engine.locks().snapshot().into_iter();
        Ok(entries
            .map(|entry| LockInfo {
                lock: entry.lock,
                level: entry.level,
                state: match entry.state {
                    vm_locks::LockState::Held => LockState::Held,
                    vm_locks::LockState::Waiting => LockState::Waiting,
                },
                holder: entry.origin,
                operation: entry.operation.map(OperationId),
                age_ms: entry.age_ms,
            })
            .collect())
    }

    async fn stop(&self) -> RpcResult<()> {
        self.stop.cancel();
        Ok(())
    }

    async fn doctor(&self) -> RpcResult<Vec<Finding>> {
        let running = Some(Running { engine: &self.engine, plugins: &self.plugins, names: &self.names });
        Ok(doctor::check(self.engine.layout(), &self.config, running).await)
    }
}
