//! The host's real network.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddrV4,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::link::InfoKind;
use serde_json::Value;
use vm_host::{HostCommand, Runner, tap::Tap};
use vm_types::{Effect, Handle, InstanceId, Observed};

use crate::{
    Blocker, HostRoute, Net, NetError,
    firewall::{Judgement, Table},
    foreign,
    links::{Link, Links},
    names::{bridge_name, check_device_name, mac_bytes, table_name, tap_number},
    nft::Nft,
    ports::{self, Held, Port},
    resolved::Resolved,
    rules::Rules,
    sysctl::Sysctl,
};

/// The MTU of bridge and taps; an uplink's that is not below it needs no mention.
const DEFAULT_MTU: u32 = 1500;

/// The setting by which a host passes on packets at all.
const FORWARDING: &str = "net/ipv4/ip_forward";

/// Changes the host's network: devices through netlink and `/dev/net/tun`, rules through `nft`.
#[derive(Debug, Clone)]
pub struct HostNet {
    runner: Arc<dyn Runner>,
    nft: Nft,
    resolved: Resolved,
    /// Tables are read and then changed by one task at a time.
    changes: Arc<tokio::sync::Mutex<()>>,
    /// Published ports by owner.
    held: Arc<Mutex<BTreeMap<String, Held>>>,
}

impl HostNet {
    /// Touches nothing yet.
    pub fn new(runner: Arc<dyn Runner>) -> Self {
        let nft = Nft::new(Arc::clone(&runner));
        let resolved = Resolved {
            runner: Arc::clone(&runner),
            directory: "/run/systemd/resolve".into(),
            bus: "/run/dbus/system_bus_socket".into(),
        };
        Self { runner, nft, resolved, changes: Arc::default(), held: Arc::default() }
    }

    async fn observe_bridge(&self, name: &str, address: Ipv4Net) -> Result<Observed, NetError> {
        let links = Links::open()?;
        let Some(link) = links.find(name).await? else { return Ok(Observed::Absent) };
        if link.kind != Some(InfoKind::Bridge) {
            return Ok(Observed::Foreign(link.describe()));
        }
        let addresses = links.addresses(&link).await?;
        Ok(if addresses != [address] {
            Observed::Foreign(format!("a bridge with the addresses {addresses:?} instead of {address}"))
        } else if !link.up {
            Observed::Foreign("a bridge that is down".to_owned())
        } else {
            Observed::Present(Handle::None)
        })
    }

    async fn apply_bridge(&self, name: &str, address: Ipv4Net) -> Result<(), NetError> {
        check_device_name(name)?;
        let links = Links::open()?;
        let is_new = match links.find(name).await? {
            Some(link) => {
                refuse_other(&link, &InfoKind::Bridge)?;
                false
            }
            None => {
                links.add_bridge(name, mac_bytes(address.addr())).await?;
                true
            }
        };
        let result = async {
            let link = existing(&links, name).await?;
            refuse_other(&link, &InfoKind::Bridge)?;
            for other in links.addresses(&link).await? {
                if other != address {
                    links.delete_address(&link, other).await?;
                }
            }
            links.add_address(&link, address).await?;
            links.set_up(&link).await
        };
        unwind(&links, name, is_new, result.await).await
    }

    async fn observe_tap(&self, name: &str, bridge: &str) -> Result<Observed, NetError> {
        let links = Links::open()?;
        let Some(link) = links.find(name).await? else { return Ok(Observed::Absent) };
        if link.kind != Some(InfoKind::Tun) {
            return Ok(Observed::Foreign(link.describe()));
        }
        let bridge_index = links.find(bridge).await?.map(|bridge| bridge.index);
        Ok(if link.controller.is_none() || link.controller != bridge_index {
            Observed::Foreign(format!("a tap that is no port of {bridge}"))
        } else if !link.up {
            Observed::Foreign("a tap that is down".to_owned())
        } else {
            Observed::Present(Handle::None)
        })
    }

    async fn apply_tap(&self, name: &str, bridge: &str) -> Result<(), NetError> {
        check_device_name(name)?;
        let links = Links::open()?;
        let bridge = existing(&links, bridge).await?;
        let is_new = match links.find(name).await? {
            Some(link) => {
                refuse_other(&link, &InfoKind::Tun)?;
                let tap = name.to_owned();
                // One of a former build is nobody's. One that a VMM holds stays what it is.
                blocking(name, move || match create_tap(&tap) {
                    Err(NetError::Tap { source, .. }) if source.raw_os_error() == Some(nix::libc::EBUSY) => {
                        Ok(())
                    }
                    other => other,
                })
                .await?;
                false
            }
            None => {
                let tap = name.to_owned();
                blocking(name, move || create_tap(&tap)).await?;
                true
            }
        };
        let result = async {
            let link = existing(&links, name).await?;
            links.set_port(&link, &bridge).await
        };
        unwind(&links, name, is_new, result.await).await
    }

