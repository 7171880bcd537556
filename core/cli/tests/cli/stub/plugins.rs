//! The plugins' part: each method answers what it was told to, whatever it is asked.

use jsonrpsee::{
    PendingSubscriptionSink,
    core::{RpcResult, SubscriptionResult, async_trait},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json, value::to_raw_value};
use vm_api::{rpc::PluginsServer, *};

use super::{Daemon, End};

impl Daemon {
    /// Notes a question, and gives the answer there is to it.
    pub(super) fn told<T: DeserializeOwned>(
        &self,
        method: &'static str,
        params: impl Serialize,
    ) -> RpcResult<T> {
        let mut asked = vec![json!(method)];
        asked.extend(json!(params).as_array().cloned().unwrap_or_default());
        self.note(Value::Array(asked));
        match self.answers.ends.get(&(method, "*")) {
            Some(End::Result(value)) => Ok(serde_json::from_value(value.clone()).unwrap()),
            Some(End::Problem(problem)) => Err(problem.clone().into()),
            _ => Err(Problem::new(ErrorKind::NotFound, "there is no such plugin").into()),
        }
    }
}

#[async_trait]
impl PluginsServer for Daemon {
    async fn list(&self) -> RpcResult<Vec<PluginSummary>> {
        self.told("plugin.list", [(); 0])
    }
    async fn get(&self, name: String) -> RpcResult<PluginInfo> {
        self.told("plugin.get", [name])
    }
    async fn inspect(&self, source: String) -> RpcResult<PluginInspection> {
        self.told("plugin.inspect", [source])
    }
    async fn install(&self, params: InstallPlugin) -> RpcResult<PluginInfo> {
        self.told("plugin.install", [params])
    }
    async fn remove(&self, name: String, purge: bool) -> RpcResult<()> {
        self.told("plugin.remove", (name, purge))
    }
    async fn enable(&self, name: String) -> RpcResult<PluginInfo> {
        self.told("plugin.enable", [name])
    }
    async fn disable(&self, name: String) -> RpcResult<PluginInfo> {
        self.told("plugin.disable", [name])
    }
    async fn configure(&self, name: String, config: Value) -> RpcResult<PluginConfigured> {
        self.told("plugin.configure", (name, config))
    }
    async fn verify(&self, name: String) -> RpcResult<Vec<PluginCheck>> {
        self.told("plugin.verify", [name])
    }
    async fn logs(&self, name: String, lines: usize) -> RpcResult<Vec<PluginLogLine>> {
        self.told("plugin.logs", (name, lines))
    }
    async fn logs_follow(
        &self,
        pending: PendingSubscriptionSink,
        name: String,
        lines: usize,
    ) -> SubscriptionResult {
        let sink = pending.accept().await?;
        for line in self.told::<Vec<PluginLogLine>>("plugin.logs_subscribe", (name, lines))? {
            sink.send(to_raw_value(&line)?).await?;
        }
        sink.closed().await;
        Ok(())
    }
    async fn calls(&self, name: String) -> RpcResult<Vec<PluginCall>> {
        self.told("plugin.calls", [name])
    }
    async fn replay(&self, name: String, call: u64) -> RpcResult<PluginReplay> {
        self.told("plugin.replay", (name, call))
    }
    async fn test(&self, source: String) -> RpcResult<Vec<PluginCheck>> {
        self.told("plugin.test", [source])
    }
    async fn order(&self, names: Vec<String>) -> RpcResult<Vec<String>> {
        self.told("plugin.order", [names])
    }
}
