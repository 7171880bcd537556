//! Planned effects for people and for comparison: one line each, and all of it as data, with the digest of content in its place.

use serde_json::{Value, json};
use vm_api::PlannedEffect;
use vm_plugin::plan::{
    Answer, Chain, Condition, Content, Device, GuestPart, HostEffect, Lifetime, MachinePart, Network, Plan,
    Rule, Transport,
};

use super::package::digest;

/// All effects of a plan, in order.
pub(crate) fn effects(plan: &Plan) -> Vec<PlannedEffect> {
    let machine = plan.machine.iter().map(machine);
    machine.chain(plan.guest.iter().map(guest)).chain(plan.host.iter().map(host)).collect()
}

fn effect(kind: &str, summary: String, detail: Value) -> PlannedEffect {
    PlannedEffect { kind: kind.to_owned(), summary, detail }
}

fn value(part: &impl serde::Serialize) -> Value {
    // Plain data with string keys always fits.
    serde_json::to_value(part).unwrap_or_default()
}

fn content_value(content: &Content) -> Value {
    match content {
        Content::Bytes(bytes) => json!({ "bytes": bytes.len(), "digest": digest(bytes) }),
        Content::Blob(name) => json!({ "blob": name }),
    }
}

fn size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let unit = UNITS.iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    unit.map_or_else(|| format!("{bytes} bytes"), |(unit, name)| format!("{} {name}", bytes / unit))
}

fn machine(part: &MachinePart) -> PlannedEffect {
    let (kind, summary) = match part {
        MachinePart::Drive { serial, source, read_only } => {
            let how = if *read_only { "read-only drive" } else { "drive" };
            ("drive", format!("{how} {serial} from {}", source.0))
        }
        MachinePart::Nic { name } => ("nic", format!("network interface {}", name.0)),
        MachinePart::KernelArgument { argument } => {
            ("kernel-argument", format!("kernel argument {argument}"))
        }
        MachinePart::MemoryFloor { bytes } => {
            ("memory-floor", format!("at least {} of memory", size(*bytes)))
        }
        MachinePart::CpuFloor { cpus } => ("cpu-floor", format!("at least {cpus} CPUs")),
        MachinePart::Vsock => ("vsock", "vsock device".to_owned()),
    };
    effect(kind, summary, value(part))
}

fn guest(part: &GuestPart) -> PlannedEffect {
    let (kind, summary) = match part {
        GuestPart::File { path, content, mode, uid, gid } => {
            let what = match content {
                Content::Bytes(bytes) => size(bytes.len() as u64),
                Content::Blob(name) => format!("the file {name}"),
            };
            let detail = json!({
                "part": "file", "path": path, "content": content_value(content), "mode": mode, "uid": uid, "gid": gid,
            });
            return effect(
                "guest-file",
                format!("{path} in the guest ({mode:o}, {uid}:{gid}): {what}"),
                detail,
            );
        }
        GuestPart::Environment { name, value } => {
            ("guest-environment", format!("{name}={value} in the guest's environment"))
        }
        GuestPart::HostsEntry { address, names } => {
            ("guest-hosts", format!("{} is {address} in the guest's hosts file", names.join(" ")))
        }
        GuestPart::MountDrive { serial, target, filesystem, options } => {
            ("guest-mount", format!("drive {serial} at {target} ({filesystem}{})", more(options)))
        }
        GuestPart::Mount { filesystem, target, options } => {
            ("guest-mount", format!("{filesystem} at {target}{}", more(options)))
        }
        GuestPart::KernelModule { name } => ("guest-module", format!("kernel module {name} in the guest")),
        GuestPart::Unit { name, content } => {
            let detail = json!({
                "part": "unit", "name": name,
                "content": { "bytes": content.len(), "digest": digest(content.as_bytes()) },
            });
            return effect("guest-unit", format!("systemd unit {name} in the guest"), detail);
        }
        GuestPart::BootCommand { command } => {
            ("guest-command", format!("at each boot of the guest: {}", command.join(" ")))
        }
    };
    effect(kind, summary, value(part))
}

fn more(options: &[String]) -> String {
    if options.is_empty() { String::new() } else { format!(", {}", options.join(",")) }
}

fn lifetime(lifetime: Lifetime) -> &'static str {
    match lifetime {
        Lifetime::Run => "until the VM stops",
        Lifetime::Vm => "until the VM is deleted",
        Lifetime::Kept => "kept",
    }
}

