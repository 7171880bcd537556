//! The name service: the DNS server on the bridge and on loopback, the VMs as it knows them, and the active component of world
//! `dns`. Without one there are no zones, and guests' questions go to the host's resolvers.

use std::{
    error::Error,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use ipnet::{IpNet, Ipv4Net};
use jsonrpsee::core::async_trait;
use vm_dns::{Answer, DnsError, Limits, Name, Networks, NoResolver, Question, RecordData, Server, Upstreams};
use vm_engine::{
    Engine,
    effects::NameTable,
    ports::{GuestNames, Names},
};
use vm_plugin::{
    CallError, Input, Query, Resolved, World,
    ports::{Directory, StateStore},
};

use crate::plugins::Manager;

/// The name service's port (RFC 1035, section 4.2).
const PORT: u16 = 53;
/// Where the host's own resolver configuration is (resolv.conf(5)).
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The name service. Clones share it.
#[derive(Clone)]
pub(crate) struct NameService(Arc<Inner>);

struct Inner {
    server: Server,
    table: NameTable,
    /// Known once the engine is up.
    engine: Arc<OnceLock<Engine>>,
    bridge: Mutex<Option<(Ipv4Addr, Ipv4Net)>>,
    zones: Mutex<Vec<String>>,
}

impl std::fmt::Debug for NameService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NameService").finish_non_exhaustive()
    }
}

impl NameService {
    /// Listens nowhere yet. `upstreams` are asked about everything outside of the zones; the host's own resolvers if empty.
    pub(crate) async fn new(upstreams: &[IpAddr], table: NameTable) -> Result<Self, DnsError> {
        let upstreams = match upstreams {
            [] => Upstreams::ResolvConf(RESOLV_CONF.into()),
            given => Upstreams::Given(given.iter().map(|address| SocketAddr::new(*address, PORT)).collect()),
        };
        let config = vm_dns::Config { networks: networks(None), upstreams, limits: Limits::default() };
        let server = Server::start(config, Arc::new(NoResolver), &[]).await?;
        Ok(Self(Arc::new(Inner {
            server,
            table,
            engine: Arc::default(),
            bridge: Mutex::default(),
            zones: Mutex::default(),
        })))
    }

    /// Begins to know the engine's VMs, and to serve the host itself on loopback: on `asked`, or an address that follows from the
    /// daemon's instance, so that several daemons do not meet. Where that cannot be had, only guests are served.
    pub(crate) async fn attach(&self, engine: Engine, asked: Option<SocketAddr>) {
        let address = asked.unwrap_or_else(|| own_loopback(engine.instance().as_str()));
        let _ = self.0.engine.set(engine.clone());
        // They may have changed while the engine began, unseen by it and by whoever follows them.
        engine.domains_changed().await;
        if let Err(error) = self.0.server.listen(address).await {
            let error = vm_types::report::chain(&error);
            tracing::warn!(%address, error, "the host itself is not served with names");
        }
    }

    /// Has the first enabled component of world `dns` in charge from now on, whichever that is.
    pub(crate) async fn follow(&self, plugins: Arc<Manager>) {
        let mut changes = plugins.changes();
        let mut active = self.take_first(&plugins, None).await;
        let names = self.clone();
        tokio::spawn(async move {
            while changes.changed().await.is_ok() {
                let before = names.domains();
                active = names.take_first(&plugins, active).await;
                if names.domains() != before
                    && let Some(engine) = names.0.engine.get()
                {
                    engine.domains_changed().await;
                }
            }
        });
    }

    async fn take_first(
        &self,
        plugins: &Manager,
        active: Option<Arc<vm_plugin::Plugin>>,
    ) -> Option<Arc<vm_plugin::Plugin>> {
        let first = plugins.of(World::Dns).into_iter().next();
        let same = match (&first, &active) {
            (Some(first), Some(active)) => Arc::ptr_eq(first, active),
            (None, None) => true,
            _ => false,
        };
        if same {
            return active;
        }
        let input = Input { reason: "start".into(), facts: plugins.facts().now().await, ..Input::default() };
        match self.activate(first.clone(), input, plugins.state()).await {
            Ok(()) => first,
            Err(error) => {
                tracing::error!(
                    error = vm_types::report::chain(&error),
                    "no component answers for VMs' names"
                );
                // The next change may have it begin.
                None
            }
        }
    }

