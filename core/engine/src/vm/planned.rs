//! From what plugins planned to effects, machine and guest.

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    path::PathBuf,
};

use base64::Engine as _;
use sha2::{Digest, Sha256};
use vm_locks::{Ctx, Unlocked};
use vm_types::{
    Effect, EffectId, VmId,
    guest::config::{GuestConfig, GuestFile, HostsEntry, Mount, Unit},
    machine::{Drive, MachineSpec, Nic},
    plan::{Content, GuestPart, HostEffect, Lifetime, MachinePart, RefName},
    vm::DiskLimits,
};

use super::{
    cell::Cell,
    hooks::{Asked, Named, Planned},
};
use crate::{
    Engine, EngineError,
    journal::{self, By, Entry, Phase},
    network::Network,
    ports::HookFailure,
};

/// What machine and guest get of plugins, on top of what the core gives them.
#[derive(Debug, Default)]
pub(super) struct Extras {
    drives: Vec<Drive>,
    nics: Vec<Nic>,
    kernel_args: Vec<String>,
    vsock: Option<u32>,
    pub(super) memory_mib: u64,
    cpus: u32,
    files: Vec<GuestFile>,
    environment: BTreeMap<String, String>,
    hosts: Vec<HostsEntry>,
    mounts: Vec<Mount>,
    modules: Vec<String>,
    units: Vec<Unit>,
    boot_commands: Vec<Vec<String>>,
}

impl Extras {
    pub(super) fn extend_machine(&mut self, machine: &mut MachineSpec) {
        machine.drives.append(&mut self.drives);
        machine.nics.append(&mut self.nics);
        machine.kernel_args.append(&mut self.kernel_args);
        machine.memory_mib = machine.memory_mib.max(self.memory_mib);
        machine.cpus = machine.cpus.max(self.cpus);
        machine.vsock_cid = machine.vsock_cid.or(self.vsock);
    }

    pub(super) fn extend_guest(&mut self, config: &mut GuestConfig) {
        config.files.append(&mut self.files);
        config.environment.append(&mut self.environment);
        config.hosts.append(&mut self.hosts);
        config.mounts.append(&mut self.mounts);
        config.modules.append(&mut self.modules);
        config.units.append(&mut self.units);
        config.boot_commands.append(&mut self.boot_commands);
    }

    fn merge(&mut self, mut other: Self) {
        self.drives.append(&mut other.drives);
        self.nics.append(&mut other.nics);
        self.kernel_args.append(&mut other.kernel_args);
        self.vsock = self.vsock.or(other.vsock);
        self.memory_mib = self.memory_mib.max(other.memory_mib);
        self.cpus = self.cpus.max(other.cpus);
        self.files.append(&mut other.files);
        self.environment.append(&mut other.environment);
        self.hosts.append(&mut other.hosts);
        self.mounts.append(&mut other.mounts);
        self.modules.append(&mut other.modules);
        self.units.append(&mut other.units);
        self.boot_commands.append(&mut other.boot_commands);
    }
}

/// An effect that a plugin planned, on its way to a journal.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wanted {
    pub(super) effect: Effect,
    pub(super) name: Option<RefName>,
    pub(super) place: Where,
    /// A directory of the plugin's own for this VM, which it needs.
    directory: Option<PathBuf>,
}

/// Whose journal has it, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Where {
    /// The VM's.
    Vm(Phase),
    /// The VM's, which never undoes it.
    Kept,
    /// The host's: it is one thing for all VMs and goes with the bridge.
    Host,
}

