//! What an operator is told before a plugin is installed: what it is, what it asks for, and what it cannot do at all.
//!
//! The plugin's own words (description and reasons) stand beside ours, which do not depend on what its author wishes to say.

use vm_api::{PluginGrant, PluginInspection, PluginSignature};

use crate::{output::facts, size::human};

/// What a grant of a kind allows; nothing for one that is newer than this program.
fn allows(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "firewall" => "rules in these chains of the daemon's own firewall table",
        "forwarding" => "packets between the bridge and other networks",
        "publish-port" => "ports of this host that lead into guests",
        "disk" => "disks of its own on this host",
        "dns-record" => "records in the name service's zones",
        "bridge-sysctl" => "settings of the bridge",
        "tool" => "running this program on this host, as the daemon does and outside of any sandbox",
        "host-file" => "writing files into its own directory on this host",
        "drive" => "attaching its disks to VMs",
        "nic" => "more network interfaces of VMs",
        "vsock" => "a vsock device of VMs",
        "kernel-argument" => "these arguments of the guests' kernels",
        "machine-size" => "raising memory and CPUs of VMs up to this",
        "guest-file" => "these files in guests, at boot",
        "guest-environment" => "these variables of the guests' environment",
        "guest-hosts" => "these names in the guests' hosts files",
        "guest-mount" => "mounts in guests at these places",
        "guest-module" => "loading these kernel modules in guests",
        "guest-unit" => "these systemd units in guests",
        "guest-command" => "commands in guests at each boot, as root",
        "guest-live" => "any command and file in running guests, as root",
        "repository" => "reading repositories that are brought into guests",
        "clock" => "telling the time",
        "random" => "random numbers",
        _ => return None,
    })
}

/// Grants that change this host.
const OF_HOST: [&str; 8] =
    ["firewall", "forwarding", "publish-port", "disk", "dns-record", "bridge-sysctl", "tool", "host-file"];

/// What a plugin with these grants, all given, cannot do whatever its code is.
fn cannot(grants: &[PluginGrant]) -> String {
    let has = |kind: &str| grants.iter().any(|grant| grant.kind == kind);
    if has("tool") {
        return "By itself it has no files, network, processes or environment of this host; what the tools below do with \
                their arguments is beyond the sandbox."
            .to_owned();
    }
    let files = if has("repository") {
        "read files of this host, except of a repository that is brought into a guest"
    } else {
        "read files of this host"
    };
    let absent = [
        (true, files),
        (true, "use the network of this host"),
        (true, "see its processes or environment"),
        (!OF_HOST.iter().any(|kind| has(kind)), "change this host"),
        (!has("guest-live"), "act in a running guest"),
        (!has("clock"), "tell the time"),
        (!has("random"), "draw random numbers"),
    ];
    let absent: Vec<_> = absent.into_iter().filter(|(absent, _)| *absent).map(|(_, what)| what).collect();
    let (last, others) = absent.split_last().unwrap_or((&"", &[]));
    format!("It cannot {}, or {last}.", others.join(", "))
}

/// What it can do in its world without any grant.
fn always(world: &str) -> &'static str {
    match world {
        "capability" => {
            "Without any grant it sees what VMs are (not what is in them), may refuse a start, keeps small values and writes to \
             its log."
        }
        "dns" => {
            "Without any grant it sees questions for names in its zones and the addresses of VMs, answers, keeps small values \
             and writes to its log."
        }
        "workspace-importer" => {
            "Without any grant it offers ways to bring a repository into a guest, keeps small values and writes to its log."
        }
        _ => "",
    }
}

/// The grants, some lines each; `mark` says how each stands.
pub(super) fn grants(grants: &[PluginGrant], mark: impl Fn(&PluginGrant) -> &'static str) -> String {
    let one = |grant: &PluginGrant| {
        let PluginGrant { kind, detail, reason, .. } = grant;
        let head = format!("  {kind}  {detail}");
        let mark = mark(grant);
        let mark = if mark.is_empty() { String::new() } else { format!("  [{mark}]") };
        let allows = allows(kind).map(|what| format!("      allows: {what}\n")).unwrap_or_default();
        format!("{}{mark}\n{allows}      why:    {reason}\n", head.trim_end())
    };
    grants.iter().map(one).collect()
}

