//! A network in memory, with faults on demand.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, SocketAddrV4},
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use vm_types::{Effect, EffectId, Handle, InstanceId, Observed};

use crate::{Blocker, HostRoute, Net, NetError, names, ports, rules::Rules};

/// The first port that is chosen (RFC 6335, section 6: dynamic ports).
const FIRST_CHOSEN: u16 = 49152;

#[derive(Debug, Default)]
struct State {
    /// Devices and tables by name, what is in or of them by the effect's id; somebody else's where there is no effect.
    things: BTreeMap<String, Option<Effect>>,
    /// Published ports by the effect's id.
    ports: BTreeMap<String, SocketAddrV4>,
    taken: Vec<SocketAddr>,
    settings: BTreeMap<String, String>,
    routes: Vec<HostRoute>,
    blockers: Vec<Blocker>,
    guest_mtu: Option<u32>,
    applies: usize,
    fail_apply: Option<usize>,
    fail_undo: bool,
}

/// Keeps the network in memory under the same rules as [`crate::HostNet`].
#[derive(Debug, Default)]
pub struct FakeNet {
    state: Mutex<State>,
}

impl FakeNet {
    /// No devices, no routes; every kernel setting is `0`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the `nth` apply from now on fail, counting from 1.
    pub fn fail_apply(&self, nth: usize) {
        let mut state = self.lock();
        state.fail_apply = Some(state.applies + nth);
    }

    /// Makes every undo fail, or none.
    pub fn fail_undo(&self, fail: bool) {
        self.lock().fail_undo = fail;
    }

    /// Puts a device or table of somebody else's there.
    pub fn put_foreign(&self, name: &str) {
        self.lock().things.insert(name.to_owned(), None);
    }

    /// Sets a kernel setting behind the daemon's back.
    pub fn set_setting(&self, key: &str, value: &str) {
        self.lock().settings.insert(key.to_owned(), value.to_owned());
    }

    /// The value of a kernel setting.
    pub fn setting(&self, key: &str) -> String {
        self.lock().setting(key)
    }

    /// Replaces the host's routes.
    pub fn set_routes(&self, routes: Vec<HostRoute>) {
        self.lock().routes = routes;
    }

    /// Replaces what [`Net::forwarding_blocked`] finds.
    pub fn set_blockers(&self, blockers: Vec<Blocker>) {
        self.lock().blockers = blockers;
    }

    /// Replaces what [`Net::guest_mtu`] says.
    pub fn set_guest_mtu(&self, mtu: Option<u32>) {
        self.lock().guest_mtu = mtu;
    }

    /// Makes a port one that another program listens on.
    pub fn take_port(&self, address: SocketAddr) {
        self.lock().taken.push(address);
    }

    /// What is applied now, without kernel settings.
    pub fn effects(&self) -> Vec<Effect> {
        self.lock().things.values().flatten().cloned().collect()
    }

    /// Ids of what is applied now, without kernel settings.
    pub fn applied(&self) -> Vec<EffectId> {
        self.lock().things.values().flatten().map(Effect::id).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn setting(&self, key: &str) -> String {
        self.settings.get(key).cloned().unwrap_or_else(|| "0".to_owned())
    }

    fn observe(&self, effect: &Effect) -> Result<Observed, NetError> {
        if let Effect::Sysctl { key, value } = effect {
            let present = self.setting(key);
            return Ok(if present == *value { Observed::Present(Handle::None) } else { Observed::Absent });
        }
        let name = name(effect)?;
        Ok(match self.things.get(&name) {
            None if matches!(effect, Effect::Rules { rules, .. } if rules.is_empty()) => {
                Observed::Present(Handle::None)
            }
            None => Observed::Absent,
            Some(Some(there)) if there == effect => {
                Observed::Present(self.ports.get(&name).map_or(Handle::None, |port| ports::handle(*port)))
            }
            Some(Some(_)) => Observed::Foreign("it has another shape".to_owned()),
            Some(None) => Observed::Foreign("somebody else's".to_owned()),
        })
    }

    /// What must be there first, and what could not be anywhere.
    fn check(&self, effect: &Effect) -> Result<(), NetError> {
        let has = |name: &str, kind: fn(&Effect) -> bool| {
            self.things.get(name).is_some_and(|there| there.as_ref().is_some_and(kind))
        };
        let is_bridge = |effect: &Effect| matches!(effect, Effect::Bridge { .. });
        let is_table = |effect: &Effect| matches!(effect, Effect::Firewall { .. });
        match effect {
            Effect::Tap { bridge: device, .. } | Effect::LinkDns { link: device, .. }
                if !has(device, is_bridge) =>
            {
                let source = std::io::Error::from_raw_os_error(nix::libc::ENODEV);
                Err(NetError::Netlink { action: "find", name: device.clone(), source })
            }
            Effect::Rules { table, .. } | Effect::Port { table, .. } if !has(table, is_table) => {
                Err(NetError::NoTable { table: table.clone() })
            }
            Effect::Rules { .. } => Rules::of(effect)?.check(),
            _ => Ok(()),
        }
    }

    /// A port for the effect: its own so far, the one it asks for, or the first that is free.
    fn choose(&self, effect: &Effect, name: &str) -> Result<Option<SocketAddrV4>, NetError> {
        let Effect::Port { host, protocol, .. } = effect else { return Ok(None) };
        let SocketAddr::V4(host) = *host else { return Err(NetError::PortFamily { address: *host }) };
        let same_protocol = |other: &str| matches!(self.things.get(other), Some(Some(Effect::Port { protocol: other, .. })) if other == protocol);
        let is_free = |address: &SocketAddrV4| {
            !self.taken.contains(&SocketAddr::V4(*address))
                && !self
                    .ports
                    .iter()
                    .any(|(other, there)| other != name && there == address && same_protocol(other))
        };
        let own = self.ports.get(name).copied().filter(|own| own.ip() == host.ip());
        let mut wanted = match host.port() {
            0 => (FIRST_CHOSEN..=u16::MAX).map(|port| SocketAddrV4::new(*host.ip(), port)).collect(),
            _ => vec![host],
        };
        if host.port() == 0 {
            wanted.splice(0..0, own);
        }
        wanted.into_iter().find(is_free).map(Some).ok_or_else(|| NetError::PortTaken {
            protocol: "fake",
            address: host.into(),
            by: "somebody else".to_owned(),
        })
    }

    fn refuse_foreign(&self, name: &str, effect: &Effect) -> Result<(), NetError> {
        match self.things.get(name) {
            Some(Some(there)) if std::mem::discriminant(there) == std::mem::discriminant(effect) => Ok(()),
            None => Ok(()),
            Some(_) => Err(NetError::Foreign { name: name.to_owned(), what: "somebody else's".to_owned() }),
        }
    }
}

fn name(effect: &Effect) -> Result<String, NetError> {
    match effect {
        Effect::Bridge { name, .. } | Effect::Tap { name, .. } | Effect::Firewall { table: name, .. } => {
            Ok(name.clone())
        }
        Effect::Rules { .. } | Effect::Port { .. } | Effect::LinkDns { .. } => Ok(effect.id().0),
        _ => Err(NetError::NotMine { effect: effect.id() }),
    }
}

#[async_trait]
impl Net for FakeNet {
    async fn observe(&self, effect: &Effect) -> Result<Observed, NetError> {
        self.lock().observe(effect)
    }

