//! The daemon's network as a whole: subnet, bridge, firewall, forwarding. Made when the first VM needs it, looked after at each
//! start, taken down when the daemon ends and no VM is up.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::Ipv4Net;
use vm_locks::{Ctx, Unlocked};
use vm_types::Effect;

use crate::{
    Engine, EngineError,
    engine::SubnetChoice,
    journal::{Entry, Phase},
    vm::cell::Cell,
};

/// The name service's port (RFC 1035, section 4.2).
const DNS: u16 = 53;

/// The network as a VM sees it.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    pub(crate) subnet: Ipv4Net,
    pub(crate) gateway: Ipv4Addr,
    pub(crate) resolvers: Vec<IpAddr>,
    /// Domains that guests may leave out.
    pub(crate) search: Vec<String>,
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
                Err(error) => tracing::info!(%error, "choosing another subnet"),
            }
        }
        let candidates = vm_net::subnet::candidates();
        let subnet = vm_net::pick_subnet(inner.host.net.as_ref(), &candidates, &bridge).await?;
        meta.set(vm_store::meta::SUBNET, &subnet.to_string()).await?;
        Ok(subnet)
    }

    /// The address that a new VM would get now, without deciding anything.
    pub(crate) async fn next_address(&self) -> Result<Ipv4Addr, EngineError> {
        let inner = &self.inner;
        let subnet = match (inner.settings.subnet, self.chosen_subnet().await?) {
            (SubnetChoice::Fixed(subnet), _) | (SubnetChoice::Auto, Some(subnet)) => subnet,
            (SubnetChoice::Auto, None) => {
                let bridge = vm_net::names::bridge_name(&inner.instance);
                vm_net::pick_subnet(inner.host.net.as_ref(), &vm_net::subnet::candidates(), &bridge).await?
            }
        };
        let taken = self.each_address(|_, address| address);
        vm_net::addresses::next_free(subnet, gateway(subnet)?, &taken).ok_or_else(|| exhausted(subnet))
    }

    /// An address no VM has. The caller holds the create lock until it is written down.
    pub(crate) async fn free_address(&self) -> Result<Ipv4Addr, EngineError> {
        let subnet = self.subnet().await?;
        let gateway = gateway(subnet)?;
        // All are here: a VM is published under the create lock too.
        let taken = self.each_address(|_, address| address);
        vm_net::addresses::next_free(subnet, gateway, &taken).ok_or_else(|| exhausted(subnet))
    }

    /// Gives a VM that is off another address if the subnet is no longer the one it was made in.
    pub(crate) async fn move_into(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        subnet: Ipv4Net,
    ) -> Result<(), EngineError> {
        if cell.record().address.is_none_or(|address| subnet.contains(&address)) {
            return Ok(());
        }
        let mut held = cell.lock(ctx).await;
        let (writer, ctx) = held.split();
        let _names = ctx.lock(&self.inner.create).await;
        let address = self.free_address().await?;
        self.inner.store.vms().set_address(cell.id(), Some(address)).await?;
        tracing::info!(vm = %cell.name(), %address, "moved to the subnet that is now the daemon's");
        writer.change_record(|record| record.address = Some(address));
        Ok(())
    }

    /// Bridge, firewall and forwarding: looked at, and made where they are not there or not as they should be.
    pub(crate) async fn ensure_network(&self, ctx: &mut Ctx<Unlocked>) -> Result<Network, EngineError> {
        let inner = &self.inner;
        let mut one_at_a_time = ctx.lock(&inner.network).await;
        let ctx = one_at_a_time.ctx();
        let subnet = self.subnet().await?;
        let stranded = self.all().into_iter().find(|cell| {
            cell.live().is_some() && cell.record().address.is_some_and(|address| !subnet.contains(&address))
        });
        if let Some(cell) = stranded {
            return Err(EngineError::InvalidArgument {
                message: format!(
                    "the subnet is now {subnet}, but VM {} still runs in the former one",
                    cell.name()
                ),
                hint: format!("stop it first (`vm stop {}`), or put network.subnet back", cell.name()),
            });
        }
        let gateway = gateway(subnet)?;
        let bridge = vm_net::names::bridge_name(&inner.instance);
        let address = Ipv4Net::new(gateway, subnet.prefix_len()).map_err(|_| exhausted(subnet))?;
        let effects = [
            Effect::Bridge { name: bridge.clone(), address },
            Effect::Firewall {
                table: vm_net::names::table_name(&inner.instance),
                bridge: bridge.clone(),
                subnet,
            },
        ];
        let in_place = async {
            for effect in effects {
                inner.host_scope.apply(ctx, effect, Phase::Host).await?;
            }
            Ok::<_, EngineError>(())
        };
        // Cancel-safe: effects go on in tasks of their own.
        let (in_place, mtu) = tokio::join!(in_place, inner.host.net.guest_mtu());
        in_place?;
        let (resolvers, search) = match inner.names.bridge_up(gateway, subnet).await {
            Some(served) => {
                self.tell_host_of_names(ctx, bridge, gateway).await;
                (served.servers, served.search)
            }
            None if inner.settings.resolvers.is_empty() => {
                (vm_net::resolvers()?.into_iter().map(IpAddr::V4).collect(), Vec::new())
            }
            None => (inner.settings.resolvers.clone(), Vec::new()),
        };
        Ok(Network { subnet, gateway, resolvers, search, mtu: mtu? })
    }

    /// Has the host's own resolver know the domains that there are now, where the bridge is up: they change with the plugins,
    /// and the bridge stays.
    pub async fn domains_changed(&self) {
        let engine = self.clone();
        let tell = async move |mut ctx: Ctx<Unlocked>| {
            let mut one_at_a_time = ctx.lock(&engine.inner.network).await;
            let up = |entries: &[Entry]| {
                entries.iter().find_map(|entry| match &entry.effect {
                    Effect::Bridge { name, address } => Some((name.clone(), *address)),
                    _ => None,
                })
            };
            let ctx = one_at_a_time.ctx();
            let Some((bridge, address)) = engine.inner.host_scope.look(ctx, up).await else { return };
            if engine.inner.names.bridge_up(address.addr(), address.trunc()).await.is_some() {
                engine.tell_host_of_names(ctx, bridge, address.addr()).await;
            }
        };
        self.locks().root("domains of VMs", tell).await;
    }

    /// Has the host's own resolver ask our name service about our domains, and about no others. A host where that fails works
    /// without.
    async fn tell_host_of_names<L: vm_locks::Level>(
        &self,
        ctx: &mut Ctx<L>,
        bridge: String,
        gateway: Ipv4Addr,
    ) where
        vm_locks::Journal: vm_locks::LockAfter<L>,
    {
        let scope = &self.inner.host_scope;
        let server = SocketAddr::new(gateway.into(), DNS);
        let effect = Effect::LinkDns { link: bridge, server, domains: self.inner.names.domains() };
        let unlike = |entries: &[Entry]| {
            entries.iter().any(|entry| entry.effect.id() == effect.id() && entry.effect != effect)
        };
        let told = async {
            // What was told before of this link would stay, for it is the same effect.
            if scope.look(ctx, unlike).await {
                scope.unwind_these(ctx, &[effect.id()]).await?;
            }
            if !matches!(&effect, Effect::LinkDns { domains, .. } if domains.is_empty()) {
                scope.apply(ctx, effect.clone(), Phase::Host).await?;
            }
            Ok::<_, EngineError>(())
        };
        if let Err(error) = told.await {
            tracing::warn!(error = %error.chain(), "the host's resolver was not told of the VMs' names");
        }
    }

    /// Takes the network down unless a VM that is up, or may be, stands on it.
    pub(crate) async fn release_network(&self, ctx: &mut Ctx<Unlocked>) -> Result<(), EngineError> {
        let ready = self.close_taps(ctx).await;
        {
            let mut one_at_a_time = ctx.lock(&self.inner.network).await;
            if !self.all().iter().any(|cell| cell.live().is_some() && cell.record().address.is_some()) {
                self.inner.names.bridge_down().await;
                return self.inner.host_scope.unwind(one_at_a_time.ctx(), Phase::Host).await;
            }
        }
        self.reopen_taps(ctx, ready).await;
        Ok(())
    }
}

