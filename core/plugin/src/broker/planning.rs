//! Interface `plan`: effects are checked for form, counted, and kept.

use std::fmt;

use wasmtime::component::Resource;

use super::{Answer, BlobHandle, Call, GuestConfig, HostPlan, MachineConfig, Reference, RuleHandle};
use crate::{
    bindings::vm::plugin::{plan, types},
    error::{Excess, PluginError},
    forms,
    plan::{
        Answer as RuleAnswer, Chain, Condition, ConnectionState, Content, Device, GuestPart, HostEffect,
        Lifetime, MachinePart, Plan, Protocol, RefName, Rule, Transport,
    },
};

/// A host effect; rules are still in the making.
enum Step {
    Effect(HostEffect),
    Rule(RuleDraft),
}

/// A rule whose conditions and answer come one by one.
pub(crate) struct RuleDraft {
    chain: Chain,
    conditions: Vec<Condition>,
    answer: Option<RuleAnswer>,
}

/// All that was planned so far.
#[derive(Default)]
pub(super) struct Planned {
    machine: Vec<MachinePart>,
    guest: Vec<GuestPart>,
    host: Vec<Step>,
    effects: usize,
    bytes: usize,
}

impl Planned {
    pub(super) fn finish(self) -> Result<Plan, String> {
        let finish = |step| match step {
            Step::Effect(effect) => Ok(effect),
            Step::Rule(draft) => draft.finish().map(HostEffect::FirewallRule),
        };
        Ok(Plan {
            machine: self.machine,
            guest: self.guest,
            host: self.host.into_iter().map(finish).collect::<Result<_, _>>()?,
        })
    }
}

impl RuleDraft {
    /// The rule, if it is one: what it must not be is a surprise to whoever granted its chain.
    fn finish(self) -> Result<Rule, String> {
        let Self { chain, conditions, answer } = self;
        let wrong = |what: &str| Err(format!("a firewall rule in {chain:?} {what}").to_lowercase());
        let Some(answer) = answer else { return wrong("has no answer") };
        if conditions.is_empty() {
            return wrong("has no condition, it would be for all packets");
        }
        let with_ports = conditions
            .iter()
            .any(|condition| matches!(condition, Condition::Protocol(Protocol::Tcp | Protocol::Udp)));
        let ports = conditions.iter().any(|condition| matches!(condition, Condition::DestinationPorts(..)));
        let fits = match &answer {
            RuleAnswer::Masquerade => chain == Chain::Postrouting,
            RuleAnswer::Redirect(_, port) => {
                if port.is_some() && !with_ports {
                    return wrong("redirects to a port and has no protocol with ports");
                }
                matches!(chain, Chain::Prerouting | Chain::Output)
            }
            RuleAnswer::Accept | RuleAnswer::Deny => true,
            RuleAnswer::Reject => matches!(chain, Chain::Input | Chain::Forward | Chain::Output),
        };
        if !fits {
            return wrong(&format!("cannot answer with {answer:?}"));
        }
        if ports && !with_ports {
            return wrong("has ports and no protocol with ports");
        }
        let (mut v4, mut v6) = (false, false);
        for condition in &conditions {
            if let Condition::Source(network) | Condition::Destination(network) = condition {
                v4 |= network.address.is_ipv4();
                v6 |= network.address.is_ipv6();
            }
        }
        if let RuleAnswer::Redirect(address, _) = &answer {
            v4 |= address.is_ipv4();
            v6 |= address.is_ipv6();
        }
        if v4 && v6 {
            return wrong("speaks of IPv4 and IPv6 at once");
        }
        let (no_in, no_out) = (
            matches!(chain, Chain::Output | Chain::Postrouting),
            matches!(chain, Chain::Input | Chain::Prerouting),
        );
        for condition in &conditions {
            match condition {
                Condition::FromDevice(_) if no_in => return wrong("cannot know where a packet came in"),
                Condition::ToDevice(_) if no_out => return wrong("cannot know where a packet goes out"),
                _ => {}
            }
        }
        Ok(Rule { chain, conditions, answer })
    }
}

