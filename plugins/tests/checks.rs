//! What each bundled plugin plans and answers, of whatever build.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};
use vm_plugin::{
    CallError, Grant, Granted, Hook, Input, Outcome, Plugin, Query, Resolved, Resolver, Severity,
    call::Change,
    plan::{Answer, Chain, Condition, Content, Device, GuestPart, HostEffect, Lifetime, MachinePart, Rule},
    ports::{Directory, GuestOutput},
};

use crate::host::{Guest, Source, granted, input, load, state};

/// Where clouds tell a machine its credentials (RFC 3927).
const LINK_LOCAL: &str = "169.254.0.0/16";

async fn call(plugin: &Plugin, hook: Hook, input: Input) -> Outcome {
    plugin.call(hook, input, &state()).await.unwrap_or_else(|error| panic!("{hook}: {error}"))
}

pub(crate) async fn components_are_small_and_answer_the_same_when_asked_again(source: Source) {
    for name in ["limits", "nat", "provision", "work-disk", "zone"] {
        let manifest = std::fs::read_to_string(source.directory(name).join("plugin.toml")).unwrap();
        let plugin = load(source, name, json!({})).await;
        let component = source.directory(name).join(&plugin.manifest().component);
        assert!(component.metadata().unwrap().len() < 110_000, "{name} has grown");
        assert!(!plugin.manifest().description.is_empty() && manifest.contains("[config]"), "{name}");
        for hook in Hook::CAPABILITY.into_iter().filter(|&hook| plugin.has(hook)) {
            let input = Input {
                sandbox: Some(Arc::new(Guest::default())),
                former_config: Some(plugin.check_config(json!({})).unwrap()),
                ..input()
            };
            let (first, second) =
                (call(&plugin, hook, input.clone()).await, call(&plugin, hook, input).await);
            assert_eq!((first.plan, first.findings), (second.plan, second.findings), "{name}: {hook}");
        }
    }
}

pub(crate) async fn nat_lets_one_address_out_and_only_answers_in(source: Source) {
    let plugin = load(source, "nat", json!({ "deny": ["198.51.100.7/24"] })).await;
    let host = call(&plugin, Hook::PrepareHost, input()).await.plan.host;
    assert_eq!(host[0], HostEffect::Forwarding);
    // The component of the corpus is older than the rule about link-local addresses.
    let rules: Vec<_> = host[1..]
        .iter()
        .map(|effect| match effect {
            HostEffect::FirewallRule(rule) => rule,
            other => panic!("{other:?}"),
        })
        .filter(|rule| destination(rule) != Some(LINK_LOCAL.to_owned()))
        .collect();
    let answers: Vec<_> = rules.iter().map(|rule| (rule.chain, rule.answer.clone())).collect();
    assert_eq!(
        answers,
        [
            (Chain::Forward, Answer::Deny),
            (Chain::Forward, Answer::Reject),
            (Chain::Forward, Answer::Accept),
            (Chain::Forward, Answer::Accept),
            (Chain::Postrouting, Answer::Masquerade),
        ]
    );
    for rule in &rules {
        let guest: IpAddr = "192.0.2.7".parse().unwrap();
        let mine = rule.conditions.iter().any(|condition| {
            matches!(condition, Condition::Source(network) | Condition::Destination(network)
                if network.address == guest && network.prefix == 32)
        });
        assert!(mine, "{rule:?} is about others too");
    }
    let incoming = rules[3];
    assert!(incoming.conditions.contains(&Condition::ToDevice(Device::Bridge)));
    assert!(incoming.conditions.iter().any(|condition| matches!(condition, Condition::States(states)
        if !states.contains(&vm_plugin::plan::ConnectionState::New))));
}

/// Today's component only.
#[tokio::test]
async fn nat_keeps_guests_from_what_clouds_tell_their_machines() {
    for (config, refused) in [
        (json!({}), vec![LINK_LOCAL.to_owned()]),
        (json!({ "deny": ["198.51.100.7"] }), vec!["198.51.100.7/32".to_owned(), LINK_LOCAL.to_owned()]),
        (json!({ "link-local": true }), vec![]),
    ] {
        let plugin = load(Source::Fresh, "nat", config.clone()).await;
        let host = call(&plugin, Hook::PrepareHost, input()).await.plan.host;
        let rules = host.iter().filter_map(|effect| match effect {
            HostEffect::FirewallRule(rule) if rule.answer == Answer::Reject => destination(rule),
            _ => None,
        });
        assert_eq!(rules.collect::<Vec<_>>(), refused, "{config}");
    }
}

/// The network that a rule is about the way to.
fn destination(rule: &Rule) -> Option<String> {
    rule.conditions.iter().find_map(|condition| match condition {
        Condition::Destination(network) => Some(format!("{}/{}", network.address, network.prefix)),
        _ => None,
    })
}

