//! Namespace `event`.

use jsonrpsee::{
    PendingSubscriptionSink,
    core::{RpcResult, SubscriptionResult, async_trait},
};
use vm_api::{Event, rpc::EventsServer};
use vm_engine::events::EventLog;

use super::server::Context;

#[async_trait]
impl EventsServer for Context {
    async fn list(&self, after: u64) -> RpcResult<Vec<Event>> {
        Ok(self.engine.events().list(after))
    }

    async fn follow(&self, pending: PendingSubscriptionSink, after: u64) -> SubscriptionResult {
        follow(pending, self.engine.events(), after).await
    }
}

async fn follow(pending: PendingSubscriptionSink, log: &EventLog, after: u64) -> SubscriptionResult {
    let mut follower = log.follow(after);
    let sink = pending.accept().await?;
    loop {
        // Cancel-safe: an event that is not handed out here is the next one that is.
        let event = tokio::select! {
            () = sink.closed() => return Ok(()),
            event = follower.next() => event,
        };
        // A client that does not read holds up nobody: it falls behind, and is told so.
        sink.send(serde_json::value::to_raw_value(&event)?).await?;
    }
}

#[cfg(test)]
mod tests {
    use jsonrpsee::RpcModule;
    use vm_types::EventKind;

    use super::*;

    #[tokio::test]
    async fn a_client_gets_what_was_and_what_comes() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::open(&dir.path().join("events.jsonl"));
        let record = |message: &str| log.record(EventKind::VmStarted, None, None, message);
        record("one");
        record("two");
        let mut module = RpcModule::new(log.clone());
        module
            .register_subscription(
                "subscribe",
                "happened",
                "unsubscribe",
                |params, pending, log, _| async move { follow(pending, &log, params.one()?).await },
            )
            .unwrap();
        let mut subscription = module.subscribe_unbounded("subscribe", [1]).await.unwrap();
        let mut next = async || subscription.next::<Event>().await.unwrap().unwrap().0.message;
        assert_eq!(next().await, "two");
        record("three");
        assert_eq!(next().await, "three");
    }
}