impl Engine {
    /// Applies what plugins planned for a start, plugin by plugin. Of one that is left out, nothing stays that was not there before;
    /// but what is the host's as a whole does, for other VMs may rely on it by then.
    ///
    /// # Errors
    /// What a required plugin planned cannot be, or what an optional one began cannot be undone. The caller unwinds.
    pub(super) async fn apply_plans(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        asked: &mut Asked,
        network: &mut Option<Network>,
        plans: Vec<Planned>,
    ) -> Result<Extras, EngineError> {
        let mut all = Extras::default();
        if plans.is_empty() {
            return Ok(all);
        }
        let mut before = ids(ctx, cell).await;
        for planned in plans {
            let plugin = planned.plugin.name();
            let mut named = asked.references.get(plugin).cloned().unwrap_or_default();
            match self.apply_plan(ctx, cell, network, &planned, &mut named).await {
                Ok(extras) => {
                    if !extras.nics.is_empty() {
                        // A journal does not say whose a tap is.
                        before = ids(ctx, cell).await;
                    }
                    asked.references.insert(plugin.into(), named);
                    all.merge(extras);
                }
                Err(EngineError::Cancelled) => return Err(EngineError::Cancelled),
                Err(error) => {
                    let failure = HookFailure {
                        message: format!("what plugin {plugin} planned cannot be done: {}", error.chain()),
                        hint: error.hint(),
                    };
                    self.leave_out(&*planned.plugin, asked, failure)?;
                    let begun = |entries: &[Entry]| -> Vec<EffectId> {
                        let theirs = |entry: &&Entry| entry.by.as_ref().is_none_or(|by| by.plugin == plugin);
                        let ids = entries.iter().filter(theirs).map(|entry| entry.effect.id());
                        ids.filter(|id| !before.contains(id)).collect()
                    };
                    let begun = cell.scope.look(ctx, begun).await;
                    cell.scope.unwind_these(ctx, &begun).await?;
                }
            }
        }
        Ok(all)
    }

    /// `named` is what the plugin's references stand for, and afterwards also those of this plan.
    async fn apply_plan(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        network: &mut Option<Network>,
        planned: &Planned,
        named: &mut Named,
    ) -> Result<Extras, EngineError> {
        for wanted in self.wanted(cell, planned)? {
            if matches!(wanted.effect, Effect::Rules { .. } | Effect::Port { .. } | Effect::Sysctl { .. })
                && network.is_none()
            {
                // Also a VM without an interface may plan what concerns the bridge.
                *network = Some(self.ensure_network(ctx).await?);
            }
            named.extend(self.apply_wanted(ctx, cell, planned.plugin.name(), wanted).await?);
        }
        self.extras(ctx, cell, planned, named).await
    }

    /// Returns what its name stands for, if it has one.
    pub(super) async fn apply_wanted(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        plugin: &str,
        wanted: Wanted,
    ) -> Result<Option<(RefName, String)>, EngineError> {
        let Wanted { effect, name, place, directory } = wanted;
        let by = |name, keep| Some(By { plugin: plugin.into(), name, keep });
        let (phase, keep) = match place {
            Where::Host => {
                let mut one_at_a_time = ctx.lock(&self.inner.network).await;
                self.inner.host_scope.apply(one_at_a_time.ctx(), effect, Phase::Host).await?;
                return Ok(None);
            }
            Where::Vm(phase) => (phase, false),
            // The journal of the run has it, so that later hooks can refer to it.
            Where::Kept => (Phase::Start, true),
        };
        if let Some(path) = directory {
            let directory = Effect::Directory { path, mode: 0o700 };
            cell.scope.apply_by(ctx, directory, phase, by(None, false)).await?;
        }
        let handle = cell.scope.apply_by(ctx, effect.clone(), phase, by(name.clone(), keep)).await?;
        Ok(name.zip(journal::value(&effect, &handle)))
    }

