//! The daemon's own nftables table.
//!
//! ```text
//!   table inet vmd_3f2a
//!     postrouting  guests' packets leaving by anything but the bridge are masqueraded
//!     forward      bridge → bridge: accept
//!                  bridge → out:    only from the subnet; TCP MSS clamped to the route's MTU
//!                  in → bridge:     answers and forwarded ports only
//!     input        from the bridge: answers, ping, DNS (53, UDP and TCP); the rest is rejected
//! ```
//!
//! The host stays reachable as before: every chain's policy is accept and every rule names the bridge. Guests cannot open
//! connections to services of the host, on any of its addresses: a development server that listens on
//! 0.0.0.0 is not meant for them. There is no DHCP; addresses come by the guest's configuration.
//! IPv6 from guests goes nowhere.
//!
//! Each rule carries a comment, `vmd` and a fingerprint of the whole table. It tells our rules from others' and our present shape
//! from an older one, whatever words the installed nft has for them. A table is loaded in one transaction, so
//! it is never there in part.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vm_types::{Handle, Observed};

use ipnet::Ipv4Net;

const MARK: &str = "vmd ";

/// What the table is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table<'a> {
    pub(crate) name: &'a str,
    pub(crate) bridge: &'a str,
    pub(crate) subnet: Ipv4Net,
}

impl Table<'_> {
    /// Replaces the table, in one transaction. (Adding before deleting makes the deletion work whether it was there or not.)
    pub(crate) fn load(self) -> Value {
        let mut commands = vec![
            json!({ "add": { "table": self.id() } }),
            json!({ "delete": { "table": self.id() } }),
            json!({ "add": { "table": self.id() } }),
        ];
        for (name, kind, priority) in
            [("postrouting", "nat", 100), ("forward", "filter", 0), ("input", "filter", 0)]
        {
            commands.push(json!({ "add": { "chain": {
                "family": "inet", "table": self.name, "name": name, "type": kind,
                "hook": name, "prio": priority, "policy": "accept",
            } } }));
        }
        let comment = self.comment();
        commands.extend(self.rules().into_iter().map(|(chain, expressions)| {
            json!({ "add": { "rule": {
                "family": "inet", "table": self.name, "chain": chain, "comment": comment, "expr": expressions,
            } } })
        }));
        json!({ "nftables": commands })
    }

    /// Removes the table.
    pub(crate) fn remove(self) -> Value {
        json!({ "nftables": [{ "delete": { "table": self.id() } }] })
    }

    /// Whether the answer to `list tables` has it.
    pub(crate) fn is_listed(self, answer: &Value) -> bool {
        objects(answer, "table").any(|table| table["family"] == "inet" && table["name"] == self.name)
    }

    /// Reads the answer to `list table`.
    pub(crate) fn judge(self, answer: &Value) -> Judgement {
        let comment = self.comment();
        let (mut ours, mut current) = (0, 0);
        for rule in objects(answer, "rule") {
            match rule["comment"].as_str() {
                Some(text) if text == comment => current += 1,
                Some(text) if text.starts_with(MARK) => ours += 1,
                _ => return Judgement::NotOurs,
            }
        }
        if ours == 0 && current == self.rules().len() { Judgement::Current } else { Judgement::Outdated }
    }

    fn id(self) -> Value {
        json!({ "family": "inet", "name": self.name })
    }

    fn comment(self) -> String {
        let digest = Sha256::digest(json!(self.rules()).to_string());
        let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        format!("{MARK}{hex}")
    }

    /// Chain and expressions of each rule, in order.
    fn rules(self) -> Vec<(&'static str, Value)> {
        let accept = json!({ "accept": null });
        let drop = json!({ "drop": null });
        let from = json!(matches("==", meta("iifname"), json!(self.bridge)));
        let to = json!(matches("==", meta("oifname"), json!(self.bridge)));
        let not_to = matches("!=", meta("oifname"), json!(self.bridge));
        let subnet = json!({ "prefix": { "addr": self.subnet.network(), "len": self.subnet.prefix_len() } });
        let source = json!({ "payload": { "protocol": "ip", "field": "saddr" } });
        let answers = matches("in", json!({ "ct": { "key": "state" } }), json!(["established", "related"]));
        let forwarded_port = matches("in", json!({ "ct": { "key": "status" } }), json!("dnat"));
        let tcp_flags = json!({ "payload": { "protocol": "tcp", "field": "flags" } });
        let clamp = json!({ "mangle": {
            "key": { "tcp option": { "name": "maxseg", "field": "size" } },
            "value": { "rt": { "key": "mtu" } },
        } });
        let ping = matches(
            "==",
            json!({ "payload": { "protocol": "icmp", "field": "type" } }),
            json!("echo-request"),
        );
        let dns = |protocol: &str| {
            let port = json!({ "payload": { "protocol": protocol, "field": "dport" } });
            json!([from, matches("==", port, json!(53)), accept])
        };
        let reject = json!({ "reject": { "type": "icmpx", "expr": "admin-prohibited" } });
        vec![
            (
                "postrouting",
                json!([matches("==", source.clone(), subnet.clone()), not_to, { "masquerade": null }]),
            ),
            ("forward", json!([from, to, accept])),
            ("forward", json!([from, matches("==", meta("nfproto"), json!("ipv6")), drop])),
            ("forward", json!([from, matches("!=", source, subnet), drop])),
            ("forward", json!([from, matches("in", tcp_flags.clone(), json!("syn")), clamp])),
            ("forward", json!([to, matches("in", tcp_flags, json!("syn")), clamp])),
            ("forward", json!([from, accept])),
            ("forward", json!([to, answers, accept])),
            ("forward", json!([to, forwarded_port, accept])),
            ("forward", json!([to, drop])),
            ("input", json!([from, answers, accept])),
            ("input", json!([from, ping, accept])),
            ("input", dns("udp")),
            ("input", dns("tcp")),
            ("input", json!([from, reject])),
        ]
    }
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

fn matches(operator: &str, left: Value, right: Value) -> Value {
    json!({ "match": { "op": operator, "left": left, "right": right } })
}

fn meta(key: &str) -> Value {
    json!({ "meta": { "key": key } })
}

/// The objects of one kind in an answer of `nft -j` (libnftables-json(5)).
pub(crate) fn objects<'a>(answer: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    answer["nftables"].as_array().into_iter().flatten().filter_map(move |object| object.get(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_speaks_of_nothing_but_the_bridge_and_the_subnet() {
        let table = Table { name: "vmd_3f2a", bridge: "vmbr-3f2a", subnet: "10.213.0.0/24".parse().unwrap() };
        for (chain, expressions) in table.rules() {
            let text = expressions.to_string();
            assert!(text.contains("vmbr-3f2a"), "{chain}: {text} would touch other traffic");
        }
        let other = Table { subnet: "10.213.1.0/24".parse().unwrap(), ..table };
        assert_ne!(table.comment(), other.comment());
    }
}
