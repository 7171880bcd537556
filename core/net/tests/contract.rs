//! One contract for [`HostNet`] and [`FakeNet`], then what only a real kernel can show. Whatever touches
//! the kernel runs on a thread in a network namespace of its own.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use vm_net::{FakeNet, HostRoute, Net, NetError, addresses, names, pick_subnet, subnet};
use vm_types::{Effect, Handle, InstanceId, Observed, plan::Answer};

use common::{bridge, comes_and_goes, firewall, in_namespace, instance, port, rules, run};

const SETTING: &str = "net/ipv4/conf/all/log_martians";

fn tap() -> Effect {
    Effect::Tap { name: names::tap_name(&instance(), 2), bridge: names::bridge_name(&instance()) }
}

async fn rules_and_ports(net: &dyn Net) {
    let (one, two) = (rules("v1/a", &[Answer::Accept]), rules("v2/a", &[Answer::Deny, Answer::Accept]));
    let local = port("v1/a/web", "127.0.0.1:0");
    // They need the table, and are gone without it.
    for effect in [&one, &local] {
        assert_eq!(net.observe(effect).await.unwrap(), Observed::Absent);
        let error = net.apply(effect).await.unwrap_err();
        assert!(matches!(error, NetError::NoTable { .. }) && error.hint().is_some(), "{error:?}");
        net.undo(effect, &Handle::None).await.unwrap();
    }
    net.apply(&bridge()).await.unwrap();
    net.apply(&firewall()).await.unwrap();
    comes_and_goes(net, &one).await;
    net.apply(&two).await.unwrap();
    comes_and_goes(net, &one).await;
    assert_eq!(net.observe(&two).await.unwrap(), Observed::Present(Handle::None));

    // In another shape.
    let longer = rules("v2/a", &[Answer::Reject, Answer::Deny, Answer::Accept]);
    assert!(matches!(net.observe(&longer).await.unwrap(), Observed::Foreign(_)));
    comes_and_goes(net, &longer).await;

    // What no chain can do.
    let refused = rules("v2/a", &[Answer::Accept, Answer::Masquerade]);
    let error = net.apply(&refused).await.unwrap_err();
    assert!(error.to_string().starts_with("rule 2 of v2/a masquerades"), "{error}");
    assert_eq!(net.observe(&refused).await.unwrap(), Observed::Absent);
    net.undo(&refused, &Handle::None).await.unwrap();

    // A port is chosen once.
    let chosen = net.apply(&local).await.unwrap();
    assert!(matches!(&chosen, Handle::Value { value } if value.starts_with("127.0.0.1:")), "{chosen:?}");
    assert_eq!(net.apply(&local).await.unwrap(), chosen);
    assert_eq!(net.observe(&local).await.unwrap(), Observed::Present(chosen.clone()));
    let second = port("v2/a/web", "127.0.0.1:0");
    assert_ne!(net.apply(&second).await.unwrap(), chosen);
    let Handle::Value { value } = &chosen else { unreachable!() };
    let error = net.apply(&port("v3/a/web", value)).await.unwrap_err();
    assert!(matches!(error, NetError::PortTaken { .. }) && error.hint().is_some(), "{error:?}");
    let error = net.apply(&port("v3/a/web", "[::1]:0")).await.unwrap_err();
    assert!(matches!(error, NetError::PortFamily { .. }) && error.hint().is_some(), "{error:?}");
    net.undo(&port("v3/a/web", "[::1]:0"), &Handle::None).await.unwrap();
    for _ in 0..2 {
        net.undo(&local, &chosen).await.unwrap();
        assert_eq!(net.observe(&local).await.unwrap(), Observed::Absent);
    }
    assert!(matches!(net.observe(&second).await.unwrap(), Observed::Present(_)));

    // All of it goes with the table.
    net.apply(&one).await.unwrap();
    net.undo(&firewall(), &Handle::None).await.unwrap();
    net.apply(&firewall()).await.unwrap();
    for effect in [&one, &second] {
        assert_eq!(net.observe(effect).await.unwrap(), Observed::Absent);
        net.undo(effect, &Handle::None).await.unwrap();
    }
    net.undo(&firewall(), &Handle::None).await.unwrap();
    net.undo(&bridge(), &Handle::None).await.unwrap();
}