    async fn former(&self, effect: &Effect) -> Result<Handle, NetError> {
        match effect {
            Effect::Sysctl { key, .. } => Ok(Handle::Previous { value: self.setting(key) }),
            _ => name(effect).map(|_| Handle::None),
        }
    }

    async fn apply(&self, effect: &Effect) -> Result<Handle, NetError> {
        let mut state = self.lock();
        state.observe(effect)?;
        state.applies += 1;
        if state.fail_apply == Some(state.applies) {
            return Err(NetError::Injected { effect: effect.id() });
        }
        if let Effect::Sysctl { key, value } = effect {
            state.settings.insert(key.clone(), value.clone());
            return Ok(Handle::None);
        }
        let name = name(effect)?;
        state.refuse_foreign(&name, effect)?;
        state.check(effect)?;
        let chosen = state.choose(effect, &name)?;
        state.things.insert(name.clone(), Some(effect.clone()));
        Ok(chosen.map_or(Handle::None, |address| {
            state.ports.insert(name, address);
            ports::handle(address)
        }))
    }

    async fn undo(&self, effect: &Effect, handle: &Handle) -> Result<(), NetError> {
        let mut state = self.lock();
        let observed = state.observe(effect)?;
        if state.fail_undo {
            return Err(NetError::Injected { effect: effect.id() });
        }
        if let Effect::Sysctl { key, .. } = effect {
            if let (Handle::Previous { value }, Observed::Present(_)) = (handle, observed) {
                state.settings.insert(key.clone(), value.clone());
            }
            return Ok(());
        }
        let name = name(effect)?;
        state.refuse_foreign(&name, effect)?;
        state.things.remove(&name);
        state.ports.remove(&name);
        // What is in or of it goes with it.
        let within = |there: &Effect| match there {
            Effect::Rules { table, .. } | Effect::Port { table, .. } => *table == name,
            Effect::LinkDns { link, .. } => *link == name,
            _ => false,
        };
        state.things.retain(|_, there| !there.as_ref().is_some_and(within));
        let State { things, ports, .. } = &mut *state;
        ports.retain(|id, _| things.contains_key(id));
        Ok(())
    }

    async fn found(&self, instance: &InstanceId) -> Result<Vec<Effect>, NetError> {
        let ours = |effect: &&Effect| match effect {
            Effect::Bridge { name, .. } => *name == names::bridge_name(instance),
            Effect::Firewall { table, .. } => *table == names::table_name(instance),
            Effect::Tap { name, .. } => names::tap_number(instance, name).is_some(),
            _ => false,
        };
        let mut found: Vec<_> = self.lock().things.values().flatten().filter(ours).cloned().collect();
        found.sort_by_key(|effect| matches!(effect, Effect::Tap { .. }));
        Ok(found)
    }

    async fn routes(&self) -> Result<Vec<HostRoute>, NetError> {
        Ok(self.lock().routes.clone())
    }

    async fn guest_mtu(&self) -> Result<Option<u32>, NetError> {
        Ok(self.lock().guest_mtu)
    }

    async fn forwarding_blocked(&self, _own_bridge: &str) -> Result<Vec<Blocker>, NetError> {
        Ok(self.lock().blockers.clone())
    }
}