    /// The effects that a plan comes to, in its order. Pure, but for the plugin's answer on its tools.
    pub(super) fn wanted(&self, cell: &Cell, planned: &Planned) -> Result<Vec<Wanted>, EngineError> {
        let plugin = planned.plugin.name();
        let owner = format!("{}/{plugin}", cell.id());
        let instance = &self.inner.instance;
        let (table, bridge) = (vm_net::names::table_name(instance), vm_net::names::bridge_name(instance));
        let address = cell.with_record(|record| record.address);
        let mut wanted = Vec::new();
        let mut rules = Vec::new();
        for effect in &planned.plan.host {
            let run = Where::Vm(Phase::Start);
            let (effect, name, place) = match effect {
                HostEffect::FirewallRule(rule) => {
                    rules.push(rule.clone());
                    continue;
                }
                HostEffect::Forwarding => (forwarding(), None, Where::Host),
                HostEffect::BridgeSysctl { key, value } => {
                    (bridge_sysctl(&bridge, key, value)?, None, Where::Host)
                }
                HostEffect::PublishPort { name, protocol, host_address, host_port, guest_port } => {
                    let Some(guest) = address else { return Err(no_network(cell, "publish a port")) };
                    let host = host_address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
                    if !host.is_loopback() {
                        // Who comes from another network is forwarded.
                        let (effect, place) = (forwarding(), Where::Host);
                        wanted.push(Wanted { effect, name: None, place, directory: None });
                    }
                    let effect = Effect::Port {
                        table: table.clone(),
                        bridge: bridge.clone(),
                        owner: format!("{owner}/{}", name.0),
                        protocol: *protocol,
                        host: SocketAddr::new(host, host_port.unwrap_or(0)),
                        guest: SocketAddrV4::new(guest, *guest_port),
                    };
                    (effect, Some(name), run)
                }
                HostEffect::Disk { name, size_bytes, filesystem, lifetime } => {
                    let (directory, kept) = self.directory_of(plugin, cell.id(), *lifetime);
                    let path = kept.join(format!("{}.img", name.0));
                    let size_bytes = size_bytes.next_multiple_of(1 << 20);
                    let effect = Effect::Disk { path, size_bytes, filesystem: filesystem.clone() };
                    wanted.push(Wanted {
                        effect,
                        name: Some(name.clone()),
                        place: place(*lifetime),
                        directory,
                    });
                    continue;
                }
                HostEffect::File { path, content, mode, lifetime } => {
                    let (directory, files) = self.directory_of(plugin, cell.id(), *lifetime);
                    let content = content.clone();
                    let effect = Effect::File { path: files.join(path), mode: *mode, content };
                    let name = Some(RefName(path.clone()));
                    wanted.push(Wanted { effect, name, place: place(*lifetime), directory });
                    continue;
                }
                HostEffect::DnsRecord { name, record_type, ttl_seconds, data } => {
                    let effect = Effect::NameRecord {
                        owner: owner.clone(),
                        name: name.clone(),
                        record_type: *record_type,
                        ttl_seconds: *ttl_seconds,
                        data: data.clone(),
                    };
                    (effect, None, run)
                }
                HostEffect::Tool { name, tool, arguments } => {
                    let Some(found) = planned.plugin.tool(tool, arguments) else {
                        return Err(EngineError::InvalidArgument {
                            message: format!("plugin {plugin} has no tool {tool:?} with these arguments"),
                            hint: "its manifest's grants name its tools".into(),
                        });
                    };
                    let effect = Effect::Tool {
                        owner: format!("{owner}/{}", name.0),
                        program: found.program,
                        arguments: arguments.clone(),
                        undo: found.undo,
                    };
                    (effect, Some(name), run)
                }
            };
            wanted.push(Wanted { effect, name: name.cloned(), place, directory: None });
        }
        if !rules.is_empty() {
            let effect = Effect::Rules { table, bridge, owner, address, rules };
            wanted.push(Wanted { effect, name: None, place: Where::Vm(Phase::Start), directory: None });
        }
        Ok(wanted)
    }

    /// Where a plugin's files are, and the same once more where it goes with the VM or its run.
    fn directory_of(&self, plugin: &str, vm: &VmId, lifetime: Lifetime) -> (Option<PathBuf>, PathBuf) {
        let layout = &self.inner.layout;
        let own = match lifetime {
            Lifetime::Kept => return (None, layout.plugin_kept(plugin)),
            Lifetime::Vm => layout.plugin_vm(plugin, vm),
            Lifetime::Run => layout.plugin_run(plugin, vm),
        };
        (Some(own.clone()), own)
    }