async fn contract(
    net: &dyn Net,
    make_foreign: impl Fn(&Effect),
    set: impl Fn(&str),
    get: impl Fn() -> String,
) {
    for effect in [bridge(), tap(), firewall()] {
        assert_eq!(net.observe(&effect).await.unwrap(), Observed::Absent);
    }
    assert!(net.apply(&tap()).await.is_err(), "a tap needs its bridge");
    assert_eq!(net.observe(&tap()).await.unwrap(), Observed::Absent);

    net.apply(&bridge()).await.unwrap();
    comes_and_goes(net, &tap()).await;
    net.undo(&bridge(), &Handle::None).await.unwrap();
    comes_and_goes(net, &bridge()).await;
    comes_and_goes(net, &firewall()).await;
    rules_and_ports(net).await;

    // Ours in another shape is told, and mended by apply.
    net.apply(&bridge()).await.unwrap();
    let moved =
        Effect::Bridge { name: names::bridge_name(&instance()), address: "10.213.9.1/24".parse().unwrap() };
    assert!(matches!(net.observe(&moved).await.unwrap(), Observed::Foreign(_)));
    comes_and_goes(net, &moved).await;
    net.apply(&firewall()).await.unwrap();
    let moved = Effect::Firewall {
        table: names::table_name(&instance()),
        bridge: names::bridge_name(&instance()),
        subnet: "10.213.9.0/24".parse().unwrap(),
    };
    assert!(matches!(net.observe(&moved).await.unwrap(), Observed::Foreign(_)));
    comes_and_goes(net, &moved).await;

    // What has our names is found, and nothing else.
    assert_eq!(net.found(&instance()).await.unwrap(), []);
    for effect in [bridge(), firewall(), tap()] {
        net.apply(&effect).await.unwrap();
    }
    let other: InstanceId = "3f2b".parse().unwrap();
    assert_eq!(net.found(&other).await.unwrap(), []);
    let found = net.found(&instance()).await.unwrap();
    let mut ids: Vec<_> = found.iter().map(Effect::id).collect();
    assert_eq!(ids.pop(), Some(tap().id()), "taps are last");
    ids.sort();
    assert_eq!(ids, [bridge().id(), firewall().id()]);
    // What was found can be undone, whatever its sizes and addresses.
    for effect in found.iter().rev() {
        net.undo(effect, &Handle::None).await.unwrap();
    }
    assert_eq!(net.found(&instance()).await.unwrap(), []);

    // A kernel setting goes back to what it was, unless somebody else changed it.
    let setting = Effect::Sysctl { key: SETTING.to_owned(), value: "1".to_owned() };
    set("0");
    assert_eq!(net.observe(&setting).await.unwrap(), Observed::Absent);
    let handle = net.former(&setting).await.unwrap();
    assert_eq!(handle, Handle::Previous { value: "0".to_owned() });
    net.apply(&setting).await.unwrap();
    assert!(matches!(net.observe(&setting).await.unwrap(), Observed::Present(_)));
    net.undo(&setting, &handle).await.unwrap();
    assert_eq!(get(), "0");
    net.undo(&setting, &handle).await.unwrap();
    net.apply(&setting).await.unwrap();
    set("2");
    net.undo(&setting, &handle).await.unwrap();
    assert_eq!(get(), "2");

    // What has our name and is not ours stays as it is.
    net.apply(&bridge()).await.unwrap();
    for effect in [tap(), firewall()] {
        make_foreign(&effect);
        assert!(matches!(net.observe(&effect).await.unwrap(), Observed::Foreign(_)), "{}", effect.id());
        for result in [net.apply(&effect).await.map(|_| ()), net.undo(&effect, &Handle::None).await] {
            let error = result.unwrap_err();
            assert!(matches!(error, NetError::Foreign { .. }) && error.hint().is_some(), "{error:?}");
        }
        assert!(matches!(net.observe(&effect).await.unwrap(), Observed::Foreign(_)), "{}", effect.id());
    }
    net.undo(&bridge(), &Handle::None).await.unwrap();
    make_foreign(&bridge());
    assert!(matches!(net.apply(&bridge()).await, Err(NetError::Foreign { .. })));
    assert!(matches!(net.undo(&bridge(), &Handle::None).await, Err(NetError::Foreign { .. })));

    let other = Effect::Directory { path: "/nowhere".into(), mode: 0o700 };
    for result in [
        net.observe(&other).await.map(|_| ()),
        net.apply(&other).await.map(|_| ()),
        net.undo(&other, &Handle::None).await,
    ] {
        assert!(matches!(result, Err(NetError::NotMine { .. })), "{result:?}");
    }
}

#[tokio::test]
async fn the_fake_keeps_the_contract() {
    let net = FakeNet::new();
    let make_foreign = |effect: &Effect| match effect {
        Effect::Bridge { name, .. } | Effect::Tap { name, .. } | Effect::Firewall { table: name, .. } => {
            net.put_foreign(name);
        }
        other => panic!("{other:?}"),
    };
    contract(&net, make_foreign, |value| net.set_setting(SETTING, value), || net.setting(SETTING)).await;
}

