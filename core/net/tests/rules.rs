//! The daemon's table and what plugins add to it, as the kernel has them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::net::Ipv4Addr;

use vm_net::{Net, names};
use vm_types::{
    Effect, Handle, Observed,
    plan::{Answer, Chain, Condition, ConnectionState, Device, Network, Protocol, Rule},
};

use common::{bridge, comes_and_goes, firewall, in_namespace, instance, port, rules, run};

#[test]
fn a_flushed_or_edited_table_is_noticed_and_mended() {
    in_namespace(|net| async move {
        net.apply(&firewall()).await.unwrap();
        run("nft flush table inet vmd_3f2a");
        assert!(matches!(net.observe(&firewall()).await.unwrap(), Observed::Foreign(_)));
        net.apply(&firewall()).await.unwrap();
        assert_eq!(net.observe(&firewall()).await.unwrap(), Observed::Present(Handle::None));
        run("nft flush chain inet vmd_3f2a input");
        assert!(matches!(net.observe(&firewall()).await.unwrap(), Observed::Foreign(_)));
        net.undo(&firewall(), &Handle::None).await.unwrap();
        assert!(!run("nft list ruleset").contains("vmd_3f2a"));
    });
}

/// A table as the daemon made it before plugins had rules.
#[test]
fn a_table_of_an_older_version_is_replaced() {
    in_namespace(|net| async move {
        run("nft add table inet vmd_3f2a");
        for (chain, kind, priority) in
            [("postrouting", "nat", 100), ("forward", "filter", 0), ("input", "filter", 0)]
        {
            run(&format!(
                "nft add chain inet vmd_3f2a {chain} {{ type {kind} hook {chain} priority {priority} ; policy accept ; }}"
            ));
            run(&format!("nft add rule inet vmd_3f2a {chain} counter comment \"vmd 0123456789abcdef\""));
        }
        run("nft add chain inet vmd_3f2a former");
        run("nft add rule inet vmd_3f2a forward jump former comment \"vmd 0123456789abcdef\"");
        assert!(matches!(net.observe(&firewall()).await.unwrap(), Observed::Foreign(_)));
        net.apply(&firewall()).await.unwrap();
        assert_eq!(net.observe(&firewall()).await.unwrap(), Observed::Present(Handle::None));
        let ruleset = run("nft list table inet vmd_3f2a");
        assert!(!ruleset.contains("former") && !ruleset.contains("masquerade"), "{ruleset}");
        // A chain of another priority is noticed too.
        run("nft flush chain inet vmd_3f2a input");
        run("nft delete chain inet vmd_3f2a input");
        assert!(matches!(net.observe(&firewall()).await.unwrap(), Observed::Foreign(_)));
        net.apply(&rules("v1/a", &[Answer::Accept])).await.unwrap();
        net.apply(&firewall()).await.unwrap();
        assert_eq!(net.observe(&firewall()).await.unwrap(), Observed::Present(Handle::None));
        assert!(matches!(
            net.observe(&rules("v1/a", &[Answer::Accept])).await.unwrap(),
            Observed::Present(_)
        ));
    });
}

