//! Talks with nft, in its JSON only (libnftables-json(5)): text of ours never passes through a parser that could take a part of it
//! for a command.

use std::{
    io::{self, Read},
    os::fd::AsRawFd,
    sync::Arc,
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vm_host::{HostCommand, RunError, Runner};

use crate::NetError;

/// The nft program.
#[derive(Debug, Clone)]
pub(crate) struct Nft {
    runner: Arc<dyn Runner>,
}

impl Nft {
    pub(crate) fn new(runner: Arc<dyn Runner>) -> Self {
        Self { runner }
    }

    /// The answer to `nft -j list WHAT`.
    pub(crate) async fn list(&self, what: &[&str]) -> Result<Value, NetError> {
        let failed =
            |source| NetError::Nft { action: format!("list the firewall's {}", what.join(" ")), source };
        let mut command = HostCommand::new("nft").args(["-j", "list"]).args(what.iter().copied());
        // Not through the runner's memory, which is bounded: the rules of many VMs may be more, and a table that cannot be read
        // could not be cleaned up either.
        let answer = memfd_create(c"nft", MFdFlags::MFD_CLOEXEC).map_err(|error| {
            failed(RunError::Io { command: command.display(), source: io::Error::from(error) })
        })?;
        command.stdout_file = Some(format!("/proc/self/fd/{}", answer.as_raw_fd()).into());
        let line = command.display();
        let output = self.runner.run(command).await.map_err(failed)?;
        let mut bytes = output.stdout;
        std::fs::File::from(answer)
            .read_to_end(&mut bytes)
            .map_err(|source| failed(RunError::Io { command: line, source }))?;
        serde_json::from_slice(&bytes).map_err(|source| NetError::NftAnswer { source })
    }

    /// The answer to `nft -j list table inet NAME`; `None` where there is no such table.
    pub(crate) async fn table(&self, name: &str) -> Result<Option<Value>, NetError> {
        // In one call where it is there, as nearly always.
        match self.list(&["table", "inet", name]).await {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if self.has_table(name).await? => Err(error),
            Err(_) => Ok(None),
        }
    }

    pub(crate) async fn has_table(&self, name: &str) -> Result<bool, NetError> {
        let tables = self.list(&["tables", "inet"]).await?;
        Ok(objects(&tables, "table").any(|table| table["family"] == "inet" && table["name"] == name))
    }

    /// Carries out all commands, or none.
    pub(crate) async fn change(&self, commands: Vec<Value>, action: String) -> Result<(), NetError> {
        if commands.is_empty() {
            return Ok(());
        }
        let document = json!({ "nftables": commands }).to_string();
        let command = HostCommand::new("nft").args(["-j", "-f", "-"]).stdin(document);
        self.runner.run(command).await.map(|_| ()).map_err(|source| NetError::Nft { action, source })
    }
}

/// The objects of one kind in an answer of `nft -j`.
pub(crate) fn objects<'a>(answer: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    answer["nftables"].as_array().into_iter().flatten().filter_map(move |object| object.get(kind))
}

/// A rule's place and expressions.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Placed {
    pub(crate) chain: &'static str,
    pub(crate) expressions: Vec<Value>,
}

impl Placed {
    pub(crate) fn new(chain: &'static str, expressions: impl IntoIterator<Item = Value>) -> Self {
        Self { chain, expressions: expressions.into_iter().collect() }
    }

    /// The command that adds it behind those of its chain.
    pub(crate) fn add(&self, table: &str, comment: &str) -> Value {
        json!({ "add": { "rule": {
            "family": "inet", "table": table, "chain": self.chain, "comment": comment, "expr": self.expressions,
        } } })
    }
}

/// Tells one set of rules from another, in 16 hexadecimal digits, whatever words the installed nft has for them.
pub(crate) fn fingerprint(rules: &[Placed]) -> String {
    let all: Vec<_> = rules.iter().map(|rule| json!([rule.chain, rule.expressions])).collect();
    digest(&json!(all).to_string())
}

