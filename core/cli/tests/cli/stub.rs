//! A daemon that does nothing: it notes what it is asked and answers as it was told to.

mod plugins;
mod workspaces;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use jsonrpsee::{
    Extensions, PendingSubscriptionSink, RpcModule,
    core::{RpcResult, SubscriptionResult, async_trait},
    server::{Server, serve_with_graceful_shutdown, stop_channel},
};
use serde::Serialize;
use serde_json::{Value, json, value::to_raw_value};
use tokio::{net::UnixListener, runtime::Runtime, sync::watch};
use vm_api::{
    rpc::{DaemonServer, EventsServer, OperationServer, PluginsServer, VmServer, WorkspacesServer},
    *,
};

use crate::host::{Host, PATIENCE};

/// What an operation ends with.
#[derive(Clone)]
pub(crate) enum End {
    Result(Value),
    Problem(Problem),
    /// It is at work until it is cancelled.
    Cancelled,
}

/// What it answers.
#[derive(Clone, Default)]
pub(crate) struct Answers {
    pub(crate) vms: Vec<VmInfo>,
    pub(crate) resources: Resources,
    pub(crate) locks: Vec<LockInfo>,
    /// The events it has, and for how many of them each subscription lasts; it goes on if there is no number.
    pub(crate) events: Vec<Event>,
    pub(crate) events_at_once: Option<usize>,
    pub(crate) operations: Vec<OperationInfo>,
    /// How operations end: by method, then by the VM's name, `*` for any; the VM as it is where nothing fits. Methods of plugins
    /// and plans, which are no operations, answer with those for `*`.
    pub(crate) ends: BTreeMap<(&'static str, &'static str), End>,
}

#[derive(Clone)]
struct Daemon {
    answers: Arc<Answers>,
    asked: watch::Sender<Vec<Value>>,
    begun: Arc<Mutex<Vec<(OperationKind, String, End)>>>,
}

/// It, as long as it lives.
pub(crate) struct Stub {
    daemon: Daemon,
    runtime: Option<Runtime>,
}

impl Stub {
    /// Listens where `host`'s `vm` looks for a daemon.
    pub(crate) fn new(host: &Host, answers: Answers) -> Self {
        let daemon =
            Daemon { answers: Arc::new(answers), asked: watch::Sender::default(), begun: Arc::default() };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        std::fs::create_dir_all(host.path("run")).unwrap();
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(host.path("run/vmd.sock")).unwrap()
        };
        runtime.spawn(serve(listener, daemon.methods()));
        Self { daemon, runtime: Some(runtime) }
    }

    /// All that was asked for so far: the method first, then its parameters.
    pub(crate) fn asked(&self) -> Vec<Value> {
        self.daemon.asked.borrow().clone()
    }

    /// The same of one method, each without its name.
    #[track_caller]
    pub(crate) fn asked_for(&self, method: &str) -> Vec<Value> {
        let asked = self.asked().into_iter().filter(|asked| asked[0] == method);
        asked.map(|mut asked| Value::Array(asked.as_array_mut().unwrap().split_off(1))).collect()
    }

    /// Waits until it was asked for this so many times.
    #[track_caller]
    pub(crate) fn wait_for(&self, method: &str, times: usize) {
        let mut asked = self.daemon.asked.subscribe();
        let enough = |asked: &Vec<Value>| asked.iter().filter(|asked| asked[0] == method).count() >= times;
        let runtime = self.runtime.as_ref().unwrap();
        let waited = runtime.block_on(async {
            tokio::time::timeout(PATIENCE, asked.wait_for(enough)).await.map(|asked| asked.is_ok())
        });
        assert_eq!(waited, Ok(true), "{method} was not asked for: {:?}", self.asked());
    }

    /// Ends it, and all its connections.
    pub(crate) fn end(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.end();
    }
}

async fn serve(listener: UnixListener, methods: RpcModule<()>) {
    let (stop, _server) = stop_channel();
    let builder = Server::builder().to_service_builder();
    while let Ok((stream, _)) = listener.accept().await {
        let service = builder.clone().build(methods.clone(), stop.clone());
        tokio::spawn(serve_with_graceful_shutdown(stream, service, stop.clone().shutdown()));
    }
}

impl Daemon {
    fn methods(&self) -> RpcModule<()> {
        let mut module = RpcModule::new(());
        module.merge(VmServer::into_rpc(self.clone())).unwrap();
        module.merge(OperationServer::into_rpc(self.clone())).unwrap();
        module.merge(DaemonServer::into_rpc(self.clone())).unwrap();
        module.merge(EventsServer::into_rpc(self.clone())).unwrap();
        module.merge(PluginsServer::into_rpc(self.clone())).unwrap();
        module.merge(WorkspacesServer::into_rpc(self.clone())).unwrap();
        module
    }