#[tokio::test]
async fn the_fake_fails_when_told() {
    let net = FakeNet::new();
    net.fail_apply(2);
    net.apply(&bridge()).await.unwrap();
    assert!(matches!(net.apply(&tap()).await, Err(NetError::Injected { .. })));
    net.apply(&tap()).await.unwrap();
    net.fail_undo(true);
    assert!(net.undo(&tap(), &Handle::None).await.is_err());
    assert_eq!(net.applied(), [bridge().id(), tap().id()]);
}

#[test]
fn the_host_keeps_the_contract() {
    in_namespace(|net| async move {
        let make_foreign = |effect: &Effect| match effect {
            Effect::Bridge { name, .. } => drop(run(&format!("ip tuntap add {name} mode tap"))),
            Effect::Tap { name, .. } => drop(run(&format!("ip link add {name} type bridge"))),
            Effect::Firewall { table, .. } => {
                run(&format!("nft add table inet {table}"));
                run(&format!("nft add chain inet {table} mine"));
                run(&format!("nft add rule inet {table} mine accept"));
            }
            other => panic!("{other:?}"),
        };
        let path = format!("/proc/sys/{SETTING}");
        let get = || std::fs::read_to_string(&path).unwrap().trim().to_owned();
        contract(&net, make_foreign, |value| std::fs::write(&path, value).unwrap(), get).await;
    });
}

#[test]
fn devices_have_the_shape_guests_need() {
    in_namespace(|net| async move {
        net.apply(&bridge()).await.unwrap();
        net.apply(&tap()).await.unwrap();
        let shown = run("ip -d -o link show vmbr-3f2a");
        for wanted in ["stp_state 0", "forward_delay 0", "link/ether 02:00:0a:d5:00:01", "mtu 1500", "UP"] {
            assert!(shown.contains(wanted), "{wanted}: {shown}");
        }
        assert!(run("ip -o -4 addr show dev vmbr-3f2a").contains("10.213.0.1/24"));
        let shown = run("ip -d -o link show vt3f2a0002");
        for wanted in ["tun type tap", "persist on", "pi off", "user root", "master vmbr-3f2a", "UP"] {
            assert!(shown.contains(wanted), "{wanted}: {shown}");
        }
        assert!(!shown.contains("multi_queue on"), "{shown}");
        // A tap taken off its bridge by somebody is put back.
        run("ip link set vt3f2a0002 nomaster down");
        assert!(matches!(net.observe(&tap()).await.unwrap(), Observed::Foreign(_)));
        net.apply(&tap()).await.unwrap();
        assert_eq!(net.observe(&tap()).await.unwrap(), Observed::Present(Handle::None));
    });
}

#[test]
fn a_subnet_in_use_is_refused_with_the_route_named() {
    in_namespace(|net| async move {
        net.apply(&bridge()).await.unwrap();
        let own = names::bridge_name(&instance());
        let wanted = "10.213.0.0/24".parse().unwrap();
        net.check_subnet(wanted, &own).await.unwrap();
        let error = net.check_subnet(wanted, "vmbr-0000").await.unwrap_err();
        assert!(error.to_string().contains(&own), "{error}");
        assert!(error.hint().unwrap().contains("network.subnet"));

        run("ip link add other type bridge");
        run("ip link set other up");
        run("ip addr add 10.213.1.9/32 dev other");
        run("ip route add 10.213.2.0/23 dev other");
        run("ip route add blackhole 10.213.4.0/24");
        run("ip route add default dev other");
        // An address of a device that is down has no route yet.
        run("ip link add idle type bridge");
        run("ip addr add 10.213.5.1/24 dev idle");
        let picked = pick_subnet(&net, &subnet::candidates(), "vmbr-0000").await.unwrap();
        assert_eq!(picked.to_string(), "10.213.6.0/24");
        let error = net.check_subnet("10.213.3.0/24".parse().unwrap(), &own).await.unwrap_err();
        assert_eq!(error.to_string(), "the subnet 10.213.3.0/24 overlaps with 10.213.2.0/23 on other");
        let none = pick_subnet(&net, &["10.213.4.0/24".parse().unwrap()], &own).await;
        assert!(matches!(none, Err(NetError::NoFreeSubnet { count: 1 })));

        assert_eq!(net.guest_mtu().await.unwrap(), None);
        run("ip link set other mtu 1400");
        assert_eq!(net.guest_mtu().await.unwrap(), Some(1400));
    });
}

#[tokio::test]
async fn picking_works_on_the_fake_too() {
    let net = FakeNet::new();
    net.set_routes(vec![HostRoute {
        destination: "10.0.0.0/8".parse().unwrap(),
        device: Some("tun0".into()),
    }]);
    let picked = pick_subnet(&net, &subnet::candidates(), "vmbr-3f2a").await.unwrap();
    assert_eq!(picked.to_string(), "192.168.213.0/24");
    assert_eq!(addresses::gateway(picked).unwrap().to_string(), "192.168.213.1");
}

