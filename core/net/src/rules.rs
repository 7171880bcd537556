//! Plugins' rules in the daemon's table.
//!
//! All rules of one effect are added in one transaction, behind those that are there, and carry the comment
//! `vmd-plugin OWNER FINGERPRINT`, by which they are found and deleted. Which chains an answer belongs to is told in
//! [`crate::firewall`].

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use serde_json::{Value, json};
use vm_types::{
    Effect, Handle, Observed,
    plan::{Answer, Chain, Condition, ConnectionState, Device, Network, Protocol, Rule},
};

use crate::{
    NetError,
    nft::{Mark, Placed, accept, connection, drop, field, fingerprint, has_chains, matches, meta, reject},
};

pub(crate) const KIND: &str = "vmd-plugin";

pub(crate) const CHAINS: [&str; 8] = [
    "plugin_prerouting",
    "plugin_nat_prerouting",
    "plugin_forward",
    "plugin_input",
    "plugin_output",
    "plugin_nat_output",
    "plugin_postrouting",
    "plugin_nat_postrouting",
];

/// [`Effect::Rules`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules<'a> {
    pub(crate) table: &'a str,
    bridge: &'a str,
    owner: &'a str,
    address: Option<Ipv4Addr>,
    rules: &'a [Rule],
}

impl<'a> Rules<'a> {
    pub(crate) fn of(effect: &'a Effect) -> Result<Self, NetError> {
        match effect {
            Effect::Rules { table, bridge, owner, address, rules } => {
                Ok(Self { table, bridge, owner, address: *address, rules })
            }
            _ => Err(NetError::NotMine { effect: effect.id() }),
        }
    }

    /// Compares with the table's listing.
    pub(crate) fn observe(self, listing: Option<&Value>) -> Observed {
        let found = listing.map(|listing| self.mark().find(listing)).unwrap_or_default();
        // Those that no chain can have are not there.
        let same = self.wanted().is_ok_and(|(wanted, says)| {
            found.len() == wanted.len() && found.iter().all(|rule| rule.says == says)
        });
        if same {
            // Also where no rule is wanted: nothing is missing.
            Observed::Present(Handle::None)
        } else if found.is_empty() {
            Observed::Absent
        } else {
            Observed::Foreign("its rules differ from what they should be".to_owned())
        }
    }

    /// Refuses rules that no chain can have.
    pub(crate) fn check(self) -> Result<(), NetError> {
        self.wanted().map(|_| ())
    }

    /// Commands that bring the listed table there; none where it is so.
    pub(crate) fn apply(self, listing: Option<&Value>) -> Result<Vec<Value>, NetError> {
        if matches!(self.observe(listing), Observed::Present(_)) {
            return Ok(Vec::new());
        }
        let (wanted, says) = self.wanted()?;
        let listing = listing
            .filter(|listing| has_chains(listing, wanted.iter().map(|rule| rule.chain)))
            .ok_or_else(|| NetError::NoTable { table: self.table.to_owned() })?;
        let mut commands = self.undo(listing);
        let comment = self.mark().comment(&says);
        commands.extend(wanted.iter().map(|rule| rule.add(self.table, &comment)));
        Ok(commands)
    }

    /// Commands that delete what the listed table has of it.
    pub(crate) fn undo(self, listing: &Value) -> Vec<Value> {
        self.mark().find(listing).iter().map(|rule| rule.delete(self.table)).collect()
    }

    fn mark(self) -> Mark {
        Mark::new(KIND, self.owner)
    }

    /// The rules as nft has them, and what their comment says.
    fn wanted(self) -> Result<(Vec<Placed>, String), NetError> {
        let mut wanted = Vec::new();
        for (place, rule) in self.rules.iter().enumerate() {
            let refused = |why| NetError::BadRule { owner: self.owner.to_owned(), number: place + 1, why };
            let chains = chains(rule).map_err(refused)?;
            let Some(mut expressions) = self.conditions(rule).map_err(refused)? else { continue };
            expressions.push(answer(&rule.answer));
            wanted.extend(chains.iter().map(|chain| Placed::new(chain, expressions.clone())));
        }
        let says = fingerprint(&wanted);
        Ok((wanted, says))
    }

