//! Namespace `operation`.

use jsonrpsee::{
    PendingSubscriptionSink,
    core::{RpcResult, SubscriptionResult, async_trait},
};
use serde::Serialize;
use vm_api::{
    MadeImage, OperationId, OperationInfo, OperationStatus, OutputChunk, Pruned, VmChanged,
    rpc::OperationServer,
};
use vm_engine::ops::{Operations, Outcome, Snapshot, Status};

use super::{
    server::Context,
    vm::{info, text, wire},
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
            ended_at: snapshot.ended_at,
            status,
        }
    }

    /// What was made, as it is now; null if it is gone again.
    fn result(&self, outcome: &Outcome) -> serde_json::Value {
        let vm = |id: &vm_types::VmId| {
            let cell = self.engine.by_id(id)?;
            Some(info(&self.engine, &cell))
        };
        let value = match outcome {
            Outcome::Done => return serde_json::Value::Null,
            Outcome::Vm(id) => serde_json::to_value(vm(id)),
            Outcome::VmChanged(changed) => serde_json::to_value(
                vm(&changed.vm).map(|vm| VmChanged { vm, needs_restart: changed.needs_restart.clone() }),
            ),
            Outcome::Pruned(pruned) => serde_json::to_value(Pruned {
                deleted: pruned.deleted.clone(),
                failed: pruned.failed.iter().map(|(name, error)| (name.clone(), problem(error))).collect(),
                freed_bytes: pruned.freed_bytes,
            }),
            Outcome::Image(image) => serde_json::to_value(image),
            Outcome::Made(made) => {
                serde_json::to_value(MadeImage { image: made.image.clone(), warnings: made.warnings.clone() })
            }
            Outcome::Kernel(kernel) => serde_json::to_value(kernel),
            Outcome::WorkspacePlan(plan) => serde_json::to_value(plan),
            Outcome::WorkspacePrepared(prepared) => serde_json::to_value(prepared),
            Outcome::WorkspaceStatus(status) => serde_json::to_value(status),
            Outcome::WorkspaceExported(export) => serde_json::to_value(export),
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
        let snapshot = self.engine.operations().get(id).map_err(wire)?;
        Ok(self.operation(&snapshot))
    }

    async fn cancel(&self, id: OperationId) -> RpcResult<()> {
        self.engine.operations().cancel(id).map_err(wire)
    }

    async fn output(&self, pending: PendingSubscriptionSink, id: OperationId) -> SubscriptionResult {
        say(pending, self.engine.operations(), id).await
    }

    async fn watch(
        &self,
        pending: PendingSubscriptionSink,
        id: OperationId,
        cancel_on_close: Option<bool>,
    ) -> SubscriptionResult {
        let show = |snapshot: &Snapshot| self.operation(snapshot);
        watch(pending, self.engine.operations(), id, cancel_on_close.unwrap_or(false), show).await
    }
}

/// Tells a client what an operation says until it ends or the client leaves.
async fn say(
    pending: PendingSubscriptionSink,
    operations: &Operations,
    id: OperationId,
) -> SubscriptionResult {
    let mut listener = match operations.listen(id) {
        Ok(listener) => listener,
        Err(error) => {
            pending.reject(wire(error)).await;
            return Ok(());
        }
    };
    let sink = pending.accept().await?;
    // The beginning of a character whose end has not come.
    let mut begun = Vec::new();
    loop {
        // Cancel-safe: a piece that is not handed out here is the next one that is.
        let piece = tokio::select! {
            () = sink.closed() => return Ok(()),
            piece = listener.next() => piece,
        };
        let Some(piece) = piece else { break };
        begun.extend_from_slice(&piece.bytes);
        let chunk = OutputChunk { text: text(&mut begun), lost: piece.lost, end: false };
        sink.send(serde_json::value::to_raw_value(&chunk)?).await?;
    }
    let last = OutputChunk { text: String::from_utf8_lossy(&begun).into_owned(), lost: 0, end: true };
    sink.send(serde_json::value::to_raw_value(&last)?).await?;
    Ok(())
}

