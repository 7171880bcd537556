//! Packets through the real bridge and table: guests and the world, each in a network namespace of its own, with the host
//! between them in another.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod stations;

use std::{
    io::ErrorKind,
    net::{IpAddr, TcpListener, UdpSocket},
    sync::Arc,
};

use vm_host::HostRunner;
use vm_net::{HostNet, Net, NetError};
use vm_types::{
    Effect, Handle, Observed,
    plan::{Answer, Chain, Condition, ConnectionState, Device, Network, Protocol, Rule, Transport},
};

use stations::{BRIDGE, PATIENCE, SILENCE, Scene, TABLE, connect, exchange, run, talk};

fn scene(guests: usize) -> Scene {
    Scene::new(HostNet::new(Arc::new(HostRunner)), guests)
}

fn network(text: &str) -> Network {
    let net: ipnet::IpNet = text.parse().unwrap();
    Network { address: net.addr(), prefix: net.prefix_len() }
}

fn rules(owner: &str, address: &str, rules: Vec<Rule>) -> Effect {
    Effect::Rules {
        table: TABLE.into(),
        bridge: BRIDGE.into(),
        owner: owner.into(),
        address: Some(address.parse().unwrap()),
        rules,
    }
}

/// What lets a guest out, and answers in.
fn way_out(owner: &str, address: &str) -> Effect {
    let answers = vec![ConnectionState::Established, ConnectionState::Related];
    rules(
        owner,
        address,
        vec![
            Rule {
                chain: Chain::Forward,
                conditions: vec![Condition::FromDevice(Device::Vm), Condition::ToDevice(Device::Elsewhere)],
                answer: Answer::Accept,
            },
            Rule {
                chain: Chain::Forward,
                conditions: vec![
                    Condition::FromDevice(Device::Elsewhere),
                    Condition::ToDevice(Device::Vm),
                    Condition::States(answers),
                ],
                answer: Answer::Accept,
            },
            Rule {
                chain: Chain::Postrouting,
                conditions: vec![
                    Condition::ToDevice(Device::Elsewhere),
                    Condition::Source(network(&format!("{address}/32"))),
                ],
                answer: Answer::Masquerade,
            },
        ],
    )
}

fn port(owner: &str, protocol: Transport, host: &str, guest: &str) -> Effect {
    Effect::Port {
        table: TABLE.into(),
        bridge: BRIDGE.into(),
        owner: owner.into(),
        protocol,
        host: host.parse().unwrap(),
        guest: guest.parse().unwrap(),
    }
}