/// One of a set of words.
fn choice<T: serde::de::DeserializeOwned>(what: &str, word: &str) -> Result<T, PluginError> {
    serde_json::from_value(serde_json::Value::String(word.to_owned()))
        .map_err(|error| PluginError::new("bad.word", format!("{word:.100?} is no {what}: {error}")))
}

impl From<types::Lifetime> for Lifetime {
    fn from(lifetime: types::Lifetime) -> Self {
        match lifetime {
            types::Lifetime::Run => Self::Run,
            types::Lifetime::Vm => Self::Vm,
            types::Lifetime::Kept => Self::Kept,
        }
    }
}

impl Call {
    /// Makes room for one more effect. Going on after too many is of no use, so it ends the call.
    fn count(&mut self, bytes: usize) -> Result<(), Excess> {
        let limits = &self.identity.limits;
        if self.planned.effects >= limits.effects {
            return Err(Excess::Effects(limits.effects));
        }
        let bytes = self.planned.bytes.saturating_add(bytes);
        if bytes > limits.effect_bytes {
            return Err(Excess::EffectBytes(limits.effect_bytes));
        }
        self.planned.effects += 1;
        self.planned.bytes = bytes;
        Ok(())
    }

    fn texts(&self, texts: &[String]) -> Result<(), PluginError> {
        if texts.len() > 256 {
            return Err(PluginError::new(
                "bad.length",
                format!("a list of {}; the most is 256", texts.len()),
            ));
        }
        texts.iter().try_for_each(|text| self.text(text))
    }

    fn plan_machine(&mut self, part: MachinePart) -> Answer {
        self.count(0)?;
        self.planned.machine.push(part);
        Ok(())
    }

    fn plan_guest(&mut self, bytes: usize, part: GuestPart) -> Answer {
        self.count(bytes)?;
        self.planned.guest.push(part);
        Ok(())
    }

    fn plan_host(&mut self, bytes: usize, effect: HostEffect) -> Answer {
        self.count(bytes)?;
        self.planned.host.push(Step::Effect(effect));
        Ok(())
    }

    fn draft(&mut self, rule: &Resource<RuleHandle>) -> wasmtime::Result<&mut RuleDraft> {
        let index = self.table.get(rule)?.0;
        match self.planned.host.get_mut(index) {
            Some(Step::Rule(draft)) => Ok(draft),
            _ => Err(wasmtime::Error::msg("a rule that was never begun")),
        }
    }

    fn condition(&mut self, rule: &Resource<RuleHandle>, condition: Condition) -> Answer {
        let draft = self.draft(rule)?;
        if draft.conditions.len() >= 16 {
            return Err(PluginError::new("rule.conditions", "a rule has at most 16 conditions").into());
        }
        draft.conditions.push(condition);
        Ok(())
    }

    fn answer(&mut self, rule: &Resource<RuleHandle>, answer: RuleAnswer) -> Answer {
        let draft = self.draft(rule)?;
        if let Some(before) = &draft.answer {
            let both = format!("a rule has one answer; this one is already {before:?}").to_lowercase();
            return Err(PluginError::new("rule.answers", both).into());
        }
        draft.answer = Some(answer);
        Ok(())
    }

    fn guest_file(&mut self, path: String, content: Content, (mode, uid, gid): (u32, u32, u32)) -> Answer {
        forms::absolute_path(&path)?;
        forms::mode(mode)?;
        let bytes = path.len()
            + match &content {
                Content::Bytes(bytes) => bytes.len(),
                Content::Blob(name) => name.len(),
            };
        self.plan_guest(bytes, GuestPart::File { path, content, mode, uid, gid })
    }

    fn mount_form(&self, filesystem: &str, target: &str, options: &[String]) -> Result<(), PluginError> {
        forms::identifier("filesystem", filesystem)?;
        forms::absolute_path(target)?;
        self.texts(options)?;
        options.iter().try_for_each(|option| forms::word("mount option", option))
    }
}

