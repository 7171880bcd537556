//! The daemon's own nftables table.
//!
//! ```text
//!   table inet vmd_3f2a                              priority
//!     guard            filter prerouting  -300  from the bridge with a loopback address: drop
//!     prerouting       filter prerouting  -150  → plugin_prerouting
//!     nat_prerouting   nat    prerouting  -100  → port_prerouting → plugin_nat_prerouting
//!     forward          filter forward        0  bridge → bridge: accept
//!                                               bridge → out: IPv4 from the subnet only; TCP MSS clamped both ways
//!                                               bridge → out, in → bridge: → plugin_forward
//!                                               answers of forwarded ports: accept; else bridge → out: reject
//!                                               in → bridge: forwarded ports accept, else drop
//!     input            filter input          0  from the bridge: answers; from the subnet only; → plugin_input;
//!                                               ping, DNS (53, UDP and TCP); the rest is rejected
//!     output           filter output      -150  → plugin_output
//!     nat_output       nat    output      -100  → port_output → plugin_nat_output
//!     postrouting      filter postrouting -150  → plugin_postrouting
//!     nat_postrouting  nat    postrouting  100  → port_postrouting → plugin_nat_postrouting
//! ```
//!
//! By itself nothing passes between the bridge and other networks, and no address is translated; who may go where is said by
//! the rules in the chains `plugin_…`, each of which an effect brings and takes away ([`crate::rules`]), and by published ports
//! (`port_…`, [`crate::ports`]). What a plugin's rule cannot do is undo a guard: those come first.
//!
//! *Two kinds of chains.* The kernel translates addresses in chains of type `nat`, which see the first packet of a connection only
//! and are not made to drop. So `redirect` and `masquerade` go to the chain of type nat, `deny` and `reject` to the other one,
//! and `accept` to both: it ends the asking, whichever it is that would come after it. The filter chains come
//! before translation, so that all rules of one chain see the same packet: as it was before it was redirected or masqueraded.
//!
//! The host stays reachable as before: every chain's policy is accept and every rule of the table itself names the bridge, but
//! the jumps where the device does not say whose a packet is. Guests cannot open connections to services of the host, on any of
//! its addresses: a development server that listens on 0.0.0.0 is not meant for them, and one on 127.0.0.1 even less. There is no
//! DHCP; addresses come by the guest's configuration. IPv6 from guests goes nowhere.
//!
//! Each rule carries a comment: `vmd` and a fingerprint of the whole table, or whose effect it is part of. It tells our rules from
//! others' and our present shape from an older one, whatever words the installed nft has for them. A table is loaded in
//! one transaction, so it is never there in part; where it is there in another shape, all but the chains that effects add to is
//! replaced, so that the VMs that are up keep their rules.

use ipnet::Ipv4Net;
use serde_json::{Value, json};
use vm_types::{Handle, Observed};

use crate::{
    nft::{Placed, accept, connection, drop, field, fingerprint, matches, meta, objects, reject},
    ports, rules,
};

const MARK: &str = "vmd ";

/// Name, type, hook and priority of each chain that the kernel calls.
const BASE: [(&str, &str, &str, i32); 9] = [
    ("guard", "filter", "prerouting", -300),
    ("prerouting", "filter", "prerouting", -150),
    ("nat_prerouting", "nat", "prerouting", -100),
    ("forward", "filter", "forward", 0),
    ("input", "filter", "input", 0),
    ("output", "filter", "output", -150),
    ("nat_output", "nat", "output", -100),
    ("postrouting", "filter", "postrouting", -150),
    ("nat_postrouting", "nat", "postrouting", 100),
];

/// What the table is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table<'a> {
    pub(crate) name: &'a str,
    pub(crate) bridge: &'a str,
    pub(crate) subnet: Ipv4Net,
}

