//! Firewalls of others that stop what our bridge forwards, or what VMs ask the host; and others for whom the host forwards.

use serde_json::Value;

use crate::nft::objects;

/// Where in the kernel a chain stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// What the host passes on.
    Forward,
    /// What the host itself gets: of VMs, their DNS queries.
    Input,
}

impl Hook {
    const ALL: [Self; 2] = [Self::Forward, Self::Input];

    fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Input => "input",
        }
    }

    /// What iptables calls its chain.
    fn iptables(self) -> &'static str {
        match self {
            Self::Forward => "FORWARD",
            Self::Input => "INPUT",
        }
    }
}

/// A foreign chain that drops packets of VMs which nothing in it accepts first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// nft family, or `iptables-legacy`.
    pub family: String,
    /// Table.
    pub table: String,
    /// Chain.
    pub chain: String,
    /// What it is asked of.
    pub hook: Hook,
    /// Whether its policy drops (Docker), else its last rule does (firewalld).
    pub by_policy: bool,
}

impl Blocker {
    /// What is wrong, for people.
    pub fn explanation(&self) -> String {
        let how = if self.by_policy { "policy" } else { "last rule" };
        let what = match self.hook {
            Hook::Forward => "forwarded packets",
            Hook::Input => "what VMs ask the host, such as names (DNS)",
        };
        format!("the {how} of chain {} in table {} {} drops {what}", self.chain, self.family, self.table)
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
            "ip" if self.chain == self.hook.iptables() => Some("iptables"),
            _ => None,
        };
        let answers = match self.hook {
            Hook::Forward => Some(("-o", "oifname")),
            Hook::Input => None,
        };
        std::iter::once(("-i", "iifname"))
            .chain(answers)
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

/// A base chain that sees IPv4 packets of VMs, from the answer to `list chains`.
#[derive(Debug, Clone)]
pub(crate) struct BaseChain {
    pub(crate) family: String,
    pub(crate) table: String,
    chain: String,
    hook: Hook,
    policy_drops: bool,
}

/// Whether somebody else has the host translate addresses of what it forwards, from the answer to `list chains`.
pub(crate) fn others_forward(answer: &Value) -> bool {
    let mut tables: Vec<_> = objects(answer, "chain")
        .filter(|chain| chain["hook"] == "postrouting" && chain["type"] == "nat")
        .filter(|chain| chain["family"] == "ip" || chain["family"] == "inet")
        .filter_map(|chain| chain["table"].as_str())
        .collect();
    tables.dedup();
    // One of a daemon's is our own.
    let daemons = tables.iter().filter(|table| table.starts_with("vmd_")).count();
    daemons > 1 || tables.len() > daemons
}

pub(crate) fn base_chains(answer: &Value) -> Vec<BaseChain> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    objects(answer, "chain")
        .filter(|chain| chain["type"] == "filter" && (chain["family"] == "ip" || chain["family"] == "inet"))
        .filter_map(|chain| {
            Some(BaseChain {
                family: text(&chain["family"]),
                table: text(&chain["table"]),
                chain: text(&chain["name"]),
                hook: Hook::ALL.into_iter().find(|hook| chain["hook"] == hook.name())?,
                policy_drops: chain["policy"] == "drop",
            })
        })
        .collect()
}

impl BaseChain {
    /// Reads the answer to `list table` of the chain's table. A rule in it that names our bridge and accepts, and is not of
    /// another base chain, means that somebody has taken care; so does one that lets everybody ask for names.
    pub(crate) fn blocker(self, table: &Value, own_bridge: &str) -> Option<Blocker> {
        let rules: Vec<_> = objects(table, "rule").collect();
        let elsewhere: Vec<_> = objects(table, "chain")
            .filter(|chain| chain["hook"].as_str().is_some_and(|hook| hook != self.hook.name()))
            .map(|chain| &chain["name"])
            .collect();
        let cared_for = rules.iter().any(|rule| {
            let expressions = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
            let concerns = |e: &Value| {
                let right = &e["match"]["right"];
                let is_dns = |port: &Value| *port == 53;
                let dns = is_dns(right) || right["set"].as_array().is_some_and(|set| set.iter().any(is_dns));
                *right == own_bridge || (self.hook == Hook::Input && dns)
            };
            !elsewhere.contains(&&rule["chain"])
                && expressions.iter().any(concerns)
                && expressions.iter().any(|e| e.get("accept").is_some())
        });
        let last = rules.iter().rfind(|rule| rule["chain"] == self.chain.as_str());
        let blocks = self.policy_drops || last.is_some_and(|rule| drops_everything(rule));
        (blocks && !cared_for).then_some(Blocker {
            family: self.family,
            table: self.table,
            chain: self.chain,
            hook: self.hook,
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

/// Reads `iptables-legacy -S`, for each of the chains.
pub(crate) fn legacy_blockers(rules: &str, own_bridge: &str) -> Vec<Blocker> {
    Hook::ALL.into_iter().filter_map(|hook| legacy_blocker(rules, own_bridge, hook)).collect()
}

fn legacy_blocker(rules: &str, own_bridge: &str, hook: Hook) -> Option<Blocker> {
    let chain = hook.iptables();
    let cared_for = rules.lines().any(|line| {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let ours =
            words.contains(&own_bridge) || (hook == Hook::Input && words.ends_with(&["53", "-j", "ACCEPT"]));
        words.starts_with(&["-A", chain]) && ours && words.ends_with(&["-j", "ACCEPT"])
    });
    let drops = rules.lines().any(|line| line.trim() == format!("-P {chain} DROP"));
    (drops && !cared_for).then(|| Blocker {
        family: "iptables-legacy".to_owned(),
        table: "filter".to_owned(),
        chain: chain.to_owned(),
        hook,
        by_policy: true,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn legacy_rules_are_read() {
        let rules =
            "-P INPUT DROP\n-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n-A FORWARD -i vmbr-3f2b -j ACCEPT\n";
        let fixes: Vec<_> =
            legacy_blockers(rules, "vmbr-3f2a").iter().flat_map(|blocker| blocker.fix("vmbr-3f2a")).collect();
        let accept = ["FORWARD -i", "FORWARD -o", "INPUT -i"]
            .map(|place| format!("iptables-legacy -I {place} vmbr-3f2a -j ACCEPT"));
        assert_eq!(fixes, accept);
        assert_eq!(legacy_blockers("-P FORWARD ACCEPT\n-P INPUT ACCEPT\n", "vmbr-3f2a"), []);
        let mended = "-P FORWARD DROP\n-A FORWARD -i vmbr-3f2a -j ACCEPT\n";
        assert_eq!(legacy_blockers(mended, "vmbr-3f2a"), []);
        let asked = "-P INPUT DROP\n-A INPUT -p udp -m udp --dport 53 -j ACCEPT\n";
        assert_eq!(legacy_blockers(asked, "vmbr-3f2a"), []);
    }

    #[test]
    fn others_that_have_the_host_forward_are_known() {
        let chain = |table: &str, hook: &str, kind: &str| json!({ "chain": { "family": "ip", "table": table, "name": "x", "hook": hook, "type": kind } });
        let forward = |chains: &[Value]| others_forward(&json!({ "nftables": chains }));
        let own = chain("vmd_3f2a", "postrouting", "nat");
        assert!(!forward(&[]));
        assert!(!forward(&[
            own.clone(),
            chain("filter", "forward", "filter"),
            chain("nat", "prerouting", "nat")
        ]));
        assert!(forward(&[own.clone(), chain("nat", "postrouting", "nat")]));
        assert!(forward(&[own, chain("vmd_77ff", "postrouting", "nat")]));
    }
}