    fn note(&self, asked: Value) {
        self.asked.send_modify(|list| list.push(asked));
    }

    fn find(&self, vm: &str) -> Option<&VmInfo> {
        self.answers.vms.iter().find(|info| info.name.as_str() == vm || info.id.as_str() == vm)
    }

    fn begin(
        &self,
        kind: OperationKind,
        method: &'static str,
        vm: &str,
        params: impl Serialize,
    ) -> RpcResult<Begun> {
        self.note(json!([method, vm, params]));
        let found = self.find(vm);
        let name = found.map_or("*", |info| info.name.as_str());
        let ends = &self.answers.ends;
        let told = ends.iter().find(|((m, vm), _)| *m == method && (*vm == name || *vm == "*"));
        let end = match (told, found) {
            (Some((_, end)), _) => end.clone(),
            (None, Some(info)) => End::Result(json!(info)),
            (None, None) => return Err(no_vm(vm).into()),
        };
        let mut begun = self.begun.lock().unwrap();
        begun.push((kind, name.to_owned(), end));
        Ok(Begun { operation: OperationId(begun.len() as u64) })
    }

    fn operation(&self, id: OperationId, cancelled: bool) -> RpcResult<OperationInfo> {
        let begun = self.begun.lock().unwrap();
        let Some((kind, subject, end)) =
            usize::try_from(id.0).ok().and_then(|n| begun.get(n.checked_sub(1)?))
        else {
            let known = self.answers.operations.iter().find(|operation| operation.id == id);
            let mut operation = known
                .cloned()
                .ok_or_else(|| Problem::new(ErrorKind::NotFound, format!("there is no operation {id}")))?;
            if cancelled && matches!(operation.status, OperationStatus::Running { .. }) {
                let error = Problem::new(ErrorKind::Cancelled, "cancelled");
                operation.status = OperationStatus::Failed { error };
            }
            return Ok(operation);
        };
        let status = match end {
            End::Result(result) => OperationStatus::Succeeded { result: result.clone() },
            End::Problem(error) => OperationStatus::Failed { error: error.clone() },
            End::Cancelled if cancelled => {
                OperationStatus::Failed { error: Problem::new(ErrorKind::Cancelled, "cancelled") }
            }
            End::Cancelled => OperationStatus::Running { progress: OperationProgress::default() },
        };
        Ok(OperationInfo { id, kind: *kind, subject: subject.clone(), begun_at: 0, ended_at: None, status })
    }

    fn is_cancelled(&self, id: OperationId) -> bool {
        self.asked.borrow().contains(&json!(["operation.cancel", id]))
    }
}

fn no_vm(vm: &str) -> Problem {
    Problem::new(ErrorKind::NotFound, format!("there is no VM {vm}")).hint("`vm ls` lists them")
}

#[async_trait]
impl VmServer for Daemon {
    async fn create(&self, _: &Extensions, params: CreateVm) -> RpcResult<Begun> {
        self.begin(OperationKind::VmCreate, "vm.create", "*", params)
    }
    async fn start(&self, vm: String) -> RpcResult<Begun> {
        self.begin(OperationKind::VmStart, "vm.start", &vm, ())
    }
    async fn stop(&self, vm: String, params: StopVm) -> RpcResult<Begun> {
        self.begin(OperationKind::VmStop, "vm.stop", &vm, params)
    }
    async fn kill(&self, vm: String) -> RpcResult<Begun> {
        self.begin(OperationKind::VmKill, "vm.kill", &vm, ())
    }
    async fn restart(&self, vm: String, params: StopVm) -> RpcResult<Begun> {
        self.begin(OperationKind::VmRestart, "vm.restart", &vm, params)
    }
    async fn pause(&self, vm: String) -> RpcResult<Begun> {
        self.begin(OperationKind::VmPause, "vm.pause", &vm, ())
    }
    async fn resume(&self, vm: String) -> RpcResult<Begun> {
        self.begin(OperationKind::VmResume, "vm.resume", &vm, ())
    }
    async fn set(&self, vm: String, params: SetVm) -> RpcResult<Begun> {
        self.begin(OperationKind::VmSet, "vm.set", &vm, params)
    }
    async fn prune(&self, params: PruneVms) -> RpcResult<Begun> {
        self.begin(OperationKind::VmPrune, "vm.prune", "*", params)
    }
    async fn delete(&self, vm: String, force: bool) -> RpcResult<Begun> {
        self.begin(OperationKind::VmDelete, "vm.delete", &vm, force)
    }
    async fn list(&self) -> RpcResult<VmList> {
        Ok(self.answers.vms.clone().into())
    }
    async fn get(&self, vm: String) -> RpcResult<VmInfo> {
        Ok(self.find(&vm).cloned().ok_or_else(|| no_vm(&vm))?)
    }
    async fn plan(&self, vm: String) -> RpcResult<VmPlan> {
        self.told("vm.plan", [vm])
    }
    async fn plan_create(&self, params: CreateVm) -> RpcResult<VmPlan> {
        self.told("vm.plan_create", [params])
    }
    async fn access(&self, vm: String) -> RpcResult<GuestAccess> {
        Err(no_vm(&vm).into())
    }
    async fn console(&self, vm: String, _: u64) -> RpcResult<ConsoleChunk> {
        Err(no_vm(&vm).into())
    }
    async fn console_follow(
        &self,
        pending: PendingSubscriptionSink,
        vm: String,
        _: u64,
    ) -> SubscriptionResult {
        pending.reject(no_vm(&vm)).await;
        Ok(())
    }
}