fn value(handle: Handle) -> String {
    match handle {
        Handle::Value { value } => value,
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_rules_guests_reach_dns_and_nothing_else() {
    let scene = scene(2);
    let (host, guest, world) = (&scene.host, &scene.guests[0], &scene.world);

    // Not the world, and they are told so at once.
    let _server = world.tell(|| TcpListener::bind("192.0.2.2:80").unwrap());
    let error = guest.tell(|| connect("192.0.2.2:80", PATIENCE)).unwrap_err();
    assert_ne!(error.kind(), ErrorKind::TimedOut, "{error}");

    // One another.
    let server = scene.guests[1].tell(|| TcpListener::bind("10.213.0.3:80").unwrap());
    talk(&server, guest.tell(|| connect("10.213.0.3:80", PATIENCE)));

    // The host reaches the guest under its own address on the bridge.
    let server = guest.tell(|| TcpListener::bind("10.213.0.2:22").unwrap());
    let peer = talk(&server, host.tell(|| connect("10.213.0.2:22", PATIENCE)));
    assert_eq!(peer.ip().to_string(), "10.213.0.1");

    // DNS of the host, both ways.
    let server = host.tell(|| TcpListener::bind("10.213.0.1:53").unwrap());
    talk(&server, guest.tell(|| connect("10.213.0.1:53", PATIENCE)));
    let server = host.tell(|| UdpSocket::bind("10.213.0.1:53").unwrap());
    let client = guest.tell(|| UdpSocket::bind("10.213.0.2:0").unwrap());
    exchange(&server, &client, "10.213.0.1:53");

    // Another service of the host, on any of its addresses: refused at once, not left hanging.
    let _service = host.tell(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    for address in ["10.213.0.1:8080", "192.0.2.1:8080"] {
        let error = guest.tell(move || connect(address, PATIENCE)).unwrap_err();
        assert_ne!(error.kind(), ErrorKind::TimedOut, "{address}: {error}");
    }
    // The rest of the host's network is as it was.
    world.tell(|| connect("192.0.2.1:8080", PATIENCE)).unwrap();

    // From outside to a guest: nothing, even with a route.
    world.tell(|| run("ip route add 10.213.0.0/24 via 192.0.2.1"));
    let error = world.tell(|| connect("10.213.0.2:22", SILENCE)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
}

#[test]
fn rules_let_their_own_guest_out_and_nobody_in() {
    let scene = scene(2);
    let (one, two, world) = (&scene.guests[0], &scene.guests[1], &scene.world);
    let server = world.tell(|| TcpListener::bind("192.0.2.2:80").unwrap());
    let guests_server = one.tell(|| TcpListener::bind("10.213.0.2:22").unwrap());
    let out = || connect("192.0.2.2:80", PATIENCE);

    // Under the host's address: the world has no route to the guests.
    scene.apply(&way_out("v1/nat", "10.213.0.2")).unwrap();
    assert_eq!(talk(&server, one.tell(out)).ip().to_string(), "192.0.2.1");
    assert!(two.tell(out).is_err(), "the rules are for another VM");
    world.tell(|| run("ip route add 10.213.0.0/24 via 192.0.2.1"));
    let error = world.tell(|| connect("10.213.0.2:22", SILENCE)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");

    // Another owner's come and go, and so do the first's, and neither takes the other's away.
    scene.apply(&way_out("v2/nat", "10.213.0.3")).unwrap();
    talk(&server, two.tell(out));
    scene.undo(&way_out("v1/nat", "10.213.0.2"));
    assert!(one.tell(out).is_err(), "its rules are gone");
    talk(&server, two.tell(out));

    // A base table made anew, for another subnet or of another version, leaves the rules of VMs that are up.
    scene.apply(&way_out("v1/nat", "10.213.0.2")).unwrap();
    let subnet = "10.213.0.0/16".parse().unwrap();
    scene.apply(&Effect::Firewall { table: TABLE.into(), bridge: BRIDGE.into(), subnet }).unwrap();
    talk(&server, one.tell(out));
    talk(&server, two.tell(out));
    world.tell(|| connect("10.213.0.2:22", SILENCE)).unwrap_err();
    drop(guests_server);

    // Under a stolen address: nothing, although a rule would let it out.
    let any = vec![Condition::FromDevice(Device::Bridge), Condition::ToDevice(Device::Elsewhere)];
    let open = Rule { chain: Chain::Forward, conditions: any, answer: Answer::Accept };
    scene.apply(&rules("v1/open", "10.213.0.2", vec![open])).unwrap();
    one.tell(|| {
        run("ip addr add 198.51.100.7/32 dev eth0");
        run("ip route replace default via 10.213.0.1 src 198.51.100.7");
    });
    scene.host.tell(|| run("ip route add 198.51.100.7/32 dev vmbr-3f2a"));
    world.tell(|| run("ip route add 198.51.100.7/32 via 192.0.2.1"));
    let error = one.tell(|| connect("192.0.2.2:80", SILENCE)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
}

#[test]
fn each_answer_does_what_it_says() {
    let scene = scene(1);
    let (host, guest, world) = (&scene.host, &scene.guests[0], &scene.world);
    scene.apply(&way_out("v1/nat", "10.213.0.2")).unwrap();
    let server = world.tell(|| TcpListener::bind("192.0.2.2:80").unwrap());
    talk(&server, guest.tell(|| connect("192.0.2.2:80", PATIENCE)));

    // The host's own packets to a made-up address go to the guest, but those from a port that is let be.
    let to = |answer, address: &str| Rule {
        chain: Chain::Output,
        conditions: vec![
            Condition::Protocol(Protocol::Tcp),
            Condition::Destination(network(address)),
            Condition::DestinationPorts(80, 81),
        ],
        answer,
    };
    let guests_server = guest.tell(|| TcpListener::bind("10.213.0.2:8000").unwrap());
    let redirect = Answer::Redirect("10.213.0.2".parse::<IpAddr>().unwrap(), Some(8000));
    let effect = rules(
        "v1/redirect",
        "10.213.0.2",
        vec![to(Answer::Accept, "192.0.2.2/32"), to(redirect, "192.0.2.0/24")],
    );
    scene.apply(&effect).unwrap();
    talk(&guests_server, host.tell(|| connect("192.0.2.77:81", PATIENCE)));
    talk(&server, host.tell(|| connect("192.0.2.2:80", PATIENCE)));
    scene.undo(&effect);

    let effect = rules("v1/deny", "10.213.0.2", vec![to(Answer::Reject, "192.0.2.2/32")]);
    scene.apply(&effect).unwrap();
    let error = host.tell(|| connect("192.0.2.2:80", PATIENCE)).unwrap_err();
    assert_ne!(error.kind(), ErrorKind::TimedOut, "{error}");
    // In another shape: replaced.
    let effect = rules("v1/deny", "10.213.0.2", vec![to(Answer::Deny, "192.0.2.2/32")]);
    scene.apply(&effect).unwrap();
    let error = host.tell(|| connect("192.0.2.2:80", SILENCE)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::PermissionDenied), "{error}");
    scene.undo(&effect);
    talk(&server, host.tell(|| connect("192.0.2.2:80", PATIENCE)));

    // A service of the host, for one guest.
    let service = host.tell(|| TcpListener::bind("10.213.0.1:9000").unwrap());
    guest.tell(|| connect("10.213.0.1:9000", PATIENCE)).unwrap_err();
    let open = Rule {
        chain: Chain::Input,
        conditions: vec![
            Condition::FromDevice(Device::Vm),
            Condition::Protocol(Protocol::Tcp),
            Condition::DestinationPorts(9000, 9000),
        ],
        answer: Answer::Accept,
    };
    scene.apply(&rules("v1/service", "10.213.0.2", vec![open])).unwrap();
    talk(&service, guest.tell(|| connect("10.213.0.1:9000", PATIENCE)));
}

#[test]
fn a_published_port_leads_to_the_guest_until_it_is_taken_back() {
    let scene = scene(1);
    let (host, guest) = (&scene.host, &scene.guests[0]);
    let server = guest.tell(|| TcpListener::bind("10.213.0.2:80").unwrap());

    // On loopback, at a port of the host's choice.
    let local = port("v1/web/http", Transport::Tcp, "127.0.0.1:0", "10.213.0.2:80");
    let address = value(scene.apply(&local).unwrap());
    let at = address.clone();
    let peer = talk(&server, host.tell(move || connect(&at, PATIENCE)));
    assert_eq!(peer.ip().to_string(), "10.213.0.1", "a guest could not answer 127.0.0.1");
    // Nobody else gets it.
    let at = address.clone();
    let error = host.tell(move || TcpListener::bind(&at)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);

    // A daemon that was started anew finds it, holds it and keeps it.
    let mut scene = scene;
    scene.net = HostNet::new(Arc::new(HostRunner));
    let (host, guest, world) = (&scene.host, &scene.guests[0], &scene.world);
    assert_eq!(value(scene.apply(&local).unwrap()), address);
    let at = address.clone();
    host.tell(move || TcpListener::bind(&at)).unwrap_err();
    // Also where it leads elsewhere now.
    let other_server = guest.tell(|| TcpListener::bind("10.213.0.2:81").unwrap());
    let moved = port("v1/web/http", Transport::Tcp, "127.0.0.1:0", "10.213.0.2:81");
    assert_eq!(value(scene.apply(&moved).unwrap()), address);
    let at = address.clone();
    talk(&other_server, host.tell(move || connect(&at, PATIENCE)));

    // On all addresses: for the host by each of them, for the world, and not for guests.
    let open = port("v1/web/open", Transport::Tcp, "0.0.0.0:8080", "10.213.0.2:80");
    assert_eq!(value(scene.apply(&open).unwrap()), "0.0.0.0:8080");
    for address in ["127.0.0.1:8080", "192.0.2.1:8080"] {
        talk(&server, host.tell(move || connect(address, PATIENCE)));
    }
    let peer = talk(&server, world.tell(|| connect("192.0.2.1:8080", PATIENCE)));
    assert_eq!(peer.ip().to_string(), "192.0.2.2");
    guest.tell(|| connect("10.213.0.1:8080", PATIENCE)).unwrap_err();

    // UDP, which has ports of its own.
    let datagrams = port("v1/web/dns", Transport::Udp, "127.0.0.1:8080", "10.213.0.2:53");
    scene.apply(&datagrams).unwrap();
    let guests_socket = guest.tell(|| UdpSocket::bind("10.213.0.2:53").unwrap());
    let client = host.tell(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    exchange(&guests_socket, &client, "127.0.0.1:8080");

    // One taken back leaves the others.
    scene.undo(&moved);
    let at = address.clone();
    let error = host.tell(move || connect(&at, PATIENCE)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    talk(&server, host.tell(|| connect("127.0.0.1:8080", PATIENCE)));
    let setting = || std::fs::read_to_string("/proc/sys/net/ipv4/conf/vmbr-3f2a/route_localnet");
    assert_eq!(host.tell(setting).unwrap().trim(), "1");
    for effect in [&open, &datagrams] {
        scene.undo(effect);
        scene.undo(effect);
    }
    let error = host.tell(|| connect("127.0.0.1:8080", PATIENCE)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    world.tell(|| connect("192.0.2.1:8080", PATIENCE)).unwrap_err();
    assert_eq!(host.tell(setting).unwrap().trim(), "0");
}

#[test]
fn guests_do_not_reach_the_hosts_loopback_by_a_published_port() {
    let scene = scene(1);
    let (host, guest) = (&scene.host, &scene.guests[0]);
    scene.apply(&port("v1/web/http", Transport::Tcp, "127.0.0.1:8080", "10.213.0.2:80")).unwrap();
    // Port 53 is one that guests may ask of the host otherwise.
    let services = host.tell(|| ["127.0.0.1:53", "127.0.0.1:9000"].map(|at| TcpListener::bind(at).unwrap()));
    guest.tell(|| {
        run("ip addr del 127.0.0.1/8 dev lo");
        std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1").unwrap();
        run("ip route add 127.0.0.0/8 via 10.213.0.1 dev eth0 src 10.213.0.2");
    });
    for address in ["127.0.0.1:53", "127.0.0.1:9000", "127.0.0.1:8080"] {
        let error = guest.tell(move || connect(address, SILENCE)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{address}: {error}");
    }
    // It is the guards that stop them.
    host.tell(|| {
        run("nft flush chain inet vmd_3f2a guard");
        run("nft flush chain inet vmd_3f2a input");
    });
    talk(&services[1], guest.tell(|| connect("127.0.0.1:9000", PATIENCE)));
    // So no port is published without them.
    let another = port("v1/web/other", Transport::Tcp, "127.0.0.1:0", "10.213.0.2:80");
    let error = scene.apply(&another).unwrap_err();
    assert!(matches!(error, NetError::NoTable { .. }) && error.hint().is_some(), "{error}");
}

#[test]
fn a_port_that_somebody_has_is_refused() {
    let scene = scene(1);
    let _server = scene.host.tell(|| TcpListener::bind("127.0.0.1:8080").unwrap());
    let _socket = scene.host.tell(|| UdpSocket::bind("0.0.0.0:8081").unwrap());
    let held = port("v1/web/http", Transport::Tcp, "0.0.0.0:8081", "10.213.0.2:80");
    scene.apply(&held).unwrap();
    let wanted = |owner, protocol, host| port(owner, protocol, host, "10.213.0.2:80");
    for (effect, by) in [
        (wanted("v2/web/http", Transport::Tcp, "127.0.0.1:8080"), "another program"),
        (wanted("v2/web/http", Transport::Tcp, "0.0.0.0:8080"), "another program"),
        (wanted("v2/web/http", Transport::Udp, "127.0.0.1:8081"), "another program"),
        (wanted("v2/web/http", Transport::Tcp, "127.0.0.1:8081"), "v1/web/http"),
    ] {
        let error = scene.apply(&effect).unwrap_err();
        assert!(matches!(&error, NetError::PortTaken { by: who, .. } if who == by), "{error}");
        assert!(error.hint().unwrap().contains("another port"));
    }
    for (host, hint) in [("192.0.2.99:80", "ip address"), ("[::1]:80", "IPv4")] {
        let effect = wanted("v2/web/http", Transport::Tcp, host);
        let error = scene.apply(&effect).unwrap_err();
        assert!(error.hint().unwrap().contains(hint), "{error}");
        scene.undo(&effect);
    }
    // Nothing of it stays, and the first is as it was.
    let (net, first, refused) =
        (scene.net.clone(), held, wanted("v2/web/http", Transport::Tcp, "127.0.0.1:8080"));
    scene.host.tell(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            assert!(matches!(net.observe(&first).await.unwrap(), Observed::Present(Handle::Value { .. })));
            assert_eq!(net.observe(&refused).await.unwrap(), Observed::Absent);
        });
    });
}