/// Tells a client of an operation's states until it ends or the client leaves.
async fn watch<T: Serialize>(
    pending: PendingSubscriptionSink,
    operations: &Operations,
    id: OperationId,
    cancel_on_close: bool,
    show: impl Fn(&Snapshot) -> T,
) -> SubscriptionResult {
    let mut watcher = match operations.watch(id) {
        Ok(watcher) => watcher,
        Err(error) => {
            pending.reject(wire(error)).await;
            return Ok(());
        }
    };
    // However this function is left: a client that is gone cannot take its request back any more. One that has ended is not
    // cancelled by it.
    let _cancel = cancel_on_close.then(|| CancelOnDrop { operations, id });
    let sink = pending.accept().await?;
    loop {
        // Cancel-safe: a state that is not handed out here is the next one that is.
        let snapshot = tokio::select! {
            () = sink.closed() => break,
            snapshot = watcher.next() => snapshot,
        };
        let Some(snapshot) = snapshot else { break };
        sink.send(serde_json::value::to_raw_value(&show(&snapshot))?).await?;
    }
    Ok(())
}

struct CancelOnDrop<'a> {
    operations: &'a Operations,
    id: OperationId,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        // One that was forgotten meanwhile has ended.
        let _ = self.operations.cancel(self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jsonrpsee::{RpcModule, core::server::Subscription};
    use tokio::{sync::oneshot, time::timeout};
    use vm_engine::{EngineError, ops::Operation};
    use vm_types::operation::OperationKind;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn module(operations: &Operations) -> RpcModule<Operations> {
        let mut module = RpcModule::new(operations.clone());
        module
            .register_subscription(
                "watch",
                "changed",
                "unwatch",
                |params, pending, operations, _| async move {
                    let (id, cancel): (OperationId, bool) = params.parse()?;
                    watch(pending, &operations, id, cancel, |snapshot| match &snapshot.status {
                        Status::Running(progress) => progress.stage.clone(),
                        Status::Succeeded(_) => "succeeded".into(),
                        Status::Failed(error) => error.to_string(),
                    })
                    .await
                },
            )
            .unwrap();
        module
    }

    async fn next(subscription: &mut Subscription) -> Option<String> {
        let item = timeout(LONG, subscription.next::<String>()).await.expect("nothing came");
        item.map(|item| item.unwrap().0)
    }

    /// One that ends when told to, or when cancelled.
    fn begin(operations: &Operations) -> (Operation<()>, oneshot::Sender<()>) {
        let (finish, finished) = oneshot::channel();
        let operation = operations.begin(OperationKind::VmStart, "a", |context, _| async move {
            context.progress("booting", 0, None);
            let work = async { finished.await.map_err(|_| EngineError::ShuttingDown) };
            context.cancellable(work).await
        });
        (operation.unwrap(), finish)
    }

    #[tokio::test]
    async fn a_client_is_told_of_the_end_last() {
        let operations = Operations::default();
        let (operation, finish) = begin(&operations);
        let mut subscription =
            module(&operations).subscribe_unbounded("watch", (operation.id(), true)).await.unwrap();
        while next(&mut subscription).await.unwrap() != "booting" {}
        finish.send(()).unwrap();
        assert_eq!(next(&mut subscription).await.unwrap(), "succeeded");
        operation.wait().await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_leaves_takes_along_what_it_said_it_would_and_nothing_else() {
        let operations = Operations::default();
        let module = module(&operations);
        let (taken, _never) = begin(&operations);
        let (left, finish) = begin(&operations);
        for (operation, cancel) in [(&taken, true), (&left, false)] {
            let mut subscription =
                module.subscribe_unbounded("watch", (operation.id(), cancel)).await.unwrap();
            while next(&mut subscription).await.unwrap() != "booting" {}
        }
        let error = timeout(LONG, taken.wait()).await.unwrap().unwrap_err();
        assert!(matches!(*error, EngineError::Cancelled), "{error}");
        // Had it been cancelled too, this would come too late.
        finish.send(()).unwrap();
        timeout(LONG, left.wait()).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_unknown_operation_is_refused() {
        let refused =
            module(&Operations::default()).subscribe_unbounded("watch", (OperationId(5), false)).await;
        assert!(refused.is_err());
    }
}