    /// Puts another component in charge of the zones, or none.
    ///
    /// # Errors
    /// It does not begin, or its zones are no names; then there are no zones.
    async fn activate(
        &self,
        component: Option<Arc<vm_plugin::Plugin>>,
        input: Input,
        state: Arc<dyn StateStore>,
    ) -> Result<(), CallError> {
        let inner = &self.0;
        let Some(plugin) = component else {
            inner.server.set_resolver(Arc::new(NoResolver));
            lock(&inner.zones).clear();
            return Ok(());
        };
        let vms = Arc::new(Vms(inner.engine.clone()));
        let started = vm_plugin::Resolver::start(plugin, input, state, vms.clone()).await;
        let component = started.inspect_err(|_| {
            inner.server.set_resolver(Arc::new(NoResolver));
            lock(&inner.zones).clear();
        })?;
        // Reverse zones are the networks' own; they are not what anybody searches in.
        let forward = |zone: &&String| !zone.ends_with(".arpa");
        *lock(&inner.zones) = component.zones().iter().filter(forward).cloned().collect();
        let resolver = Zones { component, table: inner.table.clone(), vms };
        inner.server.set_resolver(Arc::new(resolver));
        Ok(())
    }

    /// The addresses that are listened on.
    pub(crate) async fn listening(&self) -> Vec<SocketAddr> {
        let mut all = self.0.server.listening().await;
        all.sort();
        all
    }

    /// What has been answered so far.
    pub(crate) fn stats(&self) -> vm_dns::Stats {
        self.0.server.stats()
    }

    /// Stops listening.
    pub(crate) async fn stop(&self) {
        self.0.server.stop().await;
    }
}

#[async_trait]
impl Names for NameService {
    async fn bridge_up(&self, gateway: Ipv4Addr, subnet: Ipv4Net) -> Option<GuestNames> {
        let inner = &self.0;
        let names = || GuestNames { servers: vec![gateway.into()], search: self.domains() };
        let before = *lock(&inner.bridge);
        if before == Some((gateway, subnet)) {
            return Some(names());
        }
        if before.is_some() {
            self.bridge_down().await;
        }
        inner.server.set_networks(networks(Some(subnet)));
        if let Err(error) = inner.server.listen(SocketAddr::new(gateway.into(), PORT)).await {
            let error = vm_types::report::chain(&error);
            tracing::warn!(%gateway, error, "guests are not served with names; they ask the host's resolvers");
            return None;
        }
        *lock(&inner.bridge) = Some((gateway, subnet));
        Some(names())
    }

    fn domains(&self) -> Vec<String> {
        lock(&self.0.zones).clone()
    }