/// Who has signed it; of what comes with the daemon nobody asks.
pub(super) fn signature(source: &str, signature: &PluginSignature) -> Option<String> {
    if source.starts_with("bundled:") {
        return None;
    }
    Some(match signature {
        PluginSignature::Trusted { key, fingerprint } => {
            let short = fingerprint.get(.."sha256:".len() + 12).unwrap_or(fingerprint);
            format!("signed by {key} ({short})")
        }
        PluginSignature::Untrusted { reason } => format!("not to be trusted: {reason}"),
        PluginSignature::Unsigned => "unsigned".to_owned(),
        PluginSignature::Unchecked => "not checked; the daemon was told no key to trust".to_owned(),
    })
}

/// All that is to be known before the question.
pub(super) fn text(plugin: &PluginInspection) -> String {
    let PluginInspection { name, version, description, world, .. } = plugin;
    let installed = plugin.installed.as_ref().map(|installed| {
        let same = if installed.digest == plugin.digest { ", the same component" } else { "" };
        match installed.version.as_str() {
            "" => "one that cannot be read".to_owned(),
            version => format!("version {version}{same}"),
        }
    });
    let order = |names: &[String]| (!names.is_empty()).then(|| names.join(", "));
    let head = facts([
        ("plugin", Some(format!("{name} {version}, world {world}"))),
        ("description", (!description.is_empty()).then(|| description.clone())),
        ("from", Some(plugin.source.clone())),
        ("signature", signature(&plugin.source, &plugin.signature)),
        ("component", Some(format!("{}, {}", human(plugin.component_bytes), plugin.digest))),
        ("replaces", installed),
        ("required", plugin.required.then(|| "yes: where it fails, VMs do not start".to_owned())),
        ("before", order(&plugin.before)),
        ("after", order(&plugin.after)),
    ]);
    let asks = match plugin.grants.len() {
        0 => "It asks for nothing more.\n".to_owned(),
        1 => "It asks for this (why in its author's words):\n".to_owned(),
        count => format!("It asks for these {count} (why in its author's words):\n"),
    };
    let mark = |grant: &PluginGrant| match (&plugin.installed, grant.granted) {
        (None, _) => "",
        (Some(_), true) => "granted already",
        (Some(_), false) => "new",
    };
    let grants = grants(&plugin.grants, mark);
    format!("{head}\n{}\n{}\n{asks}{grants}", always(world), cannot(&plugin.grants))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(kind: &str) -> PluginGrant {
        PluginGrant {
            index: 0,
            kind: kind.to_owned(),
            detail: String::new(),
            reason: "because".to_owned(),
            granted: false,
            grant: serde_json::json!({ "kind": kind }),
        }
    }

    #[test]
    fn what_is_granted_is_not_said_to_be_impossible() {
        let nothing = cannot(&[]);
        assert_eq!(
            nothing,
            "It cannot read files of this host, use the network of this host, see its processes or environment, change \
             this host, act in a running guest, tell the time, or draw random numbers."
        );
        for (kind, phrase) in [
            ("clock", "tell the time"),
            ("random", "random numbers"),
            ("guest-live", "act in a running guest"),
            ("firewall", "change this host"),
            ("host-file", "change this host"),
            ("tool", "cannot"),
        ] {
            assert!(nothing.contains(phrase), "{phrase}");
            let text = cannot(&[grant(kind)]);
            assert!(!text.contains(phrase), "{kind}: {text}");
        }
        assert!(cannot(&[grant("repository")]).contains("except of a repository"));
        assert!(cannot(&[grant("guest-file")]).contains("change this host"));
    }

    #[test]
    fn a_grant_of_a_kind_that_is_not_known_yet_is_shown_all_the_same() {
        assert_eq!(grants(&[grant("levitate")], |_| "new"), "  levitate  [new]\n      why:    because\n");
    }
}