fn digest(text: &str) -> String {
    Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// The kernel keeps no longer comment (NFTNL_UDATA_COMMENT_MAXLEN in libnftnl, less the final NUL).
const COMMENT_MAX: usize = 127;
/// An owner that is longer stands in comments by its beginning and its digest.
const OWNER_MAX: usize = 64;

/// Rules of one owner, known by a comment that begins with what they are and whose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark(String);

/// A rule that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found<'a> {
    chain: &'a str,
    handle: &'a Value,
    /// What its comment says behind the mark.
    pub(crate) says: &'a str,
}

impl Mark {
    /// `kind` is a word. An owner's name goes into the comment only in characters that mean nothing to anybody: nft's own listing
    /// does not escape a comment, and people load such listings again.
    pub(crate) fn new(kind: &str, owner: &str) -> Self {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '/' | '-');
        if !owner.is_empty() && owner.len() <= OWNER_MAX && owner.chars().all(plain) {
            return Self(format!("{kind} {owner} "));
        }
        let start: String = owner.chars().filter(|c| plain(*c)).take(OWNER_MAX - 17).collect();
        // No plain owner has a `~`.
        Self(format!("{kind} {start}~{} ", digest(owner)))
    }

    /// The whole comment.
    pub(crate) fn comment(&self, says: &str) -> String {
        let comment = format!("{}{says}", self.0);
        debug_assert!(comment.len() <= COMMENT_MAX, "{comment}");
        comment
    }

    /// Those in a table's listing.
    pub(crate) fn find<'a>(&self, listing: &'a Value) -> Vec<Found<'a>> {
        objects(listing, "rule")
            .filter_map(|rule| {
                let says = rule["comment"].as_str()?.strip_prefix(&self.0)?;
                Some(Found { chain: rule["chain"].as_str()?, handle: &rule["handle"], says })
            })
            .collect()
    }
}

impl Found<'_> {
    /// The command that deletes it and no other.
    pub(crate) fn delete(&self, table: &str) -> Value {
        json!({ "delete": { "rule": {
            "family": "inet", "table": table, "chain": self.chain, "handle": self.handle,
        } } })
    }
}

/// Whether a table's listing has all these chains.
pub(crate) fn has_chains<'a>(listing: &Value, mut chains: impl Iterator<Item = &'a str>) -> bool {
    chains.all(|wanted| objects(listing, "chain").any(|chain| chain["name"] == wanted))
}

pub(crate) fn matches(operator: &str, left: Value, right: Value) -> Value {
    json!({ "match": { "op": operator, "left": left, "right": right } })
}

pub(crate) fn meta(key: &str) -> Value {
    json!({ "meta": { "key": key } })
}

pub(crate) fn field(protocol: &str, field: &str) -> Value {
    json!({ "payload": { "protocol": protocol, "field": field } })
}

/// The connection's states or status: any of these.
pub(crate) fn connection(key: &str, any: &[&str]) -> Value {
    matches("in", json!({ "ct": { "key": key } }), json!(any))
}

pub(crate) fn accept() -> Value {
    json!({ "accept": null })
}

pub(crate) fn drop() -> Value {
    json!({ "drop": null })
}

pub(crate) fn reject() -> Value {
    json!({ "reject": { "type": "icmpx", "expr": "admin-prohibited" } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_owner_can_speak_through_a_comment_or_pass_for_another() {
        assert_eq!(Mark::new("vmd-plugin", "v1/nat").comment("00"), "vmd-plugin v1/nat 00");
        let long = "v1/".to_owned() + &"x".repeat(4096);
        let owners = [
            "",
            "v1/nat\"; flush ruleset; #",
            "v1/nat ",
            "v1/nat 00",
            "v1/nat~",
            "v1/nat\n",
            "v1/nät",
            long.as_str(),
            &long[1..],
        ];
        let mut marks: Vec<_> = owners.iter().map(|owner| Mark::new("vmd-port", owner).0).collect();
        for mark in &marks {
            assert!(mark.len() <= 9 + OWNER_MAX + 1, "{mark}");
            assert_eq!(mark.matches(' ').count(), 2, "{mark}");
            assert!(!mark.contains(['"', ';', '\n', '#']), "{mark}");
        }
        marks.sort();
        marks.dedup();
        assert_eq!(marks.len(), owners.len());
    }
}