    async fn bridge_down(&self) {
        let before = lock(&self.0.bridge).take();
        if let Some((gateway, _)) = before {
            self.0.server.unlisten(SocketAddr::new(gateway.into(), PORT)).await;
        }
        self.0.server.set_networks(networks(None));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who may ask: the host, and guests of this subnet.
fn networks(subnet: Option<Ipv4Net>) -> Networks {
    let guests: Vec<IpNet> = subnet.into_iter().map(IpNet::V4).collect();
    Networks { clients: guests.iter().copied().chain(vm_dns::loopback()).collect(), reverse: guests }
}

/// 127.x.y.53, x and y of the instance's four hexadecimal digits.
fn own_loopback(instance: &str) -> SocketAddr {
    let number = u16::from_str_radix(instance, 16).unwrap_or_default();
    let [x, y] = number.to_be_bytes();
    SocketAddr::new(Ipv4Addr::new(127, x, y, 53).into(), PORT)
}

/// The engine's VMs by name and address.
struct Vms(Arc<OnceLock<Engine>>);

impl Vms {
    fn each<T>(&self, look: impl Fn(&str, Option<Ipv4Addr>) -> Option<T>) -> Vec<T> {
        let Some(engine) = self.0.get() else { return Vec::new() };
        engine.each_address(look)
    }
}

impl Directory for Vms {
    fn names(&self) -> Vec<String> {
        let mut names = self.each(|name, address| address.map(|_| name.to_owned()));
        names.sort();
        names
    }

    fn addresses(&self, name: &str) -> Vec<IpAddr> {
        self.each(|other, address| address.filter(|_| other == name).map(IpAddr::V4))
    }

    fn name_of(&self, address: IpAddr) -> Option<String> {
        let is_it = |name: &str, other: Option<Ipv4Addr>| {
            other.filter(|other| IpAddr::V4(*other) == address).map(|_| name.to_owned())
        };
        self.each(is_it).pop()
    }
}

/// Records that plugins planned, then the component's answers.
struct Zones {
    component: vm_plugin::Resolver,
    table: NameTable,
    vms: Arc<Vms>,
}

#[async_trait]
impl vm_dns::Resolver for Zones {
    fn zones(&self) -> Vec<Name> {
        let zones = self.component.zones().iter();
        zones.filter_map(|zone| Name::from_ascii(format!("{zone}.")).ok()).collect()
    }

    async fn resolve(&self, question: &Question) -> Result<Answer, Box<dyn Error + Send + Sync>> {
        let name = question.name.to_ascii().trim_end_matches('.').to_ascii_lowercase();
        let planned = self.table.of(&name);
        let mine: Vec<_> = planned
            .iter()
            .filter(|record| [question.qtype, CNAME].contains(&record.record_type))
            .filter_map(|record| {
                let ttl = record.ttl_seconds;
                data(record.record_type, &record.data).map(|data| vm_dns::Record {
                    name: question.name.clone(),
                    ttl,
                    data,
                })
            })
            .collect();
        if !mine.is_empty() {
            return Ok(Answer::Records(mine));
        }
        let query = Query {
            name,
            query_type: question.qtype,
            query_class: 1,
            asker: self.vms.name_of(question.client),
        };
        Ok(match self.component.resolve(query).await? {
            Resolved::Pass => Answer::Pass,
            Resolved::NoData => Answer::NoData,
            Resolved::NxDomain if planned.is_empty() => Answer::NxDomain,
            Resolved::NxDomain => Answer::NoData,
            Resolved::Refused => Answer::Refused,
            Resolved::Records(records) => Answer::Records(
                records
                    .into_iter()
                    .filter_map(|record| {
                        let name = Name::from_ascii(format!("{}.", record.name)).ok()?;
                        let data = data(record.record_type, &record.data)?;
                        Some(vm_dns::Record { name, ttl: record.ttl_seconds, data })
                    })
                    .collect(),
            ),
        })
    }
}

const CNAME: u16 = 5;

/// A record's text form (RFC 1035, section 5.1); none of what this server cannot answer with.
fn data(record_type: u16, text: &str) -> Option<RecordData> {
    let name = || Name::from_ascii(format!("{}.", text.trim_end_matches('.'))).ok();
    let data = match record_type {
        1 => text.parse().ok().map(RecordData::A),
        28 => text.parse().ok().map(RecordData::Aaaa),
        CNAME => name().map(RecordData::Cname),
        12 => name().map(RecordData::Ptr),
        16 => Some(RecordData::Txt(vec![text.trim_matches('"').to_owned()])),
        _ => None,
    };
    if data.is_none() {
        tracing::warn!(record_type, data = text, "a record that cannot be answered with");
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_daemons_have_two_loopback_addresses() {
        assert_eq!(own_loopback("3f2a").to_string(), "127.63.42.53:53");
        assert_ne!(own_loopback("3f2a"), own_loopback("3f2b"));
    }

    #[test]
    fn records_in_text_form_are_understood_or_left_out() {
        assert_eq!(data(1, "192.0.2.7"), Some(RecordData::A(Ipv4Addr::new(192, 0, 2, 7))));
        assert!(matches!(data(12, "web.vm"), Some(RecordData::Ptr(_))));
        assert_eq!((data(1, "web"), data(99, "x")), (None, None));
    }
}