/// A rule of each chain with each condition it can have, as the installed nft takes it, and the plain text of it.
#[test]
fn all_conditions_and_answers_are_taken_by_nft() {
    in_namespace(|net| async move {
        net.apply(&bridge()).await.unwrap();
        net.apply(&firewall()).await.unwrap();
        let network = |text: &str| {
            let net: ipnet::IpNet = text.parse().unwrap();
            Network { address: net.addr(), prefix: net.prefix_len() }
        };
        let (v4, v6) = ("192.0.2.9".parse().unwrap(), "fd00::2".parse().unwrap());
        let rule = |chain, conditions, answer| Rule { chain, conditions, answer };
        use Condition::{Destination, DestinationPorts, FromDevice, Source, States, ToDevice};
        let effect = Effect::Rules {
            table: names::table_name(&instance()),
            bridge: names::bridge_name(&instance()),
            owner: "v1/all".to_owned(),
            address: Some(Ipv4Addr::new(10, 213, 0, 2)),
            rules: vec![
                rule(
                    Chain::Input,
                    vec![FromDevice(Device::Elsewhere), Source(network("0.0.0.0/0"))],
                    Answer::Accept,
                ),
                rule(Chain::Forward, vec![Destination(network("fd00::/8"))], Answer::Deny),
                rule(
                    Chain::Forward,
                    vec![Source(network("fd00::1/128")), ToDevice(Device::Bridge)],
                    Answer::Reject,
                ),
                rule(Chain::Output, vec![Condition::Protocol(Protocol::Icmpv6)], Answer::Reject),
                rule(
                    Chain::Output,
                    vec![ToDevice(Device::Vm), Condition::Protocol(Protocol::Icmp)],
                    Answer::Accept,
                ),
                rule(
                    Chain::Prerouting,
                    vec![DestinationPorts(1, 65535), Condition::Protocol(Protocol::Udp)],
                    Answer::Redirect(v6, Some(53)),
                ),
                rule(Chain::Prerouting, vec![FromDevice(Device::Vm)], Answer::Redirect(v4, None)),
                // What no packet is: taken, and not there.
                rule(Chain::Prerouting, vec![FromDevice(Device::Vm)], Answer::Redirect(v6, None)),
                rule(
                    Chain::Input,
                    vec![Condition::Protocol(Protocol::Tcp), Condition::Protocol(Protocol::Udp)],
                    Answer::Deny,
                ),
                rule(
                    Chain::Input,
                    vec![Source(network("fd00::3/128")), Condition::Protocol(Protocol::Icmp)],
                    Answer::Deny,
                ),
                rule(
                    Chain::Input,
                    vec![Condition::Protocol(Protocol::Tcp), Condition::Protocol(Protocol::Tcp)],
                    Answer::Deny,
                ),
                rule(
                    Chain::Postrouting,
                    vec![States(vec![
                        ConnectionState::New,
                        ConnectionState::Established,
                        ConnectionState::Related,
                        ConnectionState::Invalid,
                    ])],
                    Answer::Masquerade,
                ),
                rule(Chain::Postrouting, vec![Source(network("10.213.0.2/32"))], Answer::Accept),
            ],
        };
        comes_and_goes(&net, &effect).await;
        net.apply(&effect).await.unwrap();
        let listed = run("nft list table inet vmd_3f2a");
        for text in [
            "iifname != \"vmbr-3f2a\" meta nfproto ipv4 accept",
            "ip6 daddr fd00::/8 drop",
            "ip6 saddr fd00::1 oifname \"vmbr-3f2a\" reject",
            "meta l4proto ipv6-icmp reject",
            "oifname \"vmbr-3f2a\" ip daddr 10.213.0.2 meta l4proto icmp accept",
            "th dport 1-65535 meta l4proto udp dnat ip6 to [fd00::2]:53",
            "iifname \"vmbr-3f2a\" ip saddr 10.213.0.2 dnat ip to 192.0.2.9",
            "ip saddr 10.213.0.2 accept",
        ] {
            assert!(listed.contains(text), "{text}: {listed}");
        }
        // Without an address, rules that name the VM's match nothing.
        let Effect::Rules { table, bridge, owner, rules, .. } = effect else { unreachable!() };
        let without = Effect::Rules { table, bridge, owner, address: None, rules };
        net.apply(&without).await.unwrap();
        assert_eq!(net.observe(&without).await.unwrap(), Observed::Present(Handle::None));
        assert!(!run("nft list table inet vmd_3f2a").contains("10.213.0.2 dnat"));
    });
}