impl Table<'_> {
    /// Commands that make the table, or mend the one that is listed; the chains that effects add to stay as they are.
    pub(crate) fn load(self, present: Option<&Value>) -> Vec<Value> {
        let chain = |name: &str| json!({ "family": "inet", "table": self.name, "name": name });
        let mut commands = vec![json!({ "add": { "table": self.id() } })];
        let present: Vec<_> = present.into_iter().flat_map(|answer| objects(answer, "chain")).collect();
        let emptied =
            present.iter().filter_map(|there| there["name"].as_str()).filter(|name| !is_effects(name));
        // All rules first: a chain that one of them jumps to cannot be deleted.
        commands.extend(emptied.clone().map(|name| json!({ "flush": { "chain": chain(name) } })));
        commands.extend(emptied.map(|name| json!({ "delete": { "chain": chain(name) } })));
        commands.extend(effects_chains().map(|name| json!({ "add": { "chain": chain(name) } })));
        for (name, kind, hook, priority) in BASE {
            commands.push(json!({ "add": { "chain": {
                "family": "inet", "table": self.name, "name": name, "type": kind,
                "hook": hook, "prio": priority, "policy": "accept",
            } } }));
        }
        let rules = self.rules();
        let comment = comment(&rules);
        commands.extend(rules.iter().map(|rule| rule.add(self.name, &comment)));
        commands
    }

    /// The command that removes the table.
    pub(crate) fn remove(self) -> Value {
        json!({ "delete": { "table": self.id() } })
    }

    /// Reads the answer to `list table`.
    pub(crate) fn judge(self, answer: &Value) -> Judgement {
        judge(answer, Some(&comment(&self.rules())))
    }

    fn id(self) -> Value {
        json!({ "family": "inet", "name": self.name })
    }

    /// The rules of the chains that the kernel calls, in order.
    fn rules(self) -> Vec<Placed> {
        let from = matches("==", meta("iifname"), json!(self.bridge));
        let to = matches("==", meta("oifname"), json!(self.bridge));
        let subnet = json!({ "prefix": { "addr": self.subnet.network(), "len": self.subnet.prefix_len() } });
        let stolen = matches("!=", field("ip", "saddr"), subnet);
        let loopback = |end: &str| matches("==", field("ip", end), loopback_net());
        let answers = connection("state", &["established", "related"]);
        let forwarded_port = connection("status", &["dnat"]);
        let syn = matches("in", field("tcp", "flags"), json!("syn"));
        let clamp = json!({ "mangle": {
            "key": { "tcp option": { "name": "maxseg", "field": "size" } },
            "value": { "rt": { "key": "mtu" } },
        } });
        let ping = matches("==", field("icmp", "type"), json!("echo-request"));
        let dns = |protocol: &str| matches("==", field(protocol, "dport"), json!(53));
        let ipv6 = matches("==", meta("nfproto"), json!("ipv6"));
        let jump = |target: &str| json!({ "jump": { "target": target } });

        let mut rules = Vec::new();
        let mut add = |chain, expressions: &[&Value]| {
            rules.push(Placed::new(chain, expressions.iter().map(|&expression| expression.clone())));
        };
        // As they come from the wire: an answer that is to get a loopback address back is not meant.
        add("guard", &[&from, &loopback("saddr"), &drop()]);
        add("guard", &[&from, &loopback("daddr"), &drop()]);

        add("prerouting", &[&jump("plugin_prerouting")]);
        add("nat_prerouting", &[&jump("port_prerouting")]);
        add("nat_prerouting", &[&jump("plugin_nat_prerouting")]);

        add("forward", &[&from, &to, &accept()]);
        add("forward", &[&from, &ipv6, &drop()]);
        add("forward", &[&from, &stolen, &drop()]);
        add("forward", &[&from, &syn, &clamp]);
        add("forward", &[&to, &syn, &clamp]);
        add("forward", &[&from, &jump("plugin_forward")]);
        add("forward", &[&to, &jump("plugin_forward")]);
        add("forward", &[&from, &answers, &forwarded_port, &accept()]);
        add("forward", &[&from, &reject()]);
        add("forward", &[&to, &forwarded_port, &accept()]);
        add("forward", &[&to, &drop()]);

        add("input", &[&from, &answers, &accept()]);
        add("input", &[&from, &stolen, &drop()]);
        // Not even where somebody redirects there.
        add("input", &[&from, &loopback("daddr"), &drop()]);
        add("input", &[&from, &jump("plugin_input")]);
        add("input", &[&from, &ping, &accept()]);
        add("input", &[&from, &dns("udp"), &accept()]);
        add("input", &[&from, &dns("tcp"), &accept()]);
        add("input", &[&from, &reject()]);

        add("output", &[&jump("plugin_output")]);
        add("nat_output", &[&jump("port_output")]);
        add("nat_output", &[&jump("plugin_nat_output")]);
        add("postrouting", &[&jump("plugin_postrouting")]);
        add("nat_postrouting", &[&jump("port_postrouting")]);
        add("nat_postrouting", &[&jump("plugin_nat_postrouting")]);
        rules
    }
}

