//! The daemon's network as a whole: subnet, bridge, firewall, forwarding. Made when the first VM needs it, kept while the daemon
//! lives, taken down when it ends and no VM is up.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use vm_types::{Effect, vm::NetworkMode};

use crate::{Engine, EngineError, engine::SubnetChoice, journal::Phase};

/// Not made, or made.
#[derive(Debug, Default)]
pub(crate) struct State {
    network: Option<Network>,
}

/// The network as a VM sees it.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    pub(crate) subnet: Ipv4Net,
    pub(crate) gateway: Ipv4Addr,
    pub(crate) resolvers: Vec<IpAddr>,
    /// The uplink's, where it is smaller than the usual one: a guest that sends larger packets would lose them.
    pub(crate) mtu: Option<u32>,
}

impl Engine {
    /// The subnet: fixed by the configuration, or chosen once and kept as long as nothing clashes with it.
    pub(crate) async fn subnet(&self) -> Result<Ipv4Net, EngineError> {
        let inner = &self.inner;
        let bridge = vm_net::names::bridge_name(&inner.instance);
        let meta = inner.store.meta();
        if let SubnetChoice::Fixed(subnet) = inner.settings.subnet {
            inner.host.net.check_subnet(subnet, &bridge).await?;
            return Ok(subnet);
        }
        if let Some(kept) = meta.get(vm_store::meta::SUBNET).await?.and_then(|text| text.parse().ok()) {
            match inner.host.net.check_subnet(kept, &bridge).await {
                Ok(()) => return Ok(kept),
                // VMs have addresses in it: moving them would break what they are known by.
                Err(error) if !inner.store.vms().addresses_in_use().await?.is_empty() => {
                    return Err(error.into());
                }
                Err(error) => tracing::info!(%error, "choosing another subnet"),
            }
        }
        let candidates = vm_net::subnet::candidates();
        let subnet = vm_net::pick_subnet(inner.host.net.as_ref(), &candidates, &bridge).await?;
        meta.set(vm_store::meta::SUBNET, &subnet.to_string()).await?;
        Ok(subnet)
    }

    /// An address no VM has. The caller holds the create lock until it is written down.
    pub(crate) async fn free_address(&self) -> Result<Ipv4Addr, EngineError> {
        let subnet = self.subnet().await?;
        let exhausted = || EngineError::AddressesExhausted { subnet: subnet.to_string() };
        let gateway = vm_net::addresses::gateway(subnet).ok_or_else(exhausted)?;
        let taken = self.inner.store.vms().addresses_in_use().await?;
        vm_net::addresses::next_free(subnet, gateway, &taken).ok_or_else(exhausted)
    }

    /// Bridge, firewall and forwarding, made if they are not there.
    pub(crate) async fn ensure_network(&self) -> Result<Network, EngineError> {
        let mut state = self.inner.network.lock().await;
        if let Some(network) = &state.network {
            return Ok(network.clone());
        }
        let inner = &self.inner;
        let subnet = self.subnet().await?;
        let exhausted = || EngineError::AddressesExhausted { subnet: subnet.to_string() };
        let gateway = vm_net::addresses::gateway(subnet).ok_or_else(exhausted)?;
        let bridge = vm_net::names::bridge_name(&inner.instance);
        let address = Ipv4Net::new(gateway, subnet.prefix_len()).map_err(|_| exhausted())?;
        let effects = [
            Effect::Bridge { name: bridge.clone(), address },
            Effect::Firewall { table: vm_net::names::table_name(&inner.instance), bridge, subnet },
            Effect::Sysctl { key: "net/ipv4/ip_forward".into(), value: "1".into() },
        ];
        for effect in effects {
            inner.host_scope.apply(effect, Phase::Host).await?;
        }
        let resolvers = if inner.settings.resolvers.is_empty() {
            vm_net::resolvers()?.into_iter().map(IpAddr::V4).collect()
        } else {
            inner.settings.resolvers.clone()
        };
        let mtu = inner.host.net.guest_mtu().await?;
        let network = Network { subnet, gateway, resolvers, mtu };
        state.network = Some(network.clone());
        Ok(network)
    }

    /// Takes the network down unless a VM that is up uses it.
    pub(crate) async fn release_network(&self) -> Result<(), EngineError> {
        let mut state = self.inner.network.lock().await;
        let used = self
            .all()
            .iter()
            .any(|cell| cell.live().is_some() && cell.record().spec.network == NetworkMode::Nat);
        if used {
            return Ok(());
        }
        state.network = None;
        self.inner.host_scope.unwind(Phase::Host).await
    }

    /// Whatever the former daemon or the former boot left: undone, unless VMs that live stand on it.
    pub(crate) async fn recover_network(&self) {
        // Applied in this boot, the effects are still there and `ensure_network` finds them in the journal.
        if !self.inner.host_scope.has_stale(Phase::Host).await {
            return;
        }
        if let Err(error) = self.inner.host_scope.unwind(Phase::Host).await {
            tracing::warn!(error = %error.chain(), "leftovers of a former network");
        }
    }
}
