//! Grants: what a plugin may plan. The manifest asks, the operator grants, and both must cover an effect.
//!
//! Every effect is turned into the smallest grant that would allow it; the question is then whether a given grant covers
//! that one. So a denial can always say what to write into the manifest.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::plan::{Chain, GuestPart, HostEffect, Lifetime, MachinePart, Plan};

/// Text with at most one `*`, which stands for anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(String);

impl Pattern {
    /// The pattern that matches one text only.
    fn literal(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// What `*` stands for in this text, if it fits.
    fn star<'a>(&self, text: &'a str) -> Option<&'a str> {
        match self.0.split_once('*') {
            Some((before, after)) => text.strip_prefix(before)?.strip_suffix(after),
            None => (self.0 == text).then_some(""),
        }
    }

    /// Whether the text fits.
    pub fn matches(&self, text: &str) -> bool {
        self.star(text).is_some()
    }

    /// Whether the text fits and `*` stands for a plain word: nothing that is a path, an option or another argument.
    pub fn matches_word(&self, text: &str) -> bool {
        self.star(text).is_some_and(|word| {
            let option = self.0.starts_with('*') && word.starts_with('-');
            !option
                && !word.contains("..")
                && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-'))
        })
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        if text.matches('*').count() > 1 {
            return Err(format!("{text:?} has more than one *"));
        }
        if text.is_empty() {
            return Err("a pattern is not empty".to_owned());
        }
        Ok(Self(text))
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> String {
        pattern.0
    }
}

fn lowest_port() -> u16 {
    1024
}

fn highest_port() -> u16 {
    u16::MAX
}

/// One thing that a plugin may do, as it stands in the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub enum Grant {
    /// Firewall rules in these chains of the host's own table.
    Firewall {
        /// Which.
        chains: Vec<Chain>,
    },
    /// Forwarding between bridge and other networks.
    Forwarding {},
    /// Ports of the host that lead to the guest.
    PublishPort {
        /// The lowest.
        #[serde(default = "lowest_port")]
        first: u16,
        /// The highest.
        #[serde(default = "highest_port")]
        last: u16,
        /// On addresses beyond loopback too.
        #[serde(default)]
        any_address: bool,
    },
    /// Disks of its own.
    Disk {
        /// The largest.
        max_bytes: u64,
        /// They may outlive the VM.
        #[serde(default)]
        kept: bool,
    },
    /// Records in the host's zone.
    DnsRecord {
        /// Their names.
        names: Vec<Pattern>,
    },
    /// Settings of the bridge.
    BridgeSysctl {
        /// Family and name.
        keys: Vec<Pattern>,
    },
    /// A tool of the host. Must be idempotent.
    Tool {
        /// What the plugin calls it.
        name: String,
        /// Absolute path.
        program: String,
        /// One pattern for each argument.
        arguments: Vec<Pattern>,
        /// The arguments that undo it; `{1}` stands for the first argument.
        undo: Vec<String>,
    },
    /// Files in its own directory.
    HostFile {},
    /// Drives of the machine.
    Drive {},
    /// Network interfaces beyond the first.
    Nic {},
    /// Kernel arguments.
    KernelArgument {
        /// Which.
        arguments: Vec<Pattern>,
    },
    /// A floor for memory and processors.
    MachineSize {
        /// The highest floor for memory.
        max_memory_bytes: u64,
        /// The highest floor for processors.
        max_cpus: u32,
    },
    /// A vsock device.
    Vsock {},
    /// Files in the guest. `*` stands for any path.
    GuestFile {
        /// Which.
        paths: Vec<Pattern>,
    },
    /// Variables in the guest's environment.
    GuestEnvironment {
        /// Which.
        names: Vec<Pattern>,
    },
    /// Lines of the guest's hosts file.
    GuestHosts {
        /// Their names.
        names: Vec<Pattern>,
    },
    /// Mounts in the guest.
    GuestMount {
        /// Where.
        targets: Vec<Pattern>,
    },
    /// Kernel modules in the guest.
    GuestModule {
        /// Which.
        names: Vec<Pattern>,
    },
    /// Systemd units in the guest.
    GuestUnit {
        /// Which.
        names: Vec<Pattern>,
    },
    /// Commands at the guest's boot.
    GuestCommand {},
    /// Commands and files in the running guest.
    GuestLive {},
    /// Looking at the repository that a workspace is made of.
    Repository {},
    /// The time of the call.
    Clock {},
    /// Random bytes.
    Random {},
}

fn all_match(patterns: &[Pattern], needed: &[Pattern]) -> bool {
    needed.iter().all(|text| patterns.iter().any(|pattern| pattern == text || pattern.matches(&text.0)))
}

