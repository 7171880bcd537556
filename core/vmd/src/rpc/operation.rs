//! Namespace `operation`.

use jsonrpsee::{
    PendingSubscriptionSink,
    core::{RpcResult, SubscriptionResult, async_trait},
};
use vm_api::{OperationId, OperationInfo, OperationStatus, rpc::OperationServer};
use vm_engine::ops::{Outcome, Snapshot, Status};

use super::{
    server::Context,
    vm::{info, wire},
};
use crate::problem::problem;

impl Context {
    fn operation(&self, snapshot: &Snapshot) -> OperationInfo {
        let status = match &snapshot.status {
            Status::Running(progress) => OperationStatus::Running { progress: progress.clone() },
            Status::Failed(error) => OperationStatus::Failed { error: problem(error) },
            Status::Succeeded(outcome) => OperationStatus::Succeeded { result: self.result(outcome) },
        };
        OperationInfo {
            id: snapshot.id,
            kind: snapshot.kind,
            subject: snapshot.subject.clone(),
            begun_at: snapshot.begun_at,
            status,
        }
    }

    /// What was made, as it is now; null if it is gone again.
    fn result(&self, outcome: &Outcome) -> serde_json::Value {
        let value = match outcome {
            Outcome::Done => return serde_json::Value::Null,
            Outcome::Vm(id) => match self.engine.find(id.as_str()) {
                Ok(cell) => serde_json::to_value(info(&self.engine, &cell)),
                Err(_) => return serde_json::Value::Null,
            },
            Outcome::Image(image) => serde_json::to_value(image),
            Outcome::Kernel(kernel) => serde_json::to_value(kernel),
        };
        // Plain data with string keys always fits.
        value.unwrap_or_default()
    }
}

#[async_trait]
impl OperationServer for Context {
    async fn list(&self) -> RpcResult<Vec<OperationInfo>> {
        Ok(self.engine.operations().list().iter().map(|snapshot| self.operation(snapshot)).collect())
    }

    async fn get(&self, id: OperationId) -> RpcResult<OperationInfo> {
        let receiver = self.engine.operations().watch(id).map_err(wire)?;
        let snapshot = receiver.borrow().clone();
        Ok(self.operation(&snapshot))
    }

    async fn cancel(&self, id: OperationId) -> RpcResult<()> {
        self.engine.operations().cancel(id).map_err(wire)
    }

    async fn watch(&self, pending: PendingSubscriptionSink, id: OperationId) -> SubscriptionResult {
        let mut receiver = match self.engine.operations().watch(id) {
            Ok(receiver) => receiver,
            Err(error) => {
                pending.reject(wire(error)).await;
                return Ok(());
            }
        };
        let sink = pending.accept().await?;
        loop {
            let snapshot = receiver.borrow_and_update().clone();
            let ended = !matches!(snapshot.status, Status::Running(_));
            sink.send(serde_json::value::to_raw_value(&self.operation(&snapshot))?).await?;
            if ended {
                break;
            }
            // Cancel-safe: a change that is not awaited to its end is seen by the next look.
            tokio::select! {
                () = sink.closed() => break,
                changed = receiver.changed() => changed?,
            }
        }
        Ok(())
    }
}
