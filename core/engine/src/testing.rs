//! An engine over fakes of the host, and VMs of it that nobody else finds.

use std::{sync::Arc, time::Duration};

use vm_disk::FakeCow;
use vm_net::FakeNet;
use vm_types::{
    Layout, VmId,
    vm::{NetworkMode, VmRecord, VmSpec},
};

use crate::{
    Engine, Parts, Settings, SubnetChoice,
    effects::{FakeShims, Host},
    ports::{Hooks, Names, NoImporters, NoNames},
    vm::cell::Cell,
};

pub(crate) struct Bench {
    pub(crate) _dir: tempfile::TempDir,
    pub(crate) net: Arc<FakeNet>,
    pub(crate) cow: Arc<FakeCow>,
    pub(crate) engine: Engine,
}

impl Bench {
    pub(crate) async fn new(hooks: Arc<dyn Hooks>, tap_pool: usize) -> Self {
        Self::over(hooks, tap_pool, FakeCow::new()).await
    }

    pub(crate) async fn over(hooks: Arc<dyn Hooks>, tap_pool: usize, cow: FakeCow) -> Self {
        Self::with(hooks, tap_pool, cow, Arc::new(NoNames)).await
    }

    pub(crate) async fn with(
        hooks: Arc<dyn Hooks>,
        tap_pool: usize,
        cow: FakeCow,
        names: Arc<dyn Names>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let layout = Layout { run: root.join("run"), state: root.join("state"), config: root.join("config") };
        std::fs::create_dir_all(&layout.state).unwrap();
        let agent = root.join("agent");
        std::fs::write(&agent, "agent").unwrap();
        let net = Arc::new(FakeNet::new());
        let runner = Arc::new(vm_host::HostRunner);
        let (cow, shims) = (Arc::new(cow), Arc::new(FakeShims::new()));
        let host = Host::new(net.clone(), cow.clone(), shims, [root.to_owned()], runner.clone());
        let settings = Settings {
            default_image: "debian:bookworm".into(),
            default_cpus: 1,
            default_memory_mib: 128,
            default_disk_bytes: 1 << 20,
            default_disk_limits: Default::default(),
            registries: Default::default(),
            start_timeout: Duration::from_secs(10),
            stop_grace: Duration::from_secs(1),
            console_log_bytes: 1 << 16,
            subnet: SubnetChoice::Auto,
            resolvers: vec!["192.0.2.53".parse().unwrap()],
            tap_pool,
            socket_group: None,
            agent,
            limits: Default::default(),
        };
        let store = vm_store::Store::open(&layout.database()).unwrap();
        let vmm = vm_vmm::Vmms::only(vm_vmm::FakeDriver::new("/nonexistent", []));
        let importers = Arc::new(NoImporters);
        let parts = Parts { layout, settings, store, host, vmm, runner, hooks, importers, names };
        Self { _dir: dir, net, cow, engine: Engine::start(parts).await.unwrap() }
    }

    /// A VM that is off and has no address.
    pub(crate) fn cell(&self, number: u32) -> Arc<Cell> {
        let id: VmId = format!("{number:012x}").parse().unwrap();
        let digest = format!("sha256:{}", "1".repeat(64));
        let spec = VmSpec {
            name: format!("vm-{number}").parse().unwrap(),
            image_reference: "debian:bookworm".into(),
            image: digest.parse().unwrap(),
            kernel: "0123456789ab".parse().unwrap(),
            cpus: 1,
            memory_mib: 128,
            disk_bytes: 1 << 20,
            disk_limits: Default::default(),
            network: NetworkMode::Nat,
            labels: Default::default(),
            owner: None,
            restart: Default::default(),
            idle_stop_seconds: None,
            expires_at: None,
            vmm: None,
        };
        let record = VmRecord {
            id,
            spec,
            address: None,
            created_at: 1,
            complete: true,
            wanted_running: false,
            failure: None,
        };
        self.engine.new_cell(record).unwrap()
    }
}