#[test]
fn a_firewall_that_drops_forwarding_is_explained() {
    in_namespace(|net| async move {
        net.apply(&firewall()).await.unwrap();
        assert_eq!(net.forwarding_blocked("vmbr-3f2a").await.unwrap(), []);
        // What Docker leaves behind.
        let policy = "type filter hook forward priority 0 ; policy drop ;";
        run("nft add table ip filter");
        run(&format!("nft add chain ip filter FORWARD {{ {policy} }}"));
        run("nft add chain ip filter DOCKER-USER");
        run("nft add rule ip filter FORWARD jump DOCKER-USER");
        let found = net.forwarding_blocked("vmbr-3f2a").await.unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].explanation().contains("policy of chain FORWARD in table ip filter"));
        assert_eq!(found[0].fix("vmbr-3f2a")[0], "iptables -I FORWARD -i vmbr-3f2a -j ACCEPT");
        run("nft add rule ip filter DOCKER-USER iifname vmbr-3f2a accept");
        assert_eq!(net.forwarding_blocked("vmbr-3f2a").await.unwrap(), []);

        // What firewalld does.
        run("nft add table inet firewalld");
        run("nft add chain inet firewalld filter_FORWARD { type filter hook forward priority 10 ; }");
        run("nft add rule inet firewalld filter_FORWARD ct state established accept");
        assert_eq!(net.forwarding_blocked("vmbr-3f2a").await.unwrap(), []);
        run("nft add rule inet firewalld filter_FORWARD reject with icmpx type admin-prohibited");
        let found = net.forwarding_blocked("vmbr-3f2a").await.unwrap();
        assert!(found.len() == 1 && !found[0].by_policy, "{found:?}");
        assert!(found[0].fix("vmbr-3f2a")[0].starts_with("firewall-cmd"));

        // What a server's own rules often do: guests could ask for no name.
        run("nft delete table inet firewalld");
        run("nft add table inet server");
        run("nft add chain inet server in { type filter hook input priority 0 ; policy drop ; }");
        run("nft add chain inet server out { type filter hook forward priority 0 ; }");
        run("nft add rule inet server out iifname vmbr-3f2a accept");
        let found = net.forwarding_blocked("vmbr-3f2a").await.unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].explanation().contains("names (DNS)"), "{}", found[0].explanation());
        let fix = found[0].fix("vmbr-3f2a");
        assert_eq!(fix, ["nft insert rule inet server in iifname \"vmbr-3f2a\" accept"]);
        run("nft add rule inet server in udp dport 53 accept");
        assert_eq!(net.forwarding_blocked("vmbr-3f2a").await.unwrap(), []);
    });
}

#[test]
fn forwarding_that_others_use_by_now_stays_on() {
    in_namespace(|net| async move {
        let forwarding = "/proc/sys/net/ipv4/ip_forward";
        let get = || std::fs::read_to_string(forwarding).unwrap().trim().to_owned();
        std::fs::write(forwarding, "0").unwrap();
        let setting = Effect::Sysctl { key: "net/ipv4/ip_forward".to_owned(), value: "1".to_owned() };
        let handle = net.former(&setting).await.unwrap();
        net.apply(&firewall()).await.unwrap();
        net.apply(&setting).await.unwrap();
        // What Docker makes, after it has found forwarding on.
        run("nft add table ip nat");
        run("nft add chain ip nat POSTROUTING { type nat hook postrouting priority 100 ; }");
        net.undo(&setting, &handle).await.unwrap();
        assert_eq!(get(), "1");
        run("nft delete table ip nat");
        net.undo(&setting, &handle).await.unwrap();
        assert_eq!(get(), "0");
    });
}

/// For people: what a start and a stop save by a tap that waits, and what looking at the network costs.
#[test]
#[ignore = "measures"]
fn what_a_tap_costs() {
    in_namespace(|net| async move {
        net.apply(&bridge()).await.unwrap();
        net.apply(&firewall()).await.unwrap();
        const ROUNDS: u32 = 50;
        let mut took = [std::time::Duration::ZERO; 5];
        for _ in 0..ROUNDS {
            let mut lap = std::time::Instant::now();
            let mut note = |which: usize| {
                took[which] += lap.elapsed();
                lap = std::time::Instant::now();
            };
            net.apply(&tap()).await.unwrap();
            note(0);
            net.observe(&tap()).await.unwrap();
            note(1);
            net.undo(&tap(), &Handle::None).await.unwrap();
            note(2);
            net.observe(&firewall()).await.unwrap();
            note(3);
            net.observe(&bridge()).await.unwrap();
            note(4);
        }
        for (what, took) in
            ["make a tap", "look at it", "delete it", "look at the firewall", "look at the bridge"]
                .iter()
                .zip(took)
        {
            println!("{what}: {:?}", took / ROUNDS);
        }
    });
}