#[async_trait]
impl OperationServer for Daemon {
    async fn list(&self) -> RpcResult<Vec<OperationInfo>> {
        Ok(self.answers.operations.clone())
    }
    async fn get(&self, id: OperationId) -> RpcResult<OperationInfo> {
        self.operation(id, self.is_cancelled(id))
    }
    async fn cancel(&self, id: OperationId) -> RpcResult<()> {
        self.note(json!(["operation.cancel", id]));
        Ok(())
    }
    async fn output(&self, pending: PendingSubscriptionSink, _: OperationId) -> SubscriptionResult {
        // None of these says anything.
        drop(pending.accept().await?);
        Ok(())
    }
    async fn watch(
        &self,
        pending: PendingSubscriptionSink,
        id: OperationId,
        cancel_on_close: Option<bool>,
    ) -> SubscriptionResult {
        let sink = pending.accept().await?;
        self.note(json!(["operation.watch", id, cancel_on_close]));
        let progress = OperationProgress { stage: "at work".to_owned(), ..Default::default() };
        let at_work = self.operation(id, false)?;
        let running = OperationInfo { status: OperationStatus::Running { progress }, ..at_work };
        sink.send(to_raw_value(&running)?).await?;
        let mut asked = self.asked.subscribe();
        loop {
            asked.mark_unchanged();
            let operation = self.operation(id, self.is_cancelled(id))?;
            if !matches!(operation.status, OperationStatus::Running { .. }) {
                sink.send(to_raw_value(&operation)?).await?;
                return Ok(());
            }
            // Cancel-safe: a change that is not awaited to its end is seen by the next look.
            tokio::select! {
                () = sink.closed() => break,
                changed = asked.changed() => changed?,
            }
        }
        self.note(json!(["closed", id]));
        Ok(())
    }
}

#[async_trait]
impl DaemonServer for Daemon {
    async fn status(&self) -> RpcResult<DaemonStatus> {
        Ok(DaemonStatus {
            version: "1.2.3".to_owned(),
            api_version: API_VERSION.to_owned(),
            pid: std::process::id(),
            started_at: 0,
            instance: "3f2a".to_owned(),
            run_dir: "/run/vmd".into(),
            state_dir: "/var/lib/vmd".into(),
            config_file: "/etc/vmd/config.toml".into(),
            vms: self.answers.vms.len(),
            running: 0,
            resources: self.answers.resources.clone(),
        })
    }
    async fn locks(&self) -> RpcResult<Vec<LockInfo>> {
        Ok(self.answers.locks.clone())
    }
    async fn stop(&self) -> RpcResult<()> {
        Ok(())
    }
    async fn doctor(&self) -> RpcResult<Vec<Finding>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl EventsServer for Daemon {
    async fn list(&self, after: u64) -> RpcResult<Vec<Event>> {
        self.note(json!(["event.list", after]));
        Ok(self.answers.events.iter().filter(|event| event.sequence > after).cloned().collect())
    }
    async fn follow(&self, pending: PendingSubscriptionSink, after: u64) -> SubscriptionResult {
        let sink = pending.accept().await?;
        self.note(json!(["event.subscribe", after]));
        let mut left = self.answers.events_at_once;
        for event in self.answers.events.iter().filter(|event| event.sequence > after) {
            if left == Some(0) {
                return Err("you are too slow".into());
            }
            left = left.map(|left| left - 1);
            sink.send(to_raw_value(event)?).await?;
        }
        self.note(json!(["all events sent"]));
        sink.closed().await;
        Ok(())
    }
}