fn host(planned: &HostEffect) -> PlannedEffect {
    let (kind, summary) = match planned {
        HostEffect::FirewallRule(planned) => ("firewall-rule", rule(planned)),
        HostEffect::Forwarding => {
            ("forwarding", "packets pass between the bridge and other networks".to_owned())
        }
        HostEffect::PublishPort { name, protocol, host_address, host_port, guest_port } => {
            let address = host_address.map_or_else(|| "loopback".to_owned(), |address| address.to_string());
            let port = host_port.map_or_else(|| "a free port".to_owned(), |port| format!("port {port}"));
            let protocol = match protocol {
                Transport::Tcp => "TCP",
                Transport::Udp => "UDP",
            };
            ("publish-port", format!("{}: {protocol} {port} on {address} leads to {guest_port}", name.0))
        }
        HostEffect::Disk { name, size_bytes, filesystem, lifetime: stays } => {
            let with = filesystem.as_ref().map(|name| format!(" with {name}")).unwrap_or_default();
            ("disk", format!("disk {} of {}{with}, {}", name.0, size(*size_bytes), lifetime(*stays)))
        }
        HostEffect::DnsRecord { name, record_type, ttl_seconds, data } => {
            ("dns-record", format!("{name} {ttl_seconds} type {record_type} {data}"))
        }
        HostEffect::BridgeSysctl { key, value } => {
            ("bridge-sysctl", format!("{key} of the bridge is {value}"))
        }
        HostEffect::Tool { name, tool, arguments } => {
            ("tool", format!("{}: runs {tool} {}", name.0, arguments.join(" ")))
        }
        HostEffect::File { path, content, mode, lifetime: stays } => {
            let detail = json!({
                "effect": "file", "path": path, "mode": mode, "lifetime": stays,
                "content": { "bytes": content.len(), "digest": digest(content) },
            });
            let bytes = size(content.len() as u64);
            return effect(
                "host-file",
                format!("its own file {path} ({mode:o}): {bytes}, {}", lifetime(*stays)),
                detail,
            );
        }
    };
    effect(kind, summary, value(planned))
}

fn device(device: Device) -> &'static str {
    match device {
        Device::Vm => "the VM",
        Device::Bridge => "the bridge",
        Device::Elsewhere => "elsewhere",
    }
}

fn network(Network { address, prefix }: &Network) -> String {
    format!("{address}/{prefix}")
}

fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn rule(Rule { chain, conditions, answer }: &Rule) -> String {
    let conditions = conditions.iter().map(|condition| match condition {
        Condition::FromDevice(from) => format!("from {}", device(*from)),
        Condition::ToDevice(to) => format!("to {}", device(*to)),
        Condition::Source(source) => format!("source {}", network(source)),
        Condition::Destination(destination) => format!("destination {}", network(destination)),
        Condition::Protocol(protocol) => word(protocol),
        Condition::DestinationPorts(first, last) if first == last => format!("port {first}"),
        Condition::DestinationPorts(first, last) => format!("ports {first} to {last}"),
        Condition::States(states) => states.iter().map(word).collect::<Vec<_>>().join(" or "),
    });
    let conditions = conditions.collect::<Vec<_>>().join(", ");
    let answer = match answer {
        Answer::Accept => "accept".to_owned(),
        Answer::Deny => "drop".to_owned(),
        Answer::Reject => "reject".to_owned(),
        Answer::Masquerade => "masquerade".to_owned(),
        Answer::Redirect(address, None) => format!("redirect to {address}"),
        Answer::Redirect(address, Some(port)) => format!("redirect to {address} port {port}"),
    };
    let chain = match chain {
        Chain::Input => "input",
        Chain::Forward => "forward",
        Chain::Output => "output",
        Chain::Prerouting => "prerouting",
        Chain::Postrouting => "postrouting",
    };
    if conditions.is_empty() {
        format!("{chain}: {answer}")
    } else {
        format!("{chain}: {conditions}: {answer}")
    }
}

#[cfg(test)]
mod tests {
    use vm_plugin::plan::{ConnectionState, Protocol, RefName};

    use super::*;

    #[test]
    fn each_effect_has_a_line_and_content_is_not_repeated() {
        let plan = Plan {
            machine: vec![MachinePart::MemoryFloor { bytes: 3 << 29 }],
            guest: vec![GuestPart::File {
                path: "/etc/motd".to_owned(),
                content: Content::Bytes(vec![7; 2048]),
                mode: 0o640,
                uid: 0,
                gid: 1,
            }],
            host: vec![
                HostEffect::FirewallRule(Rule {
                    chain: Chain::Forward,
                    conditions: vec![
                        Condition::FromDevice(Device::Vm),
                        Condition::Protocol(Protocol::Tcp),
                        Condition::DestinationPorts(80, 81),
                        Condition::States(vec![ConnectionState::New, ConnectionState::Related]),
                    ],
                    answer: Answer::Accept,
                }),
                HostEffect::Disk {
                    name: RefName("work".to_owned()),
                    size_bytes: 10 << 30,
                    filesystem: Some("ext4".to_owned()),
                    lifetime: Lifetime::Kept,
                },
            ],
        };
        let effects = effects(&plan);
        let lines: Vec<_> = effects.iter().map(|effect| effect.summary.as_str()).collect();
        assert_eq!(
            lines,
            [
                "at least 1536 MiB of memory",
                "/etc/motd in the guest (640, 0:1): 2 KiB",
                "forward: from the VM, tcp, ports 80 to 81, new or related: accept",
                "disk work of 10 GiB with ext4, kept",
            ]
        );
        assert_eq!(effects[1].detail["content"]["bytes"], 2048);
        assert_eq!(effects[1].detail["content"]["digest"], digest(&[7; 2048]));
        assert_eq!(effects[3].detail["effect"], "disk");
    }
}