impl Grant {
    /// Whether this one allows all that the other one allows.
    pub fn covers(&self, need: &Self) -> bool {
        match (self, need) {
            (Self::Firewall { chains }, Self::Firewall { chains: need }) => {
                need.iter().all(|chain| chains.contains(chain))
            }
            (
                Self::PublishPort { first, last, any_address },
                Self::PublishPort { first: need_first, last: need_last, any_address: need_any },
            ) => first <= need_first && need_last <= last && (*any_address || !need_any),
            (Self::Disk { max_bytes, kept }, Self::Disk { max_bytes: need_bytes, kept: need_kept }) => {
                need_bytes <= max_bytes && (*kept || !need_kept)
            }
            (
                Self::Tool { name, arguments, .. },
                Self::Tool { name: need_name, arguments: need_arguments, .. },
            ) => {
                name == need_name
                    && arguments.len() == need_arguments.len()
                    && arguments
                        .iter()
                        .zip(need_arguments)
                        .all(|(pattern, text)| pattern == text || pattern.matches_word(&text.0))
            }
            (
                Self::MachineSize { max_memory_bytes, max_cpus },
                Self::MachineSize { max_memory_bytes: need_memory, max_cpus: need_cpus },
            ) => need_memory <= max_memory_bytes && need_cpus <= max_cpus,
            (Self::DnsRecord { names }, Self::DnsRecord { names: need })
            | (Self::GuestEnvironment { names }, Self::GuestEnvironment { names: need })
            | (Self::GuestHosts { names }, Self::GuestHosts { names: need })
            | (Self::GuestModule { names }, Self::GuestModule { names: need })
            | (Self::GuestUnit { names }, Self::GuestUnit { names: need }) => all_match(names, need),
            (Self::BridgeSysctl { keys }, Self::BridgeSysctl { keys: need }) => all_match(keys, need),
            (Self::KernelArgument { arguments }, Self::KernelArgument { arguments: need }) => {
                all_match(arguments, need)
            }
            (Self::GuestFile { paths }, Self::GuestFile { paths: need }) => all_match(paths, need),
            (Self::GuestMount { targets }, Self::GuestMount { targets: need }) => all_match(targets, need),
            _ => self == need,
        }
    }

    /// Its kind, as it stands in the manifest.
    pub fn kind(&self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        value["kind"].as_str().unwrap_or_default().to_owned()
    }

    /// All of it but the kind, for people, in the manifest's form: `first = 80, last = 90`.
    pub fn detail(&self) -> String {
        let mut table = toml::Table::try_from(self).unwrap_or_default();
        table.remove("kind");
        table.iter().map(|(key, value)| format!("{key} = {value}")).collect::<Vec<_>>().join(", ")
    }

    /// The grant as one line of a manifest.
    pub fn line(&self) -> String {
        let mut table = toml::Table::try_from(self).unwrap_or_default();
        table.insert("reason".to_owned(), toml::Value::String("…".to_owned()));
        toml::Value::Table(table).to_string()
    }

    fn of_machine(part: &MachinePart) -> Self {
        match part {
            MachinePart::Drive { .. } => Self::Drive {},
            MachinePart::Nic { .. } => Self::Nic {},
            MachinePart::KernelArgument { argument } => {
                Self::KernelArgument { arguments: vec![Pattern::literal(argument)] }
            }
            MachinePart::MemoryFloor { bytes } => Self::MachineSize { max_memory_bytes: *bytes, max_cpus: 0 },
            MachinePart::CpuFloor { cpus } => Self::MachineSize { max_memory_bytes: 0, max_cpus: *cpus },
            MachinePart::Vsock => Self::Vsock {},
        }
    }

    fn of_guest(part: &GuestPart) -> Self {
        match part {
            GuestPart::File { path, .. } => Self::GuestFile { paths: vec![Pattern::literal(path)] },
            GuestPart::Environment { name, .. } => {
                Self::GuestEnvironment { names: vec![Pattern::literal(name)] }
            }
            GuestPart::HostsEntry { names, .. } => {
                Self::GuestHosts { names: names.iter().map(|name| Pattern::literal(name)).collect() }
            }
            GuestPart::MountDrive { target, .. } | GuestPart::Mount { target, .. } => {
                Self::GuestMount { targets: vec![Pattern::literal(target)] }
            }
            GuestPart::KernelModule { name } => Self::GuestModule { names: vec![Pattern::literal(name)] },
            GuestPart::Unit { name, .. } => Self::GuestUnit { names: vec![Pattern::literal(name)] },
            GuestPart::BootCommand { .. } => Self::GuestCommand {},
        }
    }