fn gateway(subnet: Ipv4Net) -> Result<Ipv4Addr, EngineError> {
    vm_net::addresses::gateway(subnet).ok_or_else(|| exhausted(subnet))
}

fn exhausted(subnet: Ipv4Net) -> EngineError {
    EngineError::AddressesExhausted { subnet: subnet.to_string() }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use vm_disk::FakeCow;

    use super::*;
    use crate::{
        ports::{GuestNames, Names, NoHooks},
        testing::Bench,
    };

    /// A name service with these domains that can listen or not.
    #[derive(Debug)]
    struct Zones(Mutex<Vec<String>>, bool);

    #[async_trait]
    impl Names for Zones {
        async fn bridge_up(&self, gateway: Ipv4Addr, _: Ipv4Net) -> Option<GuestNames> {
            self.1.then(|| GuestNames { servers: vec![gateway.into()], search: self.domains() })
        }
        fn domains(&self) -> Vec<String> {
            self.0.lock().unwrap().clone()
        }
        async fn bridge_down(&self) {}
    }

    async fn bench(listens: bool) -> (Bench, Arc<Zones>) {
        let zones = Arc::new(Zones(Mutex::default(), listens));
        (Bench::with(Arc::new(NoHooks), 0, FakeCow::new(), zones.clone()).await, zones)
    }

    /// What the host's resolver has been told.
    fn told(bench: &Bench) -> Vec<Vec<String>> {
        let domains = |effect| match effect {
            Effect::LinkDns { domains, .. } => Some(domains),
            _ => None,
        };
        bench.net.effects().into_iter().filter_map(domains).collect()
    }

    async fn change(bench: &Bench, zones: &Zones, domains: &[&str]) {
        *zones.0.lock().unwrap() = domains.iter().map(|&domain| domain.to_owned()).collect();
        bench.engine.domains_changed().await;
    }

    async fn up(bench: &Bench) {
        let locks = bench.engine.locks();
        locks
            .root("test", async |mut ctx| bench.engine.ensure_network(&mut ctx).await.map(drop))
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn the_hosts_resolver_follows_the_domains_while_the_bridge_is_up() {
        let (bench, zones) = bench(true).await;
        change(&bench, &zones, &["early"]).await;
        assert!(told(&bench).is_empty(), "there is no bridge yet");
        change(&bench, &zones, &[]).await;
        up(&bench).await;
        assert!(told(&bench).is_empty(), "there are no domains");
        change(&bench, &zones, &["vm"]).await;
        assert_eq!(told(&bench), [["vm"]]);
        change(&bench, &zones, &["vm", "lab"]).await;
        assert_eq!(told(&bench), [["vm", "lab"]]);
        up(&bench).await;
        assert_eq!(told(&bench), [["vm", "lab"]]);
        change(&bench, &zones, &[]).await;
        assert!(told(&bench).is_empty(), "the last component is gone");
    }

    #[tokio::test]
    async fn the_hosts_resolver_is_not_sent_where_nobody_answers() {
        let (bench, zones) = bench(false).await;
        up(&bench).await;
        change(&bench, &zones, &["vm"]).await;
        assert!(told(&bench).is_empty());
    }
}