#[test]
fn what_cannot_be_is_refused_and_named() {
    in_namespace(|net| async move {
        net.apply(&bridge()).await.unwrap();
        net.apply(&firewall()).await.unwrap();
        let before = run("nft list ruleset");
        let tcp = Condition::Protocol(Protocol::Tcp);
        let to = |port| Answer::Redirect("10.213.0.2".parse().unwrap(), port);
        for (chain, conditions, answer, why) in [
            (Chain::Forward, vec![], Answer::Accept, "no condition"),
            (Chain::Forward, vec![tcp.clone()], Answer::Masquerade, "postrouting only"),
            (Chain::Input, vec![tcp.clone()], to(None), "prerouting and output only"),
            (Chain::Postrouting, vec![tcp.clone()], Answer::Reject, "input, forward and output only"),
            (Chain::Output, vec![Condition::FromDevice(Device::Bridge)], Answer::Deny, "came in"),
            (Chain::Input, vec![Condition::ToDevice(Device::Bridge)], Answer::Deny, "goes out"),
            (Chain::Input, vec![Condition::DestinationPorts(1, 2)], Answer::Deny, "no protocol"),
            (Chain::Output, vec![Condition::FromDevice(Device::Vm)], to(Some(1)), "no protocol"),
            (Chain::Input, vec![tcp.clone(), Condition::DestinationPorts(2, 1)], Answer::Deny, "range"),
            (Chain::Input, vec![Condition::States(vec![])], Answer::Deny, "no states"),
            (
                Chain::Input,
                vec![Condition::Source(Network { address: [10, 0, 0, 0].into(), prefix: 33 })],
                Answer::Deny,
                "prefix",
            ),
            (
                Chain::Output,
                vec![Condition::Destination(Network { address: [10, 0, 0, 0].into(), prefix: 8 })],
                Answer::Redirect("fd00::1".parse().unwrap(), None),
                "IPv4 and IPv6",
            ),
        ] {
            let Effect::Rules { table, bridge, owner, address, .. } = rules("v1/a", &[]) else {
                unreachable!()
            };
            let bad = vec![Rule { chain, conditions, answer }];
            let effect = Effect::Rules { table, bridge, owner, address, rules: bad };
            let error = net.apply(&effect).await.unwrap_err();
            assert!(error.to_string().contains(why) && error.hint().is_some(), "{why}: {error}");
            net.undo(&effect, &Handle::None).await.unwrap();
        }
        assert_eq!(run("nft list ruleset"), before);
    });
}

#[test]
fn no_name_can_speak_to_nft() {
    in_namespace(|net| async move {
        net.apply(&bridge()).await.unwrap();
        net.apply(&firewall()).await.unwrap();
        run("nft add table inet precious");
        let evil = [
            "v1/a\" ; flush ruleset ; #",
            "v1/a\"\n\t}\n}\ntable inet owned { }\n#",
            "v1/a\"}}]},{\"flush\":{\"ruleset\":null}},{\"x\":[{\"y\":{\"z\":\"",
            "v1/a 0123456789abcdef",
            "v1/a; delete table inet precious",
            "$(nft flush ruleset)",
        ];
        let good = rules("v1/a", &[Answer::Accept]);
        net.apply(&good).await.unwrap();
        for owner in evil {
            net.apply(&rules(owner, &[Answer::Deny])).await.unwrap();
            net.apply(&port(owner, "127.0.0.1:0")).await.unwrap();
        }
        // A listing, which quotes comments and escapes nothing, says the same when it is loaded again.
        let listed = run("nft list ruleset");
        assert!(!listed.contains("owned") || !listed.contains("table inet owned"), "{listed}");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("flush ruleset\n{listed}")).unwrap();
        run(&format!("nft -f {}", file.path().display()));
        assert_eq!(run("nft list ruleset"), listed);
        // Each is known again, and taking it away takes nobody else's.
        for owner in evil {
            assert!(matches!(
                net.observe(&rules(owner, &[Answer::Deny])).await.unwrap(),
                Observed::Present(_)
            ));
            net.undo(&rules(owner, &[Answer::Deny]), &Handle::None).await.unwrap();
            net.undo(&port(owner, "127.0.0.1:0"), &Handle::None).await.unwrap();
            assert_eq!(net.observe(&rules(owner, &[Answer::Deny])).await.unwrap(), Observed::Absent);
        }
        assert_eq!(net.observe(&good).await.unwrap(), Observed::Present(Handle::None));
        assert_eq!(net.observe(&firewall()).await.unwrap(), Observed::Present(Handle::None));
        assert!(run("nft list tables").contains("precious"));
    });
}

/// More than a command's output may have in memory.
#[test]
fn the_rules_of_many_vms_can_be_read_and_taken_back() {
    in_namespace(|net| async move {
        net.apply(&bridge()).await.unwrap();
        net.apply(&firewall()).await.unwrap();
        let many = |owner: &str| rules(owner, &vec![Answer::Accept; 1000]);
        let owners = ["v1/many", "v2/many", "v3/many", "v4/many"];
        for owner in owners {
            net.apply(&many(owner)).await.unwrap();
        }
        assert!(run("nft -j list table inet vmd_3f2a").len() > 1 << 20);
        for owner in owners {
            assert_eq!(net.observe(&many(owner)).await.unwrap(), Observed::Present(Handle::None));
            net.undo(&many(owner), &Handle::None).await.unwrap();
        }
        assert!(!run("nft list table inet vmd_3f2a").contains("many"));
        assert_eq!(net.observe(&firewall()).await.unwrap(), Observed::Present(Handle::None));
    });
}