    /// The guest's and the machine's parts, with references turned into what they stand for.
    async fn extras(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        planned: &Planned,
        named: &mut Named,
    ) -> Result<Extras, EngineError> {
        let plugin = planned.plugin.name();
        let mut extras = Extras::default();
        // No journal has what these stand for: it is of the machine of this run.
        let mut made_up = Named::new();
        for part in &planned.plan.machine {
            match part {
                MachinePart::Drive { serial, source, read_only } => {
                    let path = named.get(source).ok_or_else(|| EngineError::InvalidArgument {
                        message: format!(
                            "plugin {plugin}'s drive {serial} refers to {:?}, which it did not plan",
                            source.0
                        ),
                        hint: "a drive's source is a disk or file of the same plugin, by its name".into(),
                    })?;
                    let path = PathBuf::from(path);
                    if !path.is_absolute() {
                        return Err(EngineError::InvalidArgument {
                            message: format!(
                                "plugin {plugin}'s drive {serial} refers to {:?}, which is no file",
                                source.0
                            ),
                            hint: "a drive's source is a disk or file of the same plugin, by its name".into(),
                        });
                    }
                    extras.drives.push(Drive {
                        serial: serial.clone(),
                        path,
                        read_only: *read_only,
                        // What the operator limits is the VM's own disk.
                        limits: DiskLimits::default(),
                    });
                }
                MachinePart::Nic { name } => {
                    if cell.with_record(|record| record.address.is_none()) {
                        return Err(no_network(cell, "have one more interface"));
                    }
                    let tap = self.take_tap(ctx, cell).await?;
                    let mac = mac_of(cell.id(), plugin, &name.0);
                    made_up.insert(name.clone(), mac.clone());
                    extras.nics.push(Nic { tap, mac });
                }
                MachinePart::KernelArgument { argument } => extras.kernel_args.push(argument.clone()),
                MachinePart::MemoryFloor { bytes } => {
                    extras.memory_mib = extras.memory_mib.max(bytes.div_ceil(1 << 20));
                }
                MachinePart::CpuFloor { cpus } => extras.cpus = extras.cpus.max(*cpus),
                MachinePart::Vsock => {
                    let cid = vsock_cid(cell.id())?;
                    made_up.insert(RefName("vsock".into()), cid.to_string());
                    extras.vsock = Some(cid);
                }
            }
        }
        named.extend(made_up);
        for part in &planned.plan.guest {
            self.guest_part(planned, part, &mut extras).await?;
        }
        Ok(extras)
    }

    pub(super) async fn guest_part(
        &self,
        planned: &Planned,
        part: &GuestPart,
        extras: &mut Extras,
    ) -> Result<(), EngineError> {
        match part {
            GuestPart::File { path, content, mode, uid, gid } => {
                let bytes = match content {
                    Content::Bytes(bytes) => bytes.clone(),
                    Content::Blob(name) => planned.plugin.blob(name).await.map_err(EngineError::Plugin)?,
                };
                let (content, base64) = match String::from_utf8(bytes) {
                    Ok(text) => (text, false),
                    Err(error) => {
                        (base64::engine::general_purpose::STANDARD.encode(error.into_bytes()), true)
                    }
                };
                let (path, mode, uid, gid) = (path.clone(), *mode, *uid, *gid);
                extras.files.push(GuestFile { path, mode, uid, gid, content, base64 });
            }
            GuestPart::Environment { name, value } => {
                extras.environment.insert(name.clone(), value.clone());
            }
            GuestPart::HostsEntry { address, names } => {
                extras.hosts.push(HostsEntry { address: *address, names: names.clone() });
            }
            GuestPart::MountDrive { serial, target, filesystem, options } => extras.mounts.push(Mount {
                source: format!("serial:{serial}"),
                target: target.clone(),
                fstype: filesystem.clone(),
                options: options.clone(),
            }),
            GuestPart::Mount { filesystem, target, options } => extras.mounts.push(Mount {
                source: filesystem.clone(),
                target: target.clone(),
                fstype: filesystem.clone(),
                options: options.clone(),
            }),
            GuestPart::KernelModule { name } => extras.modules.push(name.clone()),
            GuestPart::Unit { name, content } => {
                extras.units.push(Unit { name: name.clone(), content: content.clone() });
            }
            GuestPart::BootCommand { command } => extras.boot_commands.push(command.clone()),
        }
        Ok(())
    }
}