pub(crate) async fn nat_leaves_other_networks_alone_and_needs_its_grants(source: Source) {
    let mut alone = input();
    alone.vm.as_mut().unwrap().network = "none".to_owned();
    assert!(call(&load(source, "nat", json!({})).await, Hook::PrepareHost, alone).await.plan.is_empty());

    let firewall = Granted::These(vec![Grant::Firewall { chains: vec![Chain::Forward, Chain::Postrouting] }]);
    let plugin = granted(source, "nat", json!({}), firewall).await;
    let error = plugin.call(Hook::PrepareHost, input(), &state()).await.unwrap_err();
    assert!(matches!(error, CallError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("forwarding"), "{error}");
}

pub(crate) async fn nat_refuses_a_configuration_that_no_rule_could_have(source: Source) {
    let plugin = load(source, "nat", json!({})).await;
    let change = |deny: &str| Input {
        former_config: Some(json!({ "deny": [] })),
        config: Some(plugin.check_config(json!({ "deny": [deny] })).unwrap()),
        ..input()
    };
    assert_eq!(call(&plugin, Hook::ConfigChange, change("192.0.2.0/24")).await.change, Some(Change::Applied));
    for bad in ["2001:db8::/32", "intranet"] {
        let outcome = call(&plugin, Hook::ConfigChange, change(bad)).await;
        assert!(
            matches!(&outcome.change, Some(Change::Refused(error)) if error.hint.is_some()),
            "{:?}",
            outcome.change
        );
    }
}

pub(crate) async fn the_work_disk_is_one_disk_in_host_machine_and_guest(source: Source) {
    let plugin =
        load(source, "work-disk", json!({ "path": "/srv", "size-gib": 3, "lifetime": "kept" })).await;
    let host = call(&plugin, Hook::PrepareHost, input()).await.plan.host;
    let [HostEffect::Disk { name, size_bytes, filesystem, lifetime }] = host.as_slice() else {
        panic!("{host:?}")
    };
    assert_eq!((*size_bytes, filesystem.as_deref(), *lifetime), (3 << 30, Some("ext4"), Lifetime::Kept));
    let machine = call(&plugin, Hook::ContributeMachine, input()).await.plan.machine;
    let [MachinePart::Drive { serial, source: disk, read_only: false }] = machine.as_slice() else {
        panic!("{machine:?}")
    };
    assert_eq!(disk, name);
    let guest = call(&plugin, Hook::ContributeGuest, input()).await.plan.guest;
    let [GuestPart::MountDrive { serial: mounted, target, filesystem, options }] = guest.as_slice() else {
        panic!("{guest:?}")
    };
    assert_eq!((mounted, target.as_str(), filesystem.as_str()), (serial, "/srv", "ext4"));
    assert_eq!(options, &["noatime"], "the manifest's default");

    let labelled = load(source, "work-disk", json!({ "label": "work" })).await;
    assert!(call(&labelled, Hook::PrepareHost, input()).await.plan.is_empty());
    let mut with_label = input();
    with_label.vm.as_mut().unwrap().labels.insert("work".to_owned(), String::new());
    assert_eq!(call(&labelled, Hook::PrepareHost, with_label).await.plan.len(), 1);
}

pub(crate) async fn a_work_disk_does_not_shrink(source: Source) {
    let plugin = load(source, "work-disk", json!({ "size-gib": 3 })).await;
    let change = |former: Value, new: Value| Input {
        former_config: Some(plugin.check_config(former).unwrap()),
        config: Some(plugin.check_config(new).unwrap()),
        ..input()
    };
    let smaller = change(json!({ "size-gib": 4 }), json!({ "size-gib": 3 }));
    let outcome = call(&plugin, Hook::ConfigChange, smaller).await;
    assert!(matches!(outcome.change, Some(Change::Refused(_))), "{:?}", outcome.change);
    let moved = change(json!({}), json!({ "path": "/srv" }));
    assert_eq!(call(&plugin, Hook::ConfigChange, moved).await.change, Some(Change::NeedsRestart));
}

pub(crate) async fn limits_refuse_with_a_hint(source: Source) {
    let plugin = load(source, "limits", json!({ "max-cpus": 1, "required-labels": ["owner"] })).await;
    assert!(plugin.manifest().grants.is_empty());
    let findings = call(&plugin, Hook::Preflight, input()).await.findings;
    let subjects: Vec<_> = findings.iter().map(|finding| finding.subject.as_str()).collect();
    assert_eq!(subjects, ["cpus", "labels"]);
    assert!(findings.iter().all(|finding| finding.severity == Severity::Failure && finding.hint.is_some()));

    let outcome = call(&load(source, "limits", json!({})).await, Hook::Preflight, input()).await;
    assert_eq!(outcome.refusals().count(), 0);
}

pub(crate) async fn provision_plans_files_and_environment(source: Source) {
    let config = json!({
        "files": [
            { "path": "/etc/motd", "content": "hello\n" },
            { "path": "/root/key", "blob": "key.pem", "mode": "0600", "uid": 7 },
        ],
        "environment": { "EDITOR": "vi" },
    });
    let plugin = load(source, "provision", config).await;
    let guest = call(&plugin, Hook::ContributeGuest, input()).await.plan.guest;
    let file = |path: &str, content, mode, uid| GuestPart::File {
        path: path.to_owned(),
        content,
        mode,
        uid,
        gid: 0,
    };
    assert_eq!(
        guest,
        [
            file("/etc/motd", Content::Bytes(b"hello\n".to_vec()), 0o644, 0),
            file("/root/key", Content::Blob("key.pem".to_owned()), 0o600, 7),
            GuestPart::Environment { name: "EDITOR".to_owned(), value: "vi".to_owned() },
        ]
    );
    let empty = load(source, "provision", json!({ "files": [{ "path": "/x" }] })).await;
    let error = empty.call(Hook::ContributeGuest, input(), &state()).await.unwrap_err();
    assert!(matches!(&error, CallError::Failed { error, .. } if error.code == "file.no-source"), "{error}");
}

pub(crate) async fn first_commands_run_once_and_again_where_one_failed(source: Source) {
    let first = json!([{ "run": "make setup", "user": "dev", "directory": "/work" }, { "run": "make more" }]);
    let plugin = load(source, "provision", json!({ "first-boot": first })).await;
    let state = state();
    let start = |code| {
        let guest = Arc::new(Guest {
            answer: GuestOutput { code: Some(code), stderr: b"no rule".to_vec(), ..GuestOutput::default() },
            ran: Mutex::default(),
        });
        (guest.clone(), Input { sandbox: Some(guest), ..input() })
    };

    let (guest, failing) = start(2);
    let error = plugin.call(Hook::PostStart, failing, &state).await.unwrap_err();
    let CallError::Failed { error, .. } = &error else { panic!("{error}") };
    assert!(error.message.contains("make setup") && error.message.contains("no rule"), "{}", error.message);
    assert_eq!(guest.ran().len(), 1, "it goes on after a failure");

    let (guest, working) = start(0);
    plugin.call(Hook::PostStart, working.clone(), &state).await.unwrap();
    let ran = guest.ran();
    assert_eq!(ran[0].command, ["/bin/sh", "-c", "make setup"]);
    assert_eq!((ran[0].user.as_deref(), ran[0].directory.as_deref()), (Some("dev"), Some("/work")));
    assert_eq!(ran.len(), 2);

    plugin.call(Hook::PostStart, working, &state).await.unwrap();
    assert_eq!(guest.ran().len(), 2, "it runs them again");
}

struct OneVm;

impl Directory for OneVm {
    fn names(&self) -> Vec<String> {
        vec!["dev".to_owned()]
    }

    fn addresses(&self, name: &str) -> Vec<IpAddr> {
        if name == "dev" { vec!["192.0.2.7".parse().unwrap_or(IpAddr::from([0; 4]))] } else { Vec::new() }
    }

    fn name_of(&self, address: IpAddr) -> Option<String> {
        self.addresses("dev").contains(&address).then(|| "dev".to_owned())
    }
}

pub(crate) async fn the_zone_has_names_and_the_way_back(source: Source) {
    let plugin = Arc::new(load(source, "zone", json!({ "ttl-seconds": 9 })).await);
    let resolver = Resolver::start(plugin, input(), state(), Arc::new(OneVm)).await.unwrap();
    assert_eq!(resolver.zones(), ["vm", "2.0.192.in-addr.arpa"]);
    let ask = async |name: &str, query_type| {
        let query = Query { name: name.to_owned(), query_type, query_class: 1, asker: None };
        resolver.resolve(query).await.unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let record = |name: &str, record_type, data: &str| {
        Resolved::Records(vec![vm_plugin::Record {
            name: name.to_owned(),
            record_type,
            ttl_seconds: 9,
            data: data.to_owned(),
        }])
    };
    assert_eq!(ask("dev.vm", 1).await, record("dev.vm", 1, "192.0.2.7"));
    assert_eq!(ask("dev.vm", 28).await, Resolved::NoData);
    assert_eq!(ask("gone.vm", 1).await, Resolved::NxDomain);
    let back = "7.2.0.192.in-addr.arpa";
    assert_eq!(ask(back, 12).await, record(back, 12, "dev.vm."));
    assert_eq!(ask("8.2.0.192.in-addr.arpa", 12).await, Resolved::NxDomain);
}
