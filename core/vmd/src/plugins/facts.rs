//! What hooks may know of the host: this list and nothing else.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use vm_store::Store;

/// How long the subnet that was found is believed in: a start calls many hooks.
const FRESH: Duration = Duration::from_secs(1);

type Map = Arc<BTreeMap<String, String>>;

/// Facts of the host.
#[derive(Debug)]
pub(crate) struct Facts {
    fixed: BTreeMap<String, String>,
    store: Store,
    last: Mutex<Option<(Instant, Map)>>,
}

impl Facts {
    /// `subnet` is the configuration's; without one it is what the daemon has chosen, as soon as it has.
    pub(crate) fn new(store: Store, vmm: &str, subnet: Option<Ipv4Net>) -> Self {
        let mut fixed = BTreeMap::new();
        let mut know = |name: &str, value: String| _ = fixed.insert(name.to_owned(), value);
        if let Ok(cpus) = std::thread::available_parallelism() {
            know("cpu.count", cpus.to_string());
        }
        if let Some(bytes) = memory() {
            know("memory.total-bytes", bytes.to_string());
        }
        if let Ok(release) = std::fs::read_to_string("/proc/sys/kernel/osrelease") {
            know("kernel.release", release.trim().to_owned());
        }
        know("architecture", std::env::consts::ARCH.to_owned());
        know("vmm.kind", vmm.to_owned());
        know("vmd.version", env!("CARGO_PKG_VERSION").to_owned());
        if let Some(subnet) = subnet {
            know("bridge.subnet", subnet.to_string());
        }
        Self { fixed, store, last: Mutex::default() }
    }

    /// As they are now.
    pub(crate) async fn now(&self) -> Map {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((at, facts)) = last
            && (at.elapsed() < FRESH || self.fixed.contains_key("bridge.subnet"))
        {
            return facts;
        }
        let mut facts = self.fixed.clone();
        match self.store.meta().get(vm_store::meta::SUBNET).await {
            Ok(Some(subnet)) => _ = facts.entry("bridge.subnet".to_owned()).or_insert(subnet),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "plugins are not told the subnet"),
        }
        let facts = Arc::new(facts);
        // One that is not chosen yet may be at any moment.
        if facts.contains_key("bridge.subnet") {
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), facts.clone()));
        }
        facts
    }
}

fn memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_subnet_is_told_as_soon_as_it_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let facts = Facts::new(store.clone(), "fake", None);
        let now = facts.now().await;
        assert!(now["memory.total-bytes"].parse::<u64>().unwrap() > 1 << 20);
        assert!(!now.contains_key("bridge.subnet"));
        store.meta().set(vm_store::meta::SUBNET, "10.1.0.0/24").await.unwrap();
        assert_eq!(facts.now().await["bridge.subnet"], "10.1.0.0/24");
        let fixed = Facts::new(store, "fake", Some("10.2.0.0/24".parse().unwrap()));
        assert_eq!(fixed.now().await["bridge.subnet"], "10.2.0.0/24");
    }
}