async fn ids(ctx: &mut Ctx<Unlocked>, cell: &Cell) -> HashSet<EffectId> {
    cell.scope.look(ctx, |entries| entries.iter().map(|entry| entry.effect.id()).collect()).await
}

fn place(lifetime: Lifetime) -> Where {
    match lifetime {
        Lifetime::Run => Where::Vm(Phase::Start),
        Lifetime::Vm => Where::Vm(Phase::Create),
        Lifetime::Kept => Where::Kept,
    }
}

fn forwarding() -> Effect {
    Effect::Sysctl { key: "net/ipv4/ip_forward".into(), value: "1".into() }
}

/// `ipv4/rp_filter` is the bridge's `net/ipv4/conf/BRIDGE/rp_filter`.
fn bridge_sysctl(bridge: &str, key: &str, value: &str) -> Result<Effect, EngineError> {
    match key.split_once('/') {
        Some((family @ ("ipv4" | "ipv6"), name)) => {
            Ok(Effect::Sysctl { key: format!("net/{family}/conf/{bridge}/{name}"), value: value.into() })
        }
        _ => Err(EngineError::InvalidArgument {
            message: format!("{key:?} is no setting of a bridge"),
            hint: "it is written like ipv4/rp_filter".into(),
        }),
    }
}

fn no_network(cell: &Cell, what: &str) -> EngineError {
    EngineError::InvalidArgument {
        message: format!("VM {} has no network, so it cannot {what}", cell.name()),
        hint: "make it with a network (without `--network none`)".into(),
    }
}

/// A locally administered address of its own (IEEE 802, 02:01:…); the VM's first one begins with 02:00.
fn mac_of(vm: &VmId, plugin: &str, name: &str) -> String {
    let digest = Sha256::digest(format!("{vm}/{plugin}/{name}"));
    let hex: Vec<String> = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("02:01:{}", hex.join(":"))
}

/// A context id of the VM's own, beyond those that are reserved (vsock(7)).
fn vsock_cid(vm: &VmId) -> Result<u32, EngineError> {
    if !std::path::Path::new("/dev/vhost-vsock").exists() {
        return Err(EngineError::InvalidArgument {
            message: "this host has no /dev/vhost-vsock".into(),
            hint: "load the kernel module vhost_vsock".into(),
        });
    }
    let digest = Sha256::digest(vm.as_str());
    let [a, b, c, d, ..] = digest[..] else { return Ok(u32::MAX - 1) };
    Ok((u32::from_be_bytes([a, b, c, d]) | 0x1_0000) & 0x7fff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_setting_is_the_bridges_own() {
        let Ok(Effect::Sysctl { key, .. }) = bridge_sysctl("vmbr-1", "ipv4/rp_filter", "1") else {
            panic!("refused")
        };
        assert_eq!(key, "net/ipv4/conf/vmbr-1/rp_filter");
        assert!(bridge_sysctl("vmbr-1", "core/somaxconn", "1").is_err());
    }

    #[test]
    fn interfaces_of_two_plugins_differ() {
        let vm: VmId = "00112233aabb".parse().unwrap();
        assert_ne!(mac_of(&vm, "a", "x"), mac_of(&vm, "b", "x"));
        assert!(mac_of(&vm, "a", "x").starts_with("02:01:"));
    }
}