    async fn undo_device(&self, name: &str, kind: &InfoKind) -> Result<(), NetError> {
        let links = Links::open()?;
        let Some(link) = links.find(name).await? else { return Ok(()) };
        refuse_other(&link, kind)?;
        links.delete(&link).await
    }

    async fn load_table(&self, table: Table<'_>) -> Result<(), NetError> {
        let _alone = self.changes.lock().await;
        let present = self.nft.table(table.name).await?;
        refuse_others(table, present.as_ref())?;
        let action = format!("load the firewall table {}", table.name);
        self.nft.change(table.load(present.as_ref()), action).await
    }

    async fn remove_table(&self, table: Table<'_>) -> Result<(), NetError> {
        let _alone = self.changes.lock().await;
        let Some(present) = self.nft.table(table.name).await? else { return Ok(()) };
        refuse_others(table, Some(&present))?;
        let action = format!("remove the firewall table {}", table.name);
        self.nft.change(vec![table.remove()], action).await
    }

    async fn apply_rules(&self, rules: Rules<'_>) -> Result<(), NetError> {
        let _alone = self.changes.lock().await;
        let listing = self.nft.table(rules.table).await?;
        let action = format!("add rules to the firewall table {}", rules.table);
        self.nft.change(rules.apply(listing.as_ref())?, action).await
    }

    async fn observe_port(&self, port: Port<'_>) -> Result<Observed, NetError> {
        let _alone = self.changes.lock().await;
        let listing = self.nft.table(port.table).await?;
        Ok(match port.published(listing.as_ref()) {
            Ok(address) => {
                self.hold_again(port, address);
                Observed::Present(ports::handle(address))
            }
            Err(observed) => observed,
        })
    }

    async fn apply_port(&self, port: Port<'_>) -> Result<Handle, NetError> {
        let _alone = self.changes.lock().await;
        let listing = self.nft.table(port.table).await?;
        if let Ok(address) = port.published(listing.as_ref()) {
            self.hold_again(port, address);
            self.route_loopback(port, "1").await?;
            return Ok(ports::handle(address));
        }
        // Of another shape, or of rules that somebody has deleted.
        let mut former = self.held().remove(port.owner);
        if let (None, Some(before)) = (&former, listing.as_ref().and_then(|listing| port.before(listing))) {
            former = hold_soon(port, before).await;
        }
        let (held, commands) = port.publish(listing.as_ref(), former)?;
        self.route_loopback(port, "1").await?;
        let (address, action) =
            (held.address, format!("publish a port in the firewall table {}", port.table));
        self.nft.change(commands, action).await?;
        self.held().insert(port.owner.to_owned(), held);
        Ok(ports::handle(address))
    }

    async fn undo_port(&self, port: Port<'_>) -> Result<(), NetError> {
        let _alone = self.changes.lock().await;
        let listing = self.nft.table(port.table).await?.unwrap_or_default();
        self.delete(port.table, || port.undo(&listing), |listing| port.undo(listing)).await?;
        self.held().remove(port.owner);
        if !port.others_are_local(&listing) {
            self.route_loopback(port, "0").await?;
        }
        Ok(())
    }

    async fn undo_rules(&self, rules: Rules<'_>) -> Result<(), NetError> {
        let _alone = self.changes.lock().await;
        let Some(listing) = self.nft.table(rules.table).await? else { return Ok(()) };
        self.delete(rules.table, || rules.undo(&listing), |listing| rules.undo(listing)).await
    }

    /// Deletes rules by their handles. Somebody else may delete them at the same time, and then they are looked for once more.
    async fn delete(
        &self,
        table: &str,
        first: impl FnOnce() -> Vec<Value>,
        again: impl FnOnce(&Value) -> Vec<Value>,
    ) -> Result<(), NetError> {
        let action = || format!("delete rules from the firewall table {table}");
        let Err(error) = self.nft.change(first(), action()).await else { return Ok(()) };
        tracing::debug!(table, %error, "looking at the rules again");
        let Some(listing) = self.nft.table(table).await? else { return Ok(()) };
        self.nft.change(again(&listing), action()).await
    }