    fn of_host(effect: &HostEffect) -> Self {
        match effect {
            HostEffect::FirewallRule(rule) => Self::Firewall { chains: vec![rule.chain] },
            HostEffect::Forwarding => Self::Forwarding {},
            HostEffect::PublishPort { host_address, host_port, .. } => Self::PublishPort {
                // One that the host chooses is of those any user may have.
                first: host_port.unwrap_or(highest_port()),
                last: host_port.unwrap_or(highest_port()),
                any_address: host_address.is_some_and(|address| !address.is_loopback()),
            },
            HostEffect::Disk { size_bytes, lifetime, .. } => {
                Self::Disk { max_bytes: *size_bytes, kept: *lifetime == Lifetime::Kept }
            }
            HostEffect::DnsRecord { name, .. } => Self::DnsRecord { names: vec![Pattern::literal(name)] },
            HostEffect::BridgeSysctl { key, .. } => Self::BridgeSysctl { keys: vec![Pattern::literal(key)] },
            HostEffect::Tool { tool, arguments, .. } => Self::Tool {
                name: tool.clone(),
                program: format!("/usr/bin/{tool}"),
                arguments: arguments.iter().map(|argument| Pattern::literal(argument)).collect(),
                undo: Vec::new(),
            },
            HostEffect::File { .. } => Self::HostFile {},
        }
    }
}

/// A manifest's request for a grant, with the author's reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Request {
    /// What.
    #[serde(flatten)]
    pub grant: Grant,
    /// Why, for the operator.
    pub reason: String,
}

/// What the operator granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Granted {
    /// All that the manifest asks for.
    All,
    /// These.
    These(Vec<Grant>),
}

impl Granted {
    /// Whether it allows all that a grant allows.
    pub fn covers(&self, need: &Grant) -> bool {
        match self {
            Self::All => true,
            Self::These(grants) => grants.iter().any(|grant| grant.covers(need)),
        }
    }

    /// Whether a request asks for nothing that was not granted already. A tool is another one if its program or what undoes it is.
    pub fn includes(&self, request: &Grant) -> bool {
        match (self, request) {
            (Self::These(grants), Grant::Tool { .. }) => grants.contains(request),
            _ => self.covers(request),
        }
    }
}

/// An effect that is not covered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// The smallest grant that would cover it.
    pub need: Grant,
    /// Whether the manifest asks for it, so that only the operator's word is missing.
    pub requested: bool,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who =
            if self.requested { "the operator has not granted" } else { "its manifest does not ask for" };
        write!(f, "{who} {}", self.need.line())
    }
}

impl Denial {
    /// What to do about it.
    pub fn hint(&self) -> String {
        if self.requested {
            format!("install it again and grant {}", self.need.line())
        } else {
            format!(
                "its author can ask for it with this line among `grants` in plugin.toml: {}",
                self.need.line()
            )
        }
    }
}

/// Requests and grants of one plugin, together.
#[derive(Debug, Clone)]
pub struct Grants {
    requested: Vec<Request>,
    granted: Granted,
}

impl Grants {
    /// What a manifest asks for and what the operator granted.
    pub fn new(requested: Vec<Request>, granted: Granted) -> Self {
        Self { requested, granted }
    }

    /// Whether something may be done.
    ///
    /// # Errors
    /// What is missing, and whose word.
    pub fn permit(&self, need: &Grant) -> Result<(), Box<Denial>> {
        let requested = self.requested.iter().any(|request| request.grant.covers(need));
        if requested && self.granted.covers(need) {
            Ok(())
        } else {
            Err(Box::new(Denial { need: need.clone(), requested }))
        }
    }

    /// Whether everything of a plan may be done.
    ///
    /// # Errors
    /// The first thing that may not.
    pub fn check(&self, plan: &Plan) -> Result<(), Box<Denial>> {
        let needs = plan
            .machine
            .iter()
            .map(Grant::of_machine)
            .chain(plan.guest.iter().map(Grant::of_guest))
            .chain(plan.host.iter().map(Grant::of_host));
        needs.into_iter().try_for_each(|need| self.permit(&need))
    }

    /// What the manifest asks for, in its order, and whether the operator has granted it.
    pub fn requests(&self) -> impl Iterator<Item = (&Request, bool)> {
        self.requested.iter().map(|request| (request, self.granted.includes(&request.grant)))
    }

    /// The requests the operator has not granted, in the manifest's order: what an upgrade has to ask about.
    pub fn missing(&self) -> impl Iterator<Item = &Request> {
        self.requests().filter(|(_, granted)| !granted).map(|(request, _)| request)
    }

    /// The tool of a name, as the manifest has it, for these arguments.
    pub fn tool(&self, name: &str, arguments: &[String]) -> Option<&Grant> {
        let need = Grant::of_host(&HostEffect::Tool {
            name: crate::plan::RefName(String::new()),
            tool: name.to_owned(),
            arguments: arguments.to_vec(),
        });
        self.requested.iter().map(|request| &request.grant).find(|grant| grant.covers(&need))
    }
}