fn total(texts: &[String]) -> usize {
    texts.iter().map(String::len).sum()
}

impl fmt::Debug for RuleDraft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuleDraft").field("chain", &self.chain).finish_non_exhaustive()
    }
}

impl plan::Host for Call {}

impl plan::HostMachineConfig for Call {
    fn drive(
        &mut self,
        _: Resource<MachineConfig>,
        serial: String,
        source: Resource<Reference>,
        read_only: bool,
    ) -> Answer {
        forms::serial(&serial)?;
        let source = RefName(self.table.get(&source).map_err(wasmtime::Error::from)?.0.clone());
        self.plan_machine(MachinePart::Drive { serial, source, read_only })
    }

    fn nic(&mut self, _: Resource<MachineConfig>, name: String) -> Answer<Resource<Reference>> {
        forms::name(&name)?;
        self.plan_machine(MachinePart::Nic { name: RefName(name.clone()) })?;
        self.reference(&name)
    }

    fn kernel_argument(&mut self, _: Resource<MachineConfig>, argument: String) -> Answer {
        forms::kernel_argument(&argument)?;
        self.plan_machine(MachinePart::KernelArgument { argument })
    }

    fn memory_floor(&mut self, _: Resource<MachineConfig>, bytes: u64) -> Answer {
        self.plan_machine(MachinePart::MemoryFloor { bytes })
    }

    fn cpu_floor(&mut self, _: Resource<MachineConfig>, cpus: u32) -> Answer {
        self.plan_machine(MachinePart::CpuFloor { cpus })
    }

    fn vsock(&mut self, _: Resource<MachineConfig>) -> Answer<Resource<Reference>> {
        self.plan_machine(MachinePart::Vsock)?;
        self.reference("vsock")
    }

