//! A network in memory, with faults on demand.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use vm_types::{Effect, EffectId, Handle, InstanceId, Observed};

use crate::{Blocker, HostRoute, Net, NetError, names};

#[derive(Debug, Default)]
struct State {
    /// Devices and tables by name; somebody else's where there is no effect.
    things: BTreeMap<String, Option<Effect>>,
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
        Ok(match self.things.get(name(effect)?) {
            None => Observed::Absent,
            Some(Some(there)) if there == effect => Observed::Present(Handle::None),
            Some(Some(_)) => Observed::Foreign("it has another shape".to_owned()),
            Some(None) => Observed::Foreign("somebody else's".to_owned()),
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

fn name(effect: &Effect) -> Result<&str, NetError> {
    match effect {
        Effect::Bridge { name, .. } | Effect::Tap { name, .. } | Effect::Firewall { table: name, .. } => {
            Ok(name)
        }
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

    async fn apply(&self, effect: &Effect) -> Result<(), NetError> {
        let mut state = self.lock();
        state.observe(effect)?;
        state.applies += 1;
        if state.fail_apply == Some(state.applies) {
            return Err(NetError::Injected { effect: effect.id() });
        }
        if let Effect::Sysctl { key, value } = effect {
            state.settings.insert(key.clone(), value.clone());
            return Ok(());
        }
        let name = name(effect)?;
        state.refuse_foreign(name, effect)?;
        if let Effect::Tap { bridge, .. } = effect
            && !matches!(state.things.get(bridge), Some(Some(Effect::Bridge { .. })))
        {
            let source = std::io::Error::from_raw_os_error(nix::libc::ENODEV);
            return Err(NetError::Netlink { action: "find", name: bridge.clone(), source });
        }
        state.things.insert(name.to_owned(), Some(effect.clone()));
        Ok(())
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
        state.refuse_foreign(name, effect)?;
        state.things.remove(name);
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
