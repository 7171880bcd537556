//! Packets through the real bridge and table: a guest and the world, each in a network namespace of its own, with the host
//! between them in a third.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use vm_host::HostRunner;
use vm_net::{HostNet, Net};
use vm_types::Effect;

/// Long enough for an answer on this machine; the price of each thing that must *not* get through.
const SILENCE: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(60);

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own, doing what it is told.
struct Station {
    tid: i32,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Station {
    fn new() -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            run("ip link set lo up");
            ready.send(nix::unistd::gettid().as_raw()).unwrap();
            queue.into_iter().for_each(|job| job());
        });
        Self { tid: is_ready.recv().unwrap(), jobs: Some(jobs), thread: Some(thread) }
    }

    fn tell<R: Send + 'static>(&self, job: impl FnOnce() -> R + Send + 'static) -> R {
        let (reply, answer) = mpsc::channel();
        self.jobs.as_ref().unwrap().send(Box::new(move || reply.send(job()).unwrap())).unwrap();
        answer.recv().expect("the station's job panicked")
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        self.jobs = None;
        let _ = self.thread.take().unwrap().join();
    }
}

fn run(line: &str) {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

fn connect(to: &str, patience: Duration) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&to.parse().unwrap(), patience)
}

/// Sends a byte each way over an accepted connection; returns who the server thinks it speaks with.
fn talk(server: &TcpListener, client: std::io::Result<TcpStream>) -> SocketAddr {
    let mut client = client.unwrap();
    let (mut accepted, peer) = server.accept().unwrap();
    let mut byte = [0];
    client.write_all(b"?").unwrap();
    accepted.read_exact(&mut byte).unwrap();
    accepted.write_all(b"!").unwrap();
    client.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"!");
    peer
}

#[test]
fn guests_reach_the_world_and_dns_and_nothing_else_of_the_host() {
    let host = Station::new();
    let (guest, world) = (Station::new(), Station::new());
    let (guest_tid, world_tid) = (guest.tid, world.tid);
    host.tell(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let net = HostNet::new(Arc::new(HostRunner));
        runtime.block_on(async {
            for effect in [
                Effect::Sysctl { key: "net/ipv4/ip_forward".into(), value: "1".into() },
                Effect::Bridge { name: "vmbr-3f2a".into(), address: "10.213.0.1/24".parse().unwrap() },
                Effect::Firewall {
                    table: "vmd_3f2a".into(),
                    bridge: "vmbr-3f2a".into(),
                    subnet: "10.213.0.0/24".parse().unwrap(),
                },
            ] {
                net.apply(&effect).await.unwrap();
            }
        });
        run(&format!("ip link add gport type veth peer name eth0 netns {guest_tid}"));
        run("ip link set gport master vmbr-3f2a up");
        run(&format!("ip link add uplink type veth peer name eth0 netns {world_tid}"));
        run("ip addr add 192.0.2.1/24 dev uplink");
        run("ip link set uplink up");
    });
    guest.tell(|| {
        run("ip addr add 10.213.0.2/24 dev eth0");
        run("ip link set eth0 up");
        run("ip route add default via 10.213.0.1");
    });
    world.tell(|| {
        run("ip addr add 192.0.2.2/24 dev eth0");
        run("ip link set eth0 up");
    });

    // Out, under the host's address: the world has no route to the guests.
    let server = world.tell(|| TcpListener::bind("192.0.2.2:80").unwrap());
    let peer = talk(&server, guest.tell(|| connect("192.0.2.2:80", PATIENCE)));
    assert_eq!(peer.ip().to_string(), "192.0.2.1");

    // The host reaches the guest under its own address on the bridge.
    let server = guest.tell(|| TcpListener::bind("10.213.0.2:22").unwrap());
    let peer = talk(&server, host.tell(|| connect("10.213.0.2:22", PATIENCE)));
    assert_eq!(peer.ip().to_string(), "10.213.0.1");

    // DNS of the host, both ways.
    let server = host.tell(|| TcpListener::bind("10.213.0.1:53").unwrap());
    talk(&server, guest.tell(|| connect("10.213.0.1:53", PATIENCE)));
    let server = host.tell(|| UdpSocket::bind("10.213.0.1:53").unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let client = guest.tell(|| UdpSocket::bind("10.213.0.2:0").unwrap());
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.send_to(b"?", "10.213.0.1:53").unwrap();
    let mut byte = [0];
    let (_, from) = server.recv_from(&mut byte).unwrap();
    server.send_to(b"!", from).unwrap();
    client.recv_from(&mut byte).unwrap();

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

    // Under a stolen address: nothing.
    guest.tell(|| {
        run("ip addr add 198.51.100.7/32 dev eth0");
        run("ip route replace default via 10.213.0.1 src 198.51.100.7");
    });
    host.tell(|| run("ip route add 198.51.100.7/32 dev vmbr-3f2a"));
    world.tell(|| run("ip route add 198.51.100.7/32 via 192.0.2.1"));
    let error = guest.tell(|| connect("192.0.2.2:80", SILENCE)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
}