    /// Lets packets go between loopback addresses and the bridge, where a port needs that, or not any more.
    async fn route_loopback(&self, port: Port<'_>, value: &'static str) -> Result<(), NetError> {
        if !port.is_local() {
            return Ok(());
        }
        check_device_name(port.bridge)?;
        let key = format!("net/ipv4/conf/{}/route_localnet", port.bridge);
        let set = blocking(port.bridge, move || Sysctl { key: &key, value }.apply()).await;
        match set {
            // Gone with its bridge.
            Err(NetError::Sysctl { source, .. })
                if value == "0" && source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// A port that was published before this daemon began, or is.
    fn hold_again(&self, port: Port<'_>, address: SocketAddrV4) {
        let mut held = self.held();
        if held.get(port.owner).is_some_and(|held| held.address == address) {
            return;
        }
        match port.hold(address) {
            Ok(now) => drop(held.insert(port.owner.to_owned(), now)),
            Err(error) => {
                tracing::warn!(owner = port.owner, %error, "leads to a guest, and another program has it now");
            }
        }
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rules of the older kernel interface, which nft does not show. Asking for them where there are none would load it.
    async fn legacy_blockers(&self, own_bridge: &str) -> Option<Vec<Blocker>> {
        let tables = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").ok()?;
        if !tables.lines().any(|table| table == "filter") {
            return None;
        }
        let command = HostCommand::new("iptables-legacy").args(["-S"]);
        let output = self.runner.run(command).await.ok()?;
        Some(foreign::legacy_blockers(&String::from_utf8_lossy(&output.stdout), own_bridge))
    }

    /// Whether others came to rely on the host's forwarding, as far as that shows.
    async fn others_forward(&self) -> Result<bool, NetError> {
        let legacy = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
        Ok(legacy.lines().any(|table| table == "nat")
            || foreign::others_forward(&self.nft.list(&["chains"]).await?))
    }
}

#[async_trait]
impl Net for HostNet {
    async fn observe(&self, effect: &Effect) -> Result<Observed, NetError> {
        match effect {
            Effect::Bridge { name, address } => self.observe_bridge(name, *address).await,
            Effect::Tap { name, bridge } => self.observe_tap(name, bridge).await,
            Effect::Firewall { table, bridge, subnet } => {
                let table = Table { name: table, bridge, subnet: *subnet };
                let present = self.nft.table(table.name).await?;
                Ok(present.map_or(Observed::Absent, |present| table.judge(&present).observed()))
            }
            Effect::Rules { .. } => {
                let rules = Rules::of(effect)?;
                Ok(rules.observe(self.nft.table(rules.table).await?.as_ref()))
            }
            Effect::Port { .. } => match Port::of(effect)? {
                Some(port) => self.observe_port(port).await,
                None => Ok(Observed::Absent),
            },
            Effect::LinkDns { .. } => self.resolved.observe(effect).await,
            Effect::Sysctl { .. } => sysctl(effect, |setting| setting.observe()).await,
            _ => Err(NetError::NotMine { effect: effect.id() }),
        }
    }

    async fn former(&self, effect: &Effect) -> Result<Handle, NetError> {
        match effect {
            Effect::Bridge { .. }
            | Effect::Tap { .. }
            | Effect::Firewall { .. }
            | Effect::Rules { .. }
            | Effect::Port { .. }
            | Effect::LinkDns { .. } => Ok(Handle::None),
            Effect::Sysctl { .. } => sysctl(effect, |setting| setting.former()).await,
            _ => Err(NetError::NotMine { effect: effect.id() }),
        }
    }

    async fn apply(&self, effect: &Effect) -> Result<Handle, NetError> {
        let applied = match effect {
            Effect::Bridge { name, address } => self.apply_bridge(name, *address).await,
            Effect::Tap { name, bridge } => self.apply_tap(name, bridge).await,
            Effect::Firewall { table, bridge, subnet } => {
                let table = Table { name: table, bridge, subnet: *subnet };
                self.load_table(table).await
            }
            Effect::Rules { .. } => self.apply_rules(Rules::of(effect)?).await,
            Effect::Port { .. } => return self.apply_port(Port::wanted(effect)?).await,
            Effect::LinkDns { .. } => self.resolved.apply(effect).await,
            Effect::Sysctl { .. } => sysctl(effect, |setting| setting.apply()).await,
            _ => Err(NetError::NotMine { effect: effect.id() }),
        };
        applied.map(|()| Handle::None)
    }

    async fn undo(&self, effect: &Effect, handle: &Handle) -> Result<(), NetError> {
        match effect {
            Effect::Bridge { name, .. } => self.undo_device(name, &InfoKind::Bridge).await,
            Effect::Tap { name, .. } => self.undo_device(name, &InfoKind::Tun).await,
            Effect::Firewall { table, bridge, subnet } => {
                let table = Table { name: table, bridge, subnet: *subnet };
                self.remove_table(table).await
            }
            Effect::Rules { .. } => self.undo_rules(Rules::of(effect)?).await,
            Effect::Port { .. } => match Port::of(effect)? {
                Some(port) => self.undo_port(port).await,
                None => Ok(()),
            },
            Effect::LinkDns { .. } => self.resolved.undo(effect).await,
            Effect::Sysctl { key, .. } if key == FORWARDING && self.others_forward().await? => {
                tracing::info!("forwarding stays on: others have the host translate addresses by now");
                Ok(())
            }
            Effect::Sysctl { .. } => {
                let handle = handle.clone();
                sysctl(effect, move |setting| setting.undo(&handle)).await
            }
            _ => Err(NetError::NotMine { effect: effect.id() }),
        }
    }

    async fn found(&self, instance: &InstanceId) -> Result<Vec<Effect>, NetError> {
        let (bridge, table) = (bridge_name(instance), table_name(instance));
        let nowhere = Ipv4Net::default();
        let mut found = Vec::new();
        if self.nft.has_table(&table).await? {
            found.push(Effect::Firewall { table, bridge: bridge.clone(), subnet: nowhere });
        }
        let links = Links::open()?.all().await?;
        if links.iter().any(|link| link.name == bridge && link.kind == Some(InfoKind::Bridge)) {
            found.push(Effect::Bridge { name: bridge.clone(), address: nowhere });
        }
        let taps = links
            .into_iter()
            .filter(|link| link.kind == Some(InfoKind::Tun) && tap_number(instance, &link.name).is_some());
        found.extend(taps.map(|link| Effect::Tap { name: link.name, bridge: bridge.clone() }));
        Ok(found)
    }

    async fn routes(&self) -> Result<Vec<HostRoute>, NetError> {
        Links::open()?.routes().await
    }

    async fn guest_mtu(&self) -> Result<Option<u32>, NetError> {
        Ok(Links::open()?.uplink_mtu().await?.filter(|mtu| *mtu < DEFAULT_MTU))
    }

    async fn forwarding_blocked(&self, own_bridge: &str) -> Result<Vec<Blocker>, NetError> {
        let mut blockers = Vec::new();
        for chain in foreign::base_chains(&self.nft.list(&["chains"]).await?) {
            let table = self.nft.list(&["table", &chain.family, &chain.table]).await?;
            blockers.extend(chain.blocker(&table, own_bridge));
        }
        blockers.extend(self.legacy_blockers(own_bridge).await.into_iter().flatten());
        Ok(blockers)
    }
}

/// Holds a port that a daemon before this one had. For a moment a child that it had forked may have it still.
async fn hold_soon(port: Port<'_>, address: SocketAddrV4) -> Option<Held> {
    for _ in 0..100 {
        if let Ok(held) = port.hold(address) {
            return Some(held);
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    None
}

async fn existing(links: &Links, name: &str) -> Result<Link, NetError> {
    links.find(name).await?.ok_or_else(|| NetError::Netlink {
        action: "find",
        name: name.to_owned(),
        source: io::Error::from_raw_os_error(nix::libc::ENODEV),
    })
}

fn refuse_others(table: Table<'_>, present: Option<&Value>) -> Result<(), NetError> {
    if present.map(|present| table.judge(present)) != Some(Judgement::NotOurs) {
        return Ok(());
    }
    let name = format!("the nftables table inet {}", table.name);
    Err(NetError::Foreign { name, what: Judgement::NOT_OURS.to_owned() })
}

fn refuse_other(link: &Link, kind: &InfoKind) -> Result<(), NetError> {
    if link.kind.as_ref() == Some(kind) {
        return Ok(());
    }
    Err(NetError::Foreign { name: link.name.clone(), what: link.describe() })
}

/// Removes a new device that could not be made ready.
async fn unwind(
    links: &Links,
    name: &str,
    is_new: bool,
    result: Result<(), NetError>,
) -> Result<(), NetError> {
    if result.is_err()
        && is_new
        && let Ok(Some(link)) = links.find(name).await
        && let Err(error) = links.delete(&link).await
    {
        tracing::warn!(device = name, %error, "could not remove a half-made device");
    }
    result
}

async fn sysctl<R: Send + 'static>(
    effect: &Effect,
    act: impl FnOnce(Sysctl<'_>) -> Result<R, NetError> + Send + 'static,
) -> Result<R, NetError> {
    let Effect::Sysctl { key, value } = effect else {
        return Err(NetError::NotMine { effect: effect.id() });
    };
    let (name, key, value) = (key.clone(), key.clone(), value.clone());
    blocking(&name, move || act(Sysctl { key: &key, value: &value })).await
}

/// Runs what may wait for the kernel's network lock.
async fn blocking<R: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<R, NetError> + Send + 'static,
) -> Result<R, NetError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|source| NetError::Died { name: name.to_owned(), source })?
}

/// Makes a tap that outlives its creator, which only the creator's user may attach to without privileges.
fn create_tap(name: &str) -> Result<(), NetError> {
    let make = || {
        let tap = Tap::create(name)?;
        tap.give_to(nix::unistd::geteuid().as_raw())?;
        tap.keep()
    };
    make().map_err(|source| NetError::Tap { name: name.to_owned(), source })
}
