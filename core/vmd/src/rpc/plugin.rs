//! Namespace `plugin`.

use jsonrpsee::{
    PendingSubscriptionSink,
    core::{RpcResult, SubscriptionResult, async_trait},
    types::ErrorObjectOwned,
};
use serde_json::{Value, value::to_raw_value};
use tokio::sync::broadcast::error::RecvError;
use vm_api::{
    InstallPlugin, PluginCall, PluginCheck, PluginConfigured, PluginInfo, PluginInspection, PluginLogLine,
    PluginReplay, PluginSummary, rpc::PluginsServer,
};

use super::server::Context;
use crate::{
    plugins::{self, PluginsError},
    problem,
};

/// An error of the plugins' manager as the wire has it.
fn wire(error: PluginsError) -> ErrorObjectOwned {
    problem::plugins(&error).into()
}

#[async_trait]
impl PluginsServer for Context {
    async fn list(&self) -> RpcResult<Vec<PluginSummary>> {
        Ok(self.plugins.list())
    }

    async fn get(&self, name: String) -> RpcResult<PluginInfo> {
        Ok(self.plugins.info(&name).await.map_err(wire)?)
    }

    async fn inspect(&self, source: String) -> RpcResult<PluginInspection> {
        Ok(self.plugins.inspect(&source).await.map_err(wire)?)
    }

    async fn install(&self, params: InstallPlugin) -> RpcResult<PluginInfo> {
        let entry = self.plugins.install(params).await.map_err(wire)?;
        self.get(entry.record.name.clone()).await
    }

    async fn remove(&self, name: String, purge: bool) -> RpcResult<()> {
        Ok(self.remove_plugin(&name, purge).await.map_err(wire)?)
    }

    async fn enable(&self, name: String) -> RpcResult<PluginInfo> {
        self.plugins.set_enabled(&name, true).await.map_err(wire)?;
        self.get(name).await
    }

    async fn disable(&self, name: String) -> RpcResult<PluginInfo> {
        self.plugins.set_enabled(&name, false).await.map_err(wire)?;
        self.get(name).await
    }

    async fn configure(&self, name: String, config: Value) -> RpcResult<PluginConfigured> {
        Ok(self.configure_plugin(&name, config).await.map_err(wire)?)
    }

    async fn verify(&self, name: String) -> RpcResult<Vec<PluginCheck>> {
        Ok(self.plugins.verify(&name).await.map_err(wire)?)
    }

    async fn logs(&self, name: String, lines: usize) -> RpcResult<Vec<PluginLogLine>> {
        let log = self.plugins.log(&name).map_err(wire)?.lines();
        Ok(log.iter().skip(log.len().saturating_sub(lines)).map(plugins::line).collect())
    }

    async fn logs_follow(
        &self,
        pending: PendingSubscriptionSink,
        name: String,
        lines: usize,
    ) -> SubscriptionResult {
        let log = match self.plugins.log(&name) {
            Ok(log) => log,
            Err(error) => {
                pending.reject(wire(error)).await;
                return Ok(());
            }
        };
        let (before, mut news) = log.follow();
        let mut changes = self.plugins.changes();
        let sink = pending.accept().await?;
        for logged in before.iter().skip(before.len().saturating_sub(lines)) {
            sink.send(to_raw_value(&plugins::line(logged))?).await?;
        }
        loop {
            // Cancel-safe: a message that is not taken here is the next one that is.
            let logged = tokio::select! {
                () = sink.closed() => return Ok(()),
                logged = news.recv() => logged,
                _ = changes.changed() => match self.plugins.log(&name) {
                    Ok(_) => continue,
                    Err(_) => {
                        // It is gone; its last words may still be here.
                        while let Ok(logged) = news.try_recv() {
                            sink.send(to_raw_value(&plugins::line(&logged))?).await?;
                        }
                        // Only an error ends the stream for the client, too.
                        return Err(format!("plugin {name} was removed").into());
                    }
                },
            };
            match logged {
                Ok(logged) => sink.send(to_raw_value(&plugins::line(&logged))?).await?,
                // A client that cannot follow misses what it was too slow for.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Err(format!("plugin {name} has no log any more").into()),
            }
        }
    }

    async fn calls(&self, name: String) -> RpcResult<Vec<PluginCall>> {
        Ok(self.plugins.calls(&name).map_err(wire)?)
    }

    async fn replay(&self, name: String, call: u64) -> RpcResult<PluginReplay> {
        Ok(self.plugins.replay(&name, call).await.map_err(wire)?)
    }

    async fn test(&self, source: String) -> RpcResult<Vec<PluginCheck>> {
        Ok(self.plugins.test(&source).await.map_err(wire)?)
    }

    async fn order(&self, names: Vec<String>) -> RpcResult<Vec<String>> {
        Ok(self.plugins.order(names).await.map_err(wire)?)
    }
}