/// 127.0.0.0/8.
pub(crate) fn loopback_net() -> Value {
    json!({ "prefix": { "addr": "127.0.0.0", "len": 8 } })
}

/// Whether the listed table has all its guards, for whichever subnet.
pub(crate) fn is_whole(answer: &Value) -> bool {
    let comment = objects(answer, "rule")
        .filter(|rule| rule["chain"] == "guard")
        .find_map(|rule| rule["comment"].as_str().filter(|text| text.starts_with(MARK)));
    comment.is_some_and(|comment| judge(answer, Some(comment)) == Judgement::Current)
}

fn judge(answer: &Value, comment: Option<&str>) -> Judgement {
    // How many there are depends on neither subnet nor bridge.
    let wanted = Table { name: "", bridge: "", subnet: Ipv4Net::default() }.rules().len();
    let (mut others, mut current) = (0, 0);
    for rule in objects(answer, "rule") {
        let in_effects = rule["chain"].as_str().is_some_and(is_effects);
        match rule["comment"].as_str() {
            Some(text) if text.starts_with(MARK) && Some(text) == comment && !in_effects => current += 1,
            Some(text) if is_of_effect(text) && in_effects => {}
            // Ours, of another shape or in another place.
            Some(text) if text.starts_with(MARK) || is_of_effect(text) => others += 1,
            _ => return Judgement::NotOurs,
        }
    }
    let chains = objects(answer, "chain").count() == BASE.len() + effects_chains().count()
        && effects_chains().all(|name| objects(answer, "chain").any(|there| there["name"] == name))
        && BASE.iter().all(|(name, kind, hook, priority)| {
            objects(answer, "chain").any(|there| {
                there["name"] == *name
                    && there["type"] == *kind
                    && there["hook"] == *hook
                    && there["prio"] == *priority
                    && there["policy"] == "accept"
            })
        });
    if others == 0 && current == wanted && chains { Judgement::Current } else { Judgement::Outdated }
}

fn comment(rules: &[Placed]) -> String {
    format!("{MARK}{}", fingerprint(rules))
}

fn is_of_effect(comment: &str) -> bool {
    [rules::KIND, ports::KIND]
        .iter()
        .any(|kind| comment.strip_prefix(kind).is_some_and(|rest| rest.starts_with(' ')))
}

/// The chains that effects add to.
fn effects_chains() -> impl Iterator<Item = &'static str> {
    rules::CHAINS.into_iter().chain(ports::CHAINS)
}

fn is_effects(chain: &str) -> bool {
    effects_chains().any(|name| name == chain)
}

/// What a table of our name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Judgement {
    /// Exactly ours.
    Current,
    /// Ours, with other rules: of another version or subnet, or flushed.
    Outdated,
    /// It holds a rule that is not ours.
    NotOurs,
}

impl Judgement {
    pub(crate) fn observed(self) -> Observed {
        match self {
            Self::Current => Observed::Present(Handle::None),
            Self::Outdated => Observed::Foreign("its rules differ from what they should be".to_owned()),
            Self::NotOurs => Observed::Foreign(Self::NOT_OURS.to_owned()),
        }
    }

    pub(crate) const NOT_OURS: &str = "it holds rules of somebody else";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_speaks_of_nothing_but_the_bridge_and_the_subnet() {
        let table = Table { name: "vmd_3f2a", bridge: "vmbr-3f2a", subnet: "10.213.0.0/24".parse().unwrap() };
        for rule in table.rules() {
            let text = json!(rule.expressions).to_string();
            let only_jumps = rule.expressions.len() == 1 && text.contains("jump");
            assert!(
                text.contains("vmbr-3f2a") || only_jumps,
                "{}: {text} would touch other traffic",
                rule.chain
            );
            assert!(!only_jumps || !matches!(rule.chain, "forward" | "input"), "{text}");
        }
        let other = Table { subnet: "10.213.1.0/24".parse().unwrap(), ..table };
        assert_ne!(comment(&table.rules()), comment(&other.rules()));
    }
}