    /// `None` where they can never hold.
    fn conditions(self, rule: &Rule) -> Result<Option<Vec<Value>>, &'static str> {
        if rule.conditions.is_empty() {
            return Err("has no condition, it would be for all packets");
        }
        let with_ports = rule
            .conditions
            .iter()
            .any(|condition| matches!(condition, Condition::Protocol(Protocol::Tcp | Protocol::Udp)));
        let needs_ports = matches!(rule.answer, Answer::Redirect(_, Some(_)))
            || rule.conditions.iter().any(|condition| matches!(condition, Condition::DestinationPorts(..)));
        if needs_ports && !with_ports {
            return Err("has ports and no protocol with ports");
        }
        let (ipv4, ipv6) = families(rule);
        if ipv4 && ipv6 {
            return Err("speaks of IPv4 and IPv6 at once");
        }
        let mut expressions = Vec::new();
        if let Answer::Redirect(to, _) = rule.answer {
            expressions.push(matches("==", meta("nfproto"), json!(family(to))));
        }
        let mut protocol_before = None;
        for condition in &rule.conditions {
            match condition {
                Condition::FromDevice(device) => {
                    if matches!(rule.chain, Chain::Output | Chain::Postrouting) {
                        return Err("cannot know where a packet came in");
                    }
                    if !self.device(*device, ipv6, "iifname", "saddr", &mut expressions) {
                        return Ok(None);
                    }
                }
                Condition::ToDevice(device) => {
                    if matches!(rule.chain, Chain::Input | Chain::Prerouting) {
                        return Err("cannot know where a packet goes out");
                    }
                    if !self.device(*device, ipv6, "oifname", "daddr", &mut expressions) {
                        return Ok(None);
                    }
                }
                Condition::Source(network) => expressions.push(end(*network, "saddr")?),
                Condition::Destination(network) => expressions.push(end(*network, "daddr")?),
                // A packet has one; nft refuses to be asked for two.
                Condition::Protocol(protocol) if protocol_before.is_some() => {
                    if protocol_before != Some(*protocol) {
                        return Ok(None);
                    }
                }
                Condition::Protocol(protocol) => {
                    protocol_before = Some(*protocol);
                    let number = match protocol {
                        Protocol::Tcp => "tcp",
                        Protocol::Udp => "udp",
                        Protocol::Icmp => "icmp",
                        Protocol::Icmpv6 => "ipv6-icmp",
                    };
                    expressions.push(matches("==", meta("l4proto"), json!(number)));
                }
                Condition::DestinationPorts(first, last) if first > last => {
                    return Err("has a range of ports that ends before it begins");
                }
                Condition::DestinationPorts(first, last) => {
                    let ports = if first == last { json!(first) } else { json!({ "range": [first, last] }) };
                    expressions.push(matches("==", field("th", "dport"), ports));
                }
                Condition::States(states) if states.is_empty() => return Err("has a set of no states"),
                Condition::States(states) => {
                    let names: Vec<_> = states.iter().map(|state| state_name(*state)).collect();
                    expressions.push(connection("state", &names));
                }
            }
        }
        Ok(Some(expressions))
    }

    /// Whether a packet could come or go by it.
    fn device(self, device: Device, ipv6: bool, key: &str, end: &str, expressions: &mut Vec<Value>) -> bool {
        let operator = if device == Device::Elsewhere { "!=" } else { "==" };
        expressions.push(matches(operator, meta(key), json!(self.bridge)));
        match (device, self.address) {
            // The VM has no IPv6 address either.
            (Device::Vm, Some(address)) if !ipv6 => {
                expressions.push(matches("==", field("ip", end), json!(address)));
                true
            }
            (Device::Vm, _) => false,
            _ => true,
        }
    }
}

/// Whether a rule's addresses are of IPv4, and whether they are of IPv6.
fn families(rule: &Rule) -> (bool, bool) {
    let redirect = match rule.answer {
        Answer::Redirect(to, _) => Some(to),
        _ => None,
    };
    let ends = rule.conditions.iter().filter_map(|condition| match condition {
        Condition::Source(network) | Condition::Destination(network) => Some(network.address),
        _ => None,
    });
    let all: Vec<_> = ends.chain(redirect).collect();
    (all.iter().any(IpAddr::is_ipv4), all.iter().any(IpAddr::is_ipv6))
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ipv4" } else { "ipv6" }
}

/// The chains that a rule is asked in.
fn chains(rule: &Rule) -> Result<&'static [&'static str], &'static str> {
    Ok(match (rule.chain, &rule.answer) {
        (_, Answer::Masquerade) if rule.chain != Chain::Postrouting => {
            return Err("masquerades, which is possible in postrouting only");
        }
        (Chain::Input | Chain::Forward | Chain::Postrouting, Answer::Redirect(..)) => {
            return Err("redirects, which is possible in prerouting and output only");
        }
        (Chain::Prerouting | Chain::Postrouting, Answer::Reject) => {
            return Err("rejects, which is possible in input, forward and output only");
        }
        (Chain::Input, _) => &["plugin_input"],
        (Chain::Forward, _) => &["plugin_forward"],
        (Chain::Prerouting, Answer::Redirect(..)) => &["plugin_nat_prerouting"],
        (Chain::Prerouting, Answer::Accept) => &["plugin_prerouting", "plugin_nat_prerouting"],
        (Chain::Prerouting, _) => &["plugin_prerouting"],
        (Chain::Output, Answer::Redirect(..)) => &["plugin_nat_output"],
        (Chain::Output, Answer::Accept) => &["plugin_output", "plugin_nat_output"],
        (Chain::Output, _) => &["plugin_output"],
        (Chain::Postrouting, Answer::Masquerade) => &["plugin_nat_postrouting"],
        (Chain::Postrouting, Answer::Accept) => &["plugin_postrouting", "plugin_nat_postrouting"],
        (Chain::Postrouting, _) => &["plugin_postrouting"],
    })
}

fn end(network: Network, end: &str) -> Result<Value, &'static str> {
    let net =
        IpNet::new(network.address, network.prefix).map_err(|_| "has a network with too long a prefix")?;
    let protocol = if network.address.is_ipv4() { "ip" } else { "ip6" };
    Ok(match net.prefix_len() {
        0 => matches("==", meta("nfproto"), json!(family(network.address))),
        whole if whole == net.max_prefix_len() => matches("==", field(protocol, end), json!(net.addr())),
        prefix => {
            let prefix = json!({ "prefix": { "addr": net.network(), "len": prefix } });
            matches("==", field(protocol, end), prefix)
        }
    })
}

fn answer(answer: &Answer) -> Value {
    match answer {
        Answer::Accept => accept(),
        Answer::Deny => drop(),
        Answer::Reject => reject(),
        Answer::Masquerade => json!({ "masquerade": null }),
        Answer::Redirect(address, port) => {
            let family = if address.is_ipv4() { "ip" } else { "ip6" };
            match port {
                Some(port) => json!({ "dnat": { "family": family, "addr": address, "port": port } }),
                None => json!({ "dnat": { "family": family, "addr": address } }),
            }
        }
    }
}

fn state_name(state: ConnectionState) -> &'static str {
    match state {
        ConnectionState::New => "new",
        ConnectionState::Established => "established",
        ConnectionState::Related => "related",
        ConnectionState::Invalid => "invalid",
    }
}