    fn drop(&mut self, _: Resource<MachineConfig>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl plan::HostGuestConfig for Call {
    fn file(
        &mut self,
        _: Resource<GuestConfig>,
        path: String,
        content: Vec<u8>,
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> Answer {
        self.guest_file(path, Content::Bytes(content), (mode, uid, gid))
    }

    fn file_from_blob(
        &mut self,
        _: Resource<GuestConfig>,
        path: String,
        content: Resource<BlobHandle>,
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> Answer {
        let name = self.table.get(&content).map_err(wasmtime::Error::from)?.0.clone();
        // Every blob of a hook that plans has a name; one that came from a guest has none.
        let name =
            name.ok_or_else(|| PluginError::new("blob.unnamed", "only a file that came with the plugin"))?;
        self.guest_file(path, Content::Blob(name), (mode, uid, gid))
    }

    fn environment(&mut self, _: Resource<GuestConfig>, name: String, value: String) -> Answer {
        forms::variable(&name)?;
        forms::line("value of a variable", &value)?;
        self.text(&value)?;
        self.plan_guest(name.len() + value.len(), GuestPart::Environment { name, value })
    }

    fn hosts_entry(&mut self, _: Resource<GuestConfig>, address: String, names: Vec<String>) -> Answer {
        let address = forms::address(&address)?;
        self.texts(&names)?;
        if names.is_empty() {
            return Err(PluginError::new("bad.names", "an address without a name").into());
        }
        names.iter().try_for_each(|name| forms::domain(name))?;
        self.plan_guest(total(&names), GuestPart::HostsEntry { address, names })
    }

    fn mount_drive(
        &mut self,
        _: Resource<GuestConfig>,
        serial: String,
        target: String,
        filesystem: String,
        options: Vec<String>,
    ) -> Answer {
        forms::serial(&serial)?;
        self.mount_form(&filesystem, &target, &options)?;
        let bytes = target.len() + total(&options);
        self.plan_guest(bytes, GuestPart::MountDrive { serial, target, filesystem, options })
    }

    fn mount(
        &mut self,
        _: Resource<GuestConfig>,
        filesystem: String,
        target: String,
        options: Vec<String>,
    ) -> Answer {
        self.mount_form(&filesystem, &target, &options)?;
        let bytes = target.len() + total(&options);
        self.plan_guest(bytes, GuestPart::Mount { filesystem, target, options })
    }

    fn kernel_module(&mut self, _: Resource<GuestConfig>, name: String) -> Answer {
        forms::identifier("kernel module", &name)?;
        self.plan_guest(name.len(), GuestPart::KernelModule { name })
    }

    fn unit(&mut self, _: Resource<GuestConfig>, name: String, content: String) -> Answer {
        forms::unit(&name)?;
        if content.contains('\0') {
            return Err(PluginError::new("bad.unit", "a unit holds no NUL").into());
        }
        self.plan_guest(name.len() + content.len(), GuestPart::Unit { name, content })
    }

    fn boot_command(&mut self, _: Resource<GuestConfig>, command: Vec<String>) -> Answer {
        self.texts(&command)?;
        if command.first().is_none_or(String::is_empty) || command.iter().any(|text| text.contains('\0')) {
            return Err(
                PluginError::new("bad.command", "a command begins with a program and holds no NUL").into()
            );
        }
        self.plan_guest(total(&command), GuestPart::BootCommand { command })
    }

    fn drop(&mut self, _: Resource<GuestConfig>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl plan::HostHostPlan for Call {
    fn firewall_rule(&mut self, _: Resource<HostPlan>, chain: String) -> Answer<Resource<RuleHandle>> {
        let chain = choice("chain", &chain)?;
        self.count(0)?;
        self.planned.host.push(Step::Rule(RuleDraft { chain, conditions: Vec::new(), answer: None }));
        Ok(self.push(RuleHandle(self.planned.host.len() - 1))?)
    }

    fn forwarding(&mut self, _: Resource<HostPlan>) -> Answer {
        self.plan_host(0, HostEffect::Forwarding)
    }

    fn publish_port(
        &mut self,
        _: Resource<HostPlan>,
        name: String,
        protocol: String,
        host_address: Option<String>,
        host_port: Option<u16>,
        guest_port: u16,
    ) -> Answer<Resource<Reference>> {
        forms::name(&name)?;
        let protocol: Transport = choice("protocol with ports", &protocol)?;
        let host_address = host_address.as_deref().map(forms::address).transpose()?;
        if host_port == Some(0) || guest_port == 0 {
            return Err(PluginError::new(
                "bad.port",
                "0 is no port; leave the host's out to have one chosen",
            )
            .into());
        }
        let goes_by = RefName(name.clone());
        self.plan_host(
            0,
            HostEffect::PublishPort { name: goes_by, protocol, host_address, host_port, guest_port },
        )?;
        self.reference(&name)
    }

    fn disk(
        &mut self,
        _: Resource<HostPlan>,
        name: String,
        size_bytes: u64,
        filesystem: Option<String>,
        lifetime: types::Lifetime,
    ) -> Answer<Resource<Reference>> {
        forms::name(&name)?;
        if filesystem.as_deref().is_some_and(|filesystem| filesystem != "ext4") {
            return Err(PluginError::new("disk.filesystem", "the only filesystem made here is ext4").into());
        }
        if size_bytes < 1 << 20 {
            return Err(PluginError::new("disk.too-small", "the smallest disk has 1 MiB").into());
        }
        let goes_by = RefName(name.clone());
        self.plan_host(
            0,
            HostEffect::Disk { name: goes_by, size_bytes, filesystem, lifetime: lifetime.into() },
        )?;
        self.reference(&name)
    }

    fn dns_record(
        &mut self,
        _: Resource<HostPlan>,
        name: String,
        record_type: u16,
        ttl_seconds: u32,
        data: String,
    ) -> Answer {
        forms::domain(&name)?;
        forms::line("data of a record", &data)?;
        self.text(&data)?;
        self.plan_host(data.len(), HostEffect::DnsRecord { name, record_type, ttl_seconds, data })
    }

    fn bridge_sysctl(&mut self, _: Resource<HostPlan>, key: String, value: String) -> Answer {
        forms::bridge_sysctl(&key)?;
        forms::line("value of a setting", &value)?;
        self.text(&value)?;
        self.plan_host(value.len(), HostEffect::BridgeSysctl { key, value })
    }

    fn tool(
        &mut self,
        _: Resource<HostPlan>,
        name: String,
        tool: String,
        arguments: Vec<String>,
    ) -> Answer<Resource<Reference>> {
        forms::name(&name)?;
        forms::identifier("tool", &tool)?;
        self.texts(&arguments)?;
        arguments.iter().try_for_each(|argument| forms::line("argument", argument))?;
        let goes_by = RefName(name.clone());
        self.plan_host(total(&arguments), HostEffect::Tool { name: goes_by, tool, arguments })?;
        self.reference(&name)
    }

    fn file(
        &mut self,
        _: Resource<HostPlan>,
        path: String,
        content: Vec<u8>,
        mode: u32,
        lifetime: types::Lifetime,
    ) -> Answer<Resource<Reference>> {
        forms::relative_path(&path)?;
        forms::mode(mode)?;
        let name = path.clone();
        self.plan_host(content.len(), HostEffect::File { path, content, mode, lifetime: lifetime.into() })?;
        Ok(self.push(Reference(name))?)
    }

    fn drop(&mut self, _: Resource<HostPlan>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl plan::HostRule for Call {
    fn from_device(&mut self, this: Resource<RuleHandle>, device: String) -> Answer {
        self.condition(&this, Condition::FromDevice(choice::<Device>("device", &device)?))
    }

    fn to_device(&mut self, this: Resource<RuleHandle>, device: String) -> Answer {
        self.condition(&this, Condition::ToDevice(choice::<Device>("device", &device)?))
    }

    fn source(&mut self, this: Resource<RuleHandle>, network: String) -> Answer {
        self.condition(&this, Condition::Source(forms::network(&network)?))
    }

    fn destination(&mut self, this: Resource<RuleHandle>, network: String) -> Answer {
        self.condition(&this, Condition::Destination(forms::network(&network)?))
    }

    fn protocol(&mut self, this: Resource<RuleHandle>, protocol: String) -> Answer {
        self.condition(&this, Condition::Protocol(choice("protocol", &protocol)?))
    }

    fn destination_ports(&mut self, this: Resource<RuleHandle>, first: u16, last: u16) -> Answer {
        if first == 0 || first > last {
            return Err(
                PluginError::new("bad.port", format!("{first} to {last} is no range of ports")).into()
            );
        }
        self.condition(&this, Condition::DestinationPorts(first, last))
    }

    fn connection_states(&mut self, this: Resource<RuleHandle>, states: Vec<String>) -> Answer {
        if states.is_empty() || states.len() > 4 {
            return Err(PluginError::new("bad.states", "one to four states").into());
        }
        let states: Result<Vec<ConnectionState>, _> =
            states.iter().map(|state| choice("connection state", state)).collect();
        self.condition(&this, Condition::States(states?))
    }

    fn accept(&mut self, this: Resource<RuleHandle>) -> Answer {
        self.answer(&this, RuleAnswer::Accept)
    }

    fn deny(&mut self, this: Resource<RuleHandle>) -> Answer {
        self.answer(&this, RuleAnswer::Deny)
    }

    fn reject(&mut self, this: Resource<RuleHandle>) -> Answer {
        self.answer(&this, RuleAnswer::Reject)
    }

    fn masquerade(&mut self, this: Resource<RuleHandle>) -> Answer {
        self.answer(&this, RuleAnswer::Masquerade)
    }

    fn redirect(&mut self, this: Resource<RuleHandle>, address: String, port: Option<u16>) -> Answer {
        if port == Some(0) {
            return Err(PluginError::new("bad.port", "0 is no port").into());
        }
        self.answer(&this, RuleAnswer::Redirect(forms::address(&address)?, port))
    }

    fn drop(&mut self, this: Resource<RuleHandle>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}
