//! Firewalls of others that stop what our bridge forwards.

use serde_json::Value;

use crate::nft::objects;

/// A foreign chain that drops forwarded packets which nothing in it accepts first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// nft family, or `iptables-legacy`.
    pub family: String,
    /// Table.
    pub table: String,
    /// Chain.
    pub chain: String,
    /// Whether its policy drops (Docker), else its last rule does (firewalld).
    pub by_policy: bool,
}

impl Blocker {
    /// What is wrong, for people.
    pub fn explanation(&self) -> String {
        let how = if self.by_policy { "policy" } else { "last rule" };
        format!(
            "the {how} of chain {} in table {} {} drops forwarded packets",
            self.chain, self.family, self.table
        )
    }

    /// Commands that let the bridge's traffic through.
    pub fn fix(&self, bridge: &str) -> Vec<String> {
        if self.table == "firewalld" {
            return vec![
                format!("firewall-cmd --permanent --zone=trusted --add-interface={bridge}"),
                "firewall-cmd --reload".to_owned(),
            ];
        }
        let iptables = match self.family.as_str() {
            "iptables-legacy" => Some("iptables-legacy"),
            "ip" if self.chain == "FORWARD" => Some("iptables"),
            _ => None,
        };
        ["-i", "-o"]
            .iter()
            .zip(["iifname", "oifname"])
            .map(|(option, key)| match iptables {
                Some(program) => format!("{program} -I {} {option} {bridge} -j ACCEPT", self.chain),
                None => format!(
                    "nft insert rule {} {} {} {key} {bridge:?} accept",
                    self.family, self.table, self.chain
                ),
            })
            .collect()
    }
}

/// A base chain that sees forwarded IPv4 packets, from the answer to `list chains`.
#[derive(Debug, Clone)]
pub(crate) struct ForwardChain {
    pub(crate) family: String,
    pub(crate) table: String,
    chain: String,
    policy_drops: bool,
}

pub(crate) fn forward_chains(answer: &Value) -> Vec<ForwardChain> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    objects(answer, "chain")
        .filter(|chain| chain["hook"] == "forward" && chain["type"] == "filter")
        .filter(|chain| chain["family"] == "ip" || chain["family"] == "inet")
        .map(|chain| ForwardChain {
            family: text(&chain["family"]),
            table: text(&chain["table"]),
            chain: text(&chain["name"]),
            policy_drops: chain["policy"] == "drop",
        })
        .collect()
}

impl ForwardChain {
    /// Reads the answer to `list table` of the chain's table. A rule anywhere in it that names our bridge and accepts
    /// means that somebody has taken care.
    pub(crate) fn blocker(self, table: &Value, own_bridge: &str) -> Option<Blocker> {
        let rules: Vec<_> = objects(table, "rule").collect();
        let cared_for = rules.iter().any(|rule| {
            let expressions = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
            expressions.iter().any(|e| e["match"]["right"] == own_bridge)
                && expressions.iter().any(|e| e.get("accept").is_some())
        });
        let last = rules.iter().rfind(|rule| rule["chain"] == self.chain.as_str());
        let blocks = self.policy_drops || last.is_some_and(|rule| drops_everything(rule));
        (blocks && !cared_for).then_some(Blocker {
            family: self.family,
            table: self.table,
            chain: self.chain,
            by_policy: self.policy_drops,
        })
    }
}

fn drops_everything(rule: &Value) -> bool {
    let expressions = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
    let verdict = |e: &Value| e.get("drop").is_some() || e.get("reject").is_some();
    expressions.iter().any(verdict)
        && expressions.iter().all(|e| verdict(e) || e.get("counter").is_some() || e.get("log").is_some())
}

/// Reads `iptables-legacy -S FORWARD`.
pub(crate) fn legacy_blocker(rules: &str, own_bridge: &str) -> Option<Blocker> {
    let cared_for = rules.lines().any(|line| {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        words.contains(&own_bridge) && words.ends_with(&["-j", "ACCEPT"])
    });
    let drops = rules.lines().any(|line| line.trim() == "-P FORWARD DROP");
    (drops && !cared_for).then(|| Blocker {
        family: "iptables-legacy".to_owned(),
        table: "filter".to_owned(),
        chain: "FORWARD".to_owned(),
        by_policy: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_rules_are_read() {
        let blocked = legacy_blocker("-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n", "vmbr-3f2a").unwrap();
        assert_eq!(blocked.fix("vmbr-3f2a")[0], "iptables-legacy -I FORWARD -i vmbr-3f2a -j ACCEPT");
        assert!(legacy_blocker("-P FORWARD ACCEPT\n", "vmbr-3f2a").is_none());
        let mended = "-P FORWARD DROP\n-A FORWARD -i vmbr-3f2a -j ACCEPT\n";
        assert!(legacy_blocker(mended, "vmbr-3f2a").is_none());
    }
}
