//! Machines of a network: threads, each in a network namespace of its own.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    sync::mpsc,
    thread::JoinHandle,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use vm_net::{HostNet, Net, NetError};
use vm_types::{Effect, Handle};

/// Long enough for an answer on this machine; the price of each thing that must *not* get through.
pub(crate) const SILENCE: Duration = Duration::from_millis(500);
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own, doing what it is told.
pub(crate) struct Station {
    pub(crate) tid: i32,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Station {
    pub(crate) fn new() -> Self {
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

    pub(crate) fn tell<R: Send + 'static>(&self, job: impl FnOnce() -> R + Send + 'static) -> R {
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

pub(crate) fn run(line: &str) {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn connect(to: &str, patience: Duration) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&to.parse().unwrap(), patience)
}

/// Sends a byte each way over an accepted connection; returns who the server thinks it speaks with.
pub(crate) fn talk(server: &TcpListener, client: std::io::Result<TcpStream>) -> SocketAddr {
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

/// Sends a byte each way between UDP sockets; returns who the server thinks it speaks with.
pub(crate) fn exchange(server: &UdpSocket, client: &UdpSocket, to: &str) -> SocketAddr {
    for socket in [server, client] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    client.send_to(b"?", to).unwrap();
    let mut byte = [0];
    let (_, from) = server.recv_from(&mut byte).unwrap();
    server.send_to(b"!", from).unwrap();
    client.recv_from(&mut byte).unwrap();
    from
}

pub(crate) const TABLE: &str = "vmd_3f2a";
pub(crate) const BRIDGE: &str = "vmbr-3f2a";

/// A host with a bridge and the daemon's table; guests on the bridge, and the world on another link of the host's.
pub(crate) struct Scene {
    pub(crate) host: Station,
    pub(crate) net: HostNet,
    pub(crate) guests: Vec<Station>,
    pub(crate) world: Station,
}

impl Scene {
    /// `guests` at 10.213.0.2 and after; the world at 192.0.2.2, and the host at 192.0.2.1.
    pub(crate) fn new(net: HostNet, guests: usize) -> Self {
        let scene = Self {
            host: Station::new(),
            net,
            guests: (0..guests).map(|_| Station::new()).collect(),
            world: Station::new(),
        };
        for effect in [
            Effect::Sysctl { key: "net/ipv4/ip_forward".into(), value: "1".into() },
            Effect::Bridge { name: BRIDGE.into(), address: "10.213.0.1/24".parse().unwrap() },
            Effect::Firewall {
                table: TABLE.into(),
                bridge: BRIDGE.into(),
                subnet: "10.213.0.0/24".parse().unwrap(),
            },
        ] {
            scene.apply(&effect).unwrap();
        }
        for (number, guest) in scene.guests.iter().enumerate() {
            let tid = guest.tid;
            scene.host.tell(move || {
                run(&format!("ip link add gport{number} type veth peer name eth0 netns {tid}"));
                run(&format!("ip link set gport{number} master {BRIDGE} up"));
            });
            guest.tell(move || {
                run(&format!("ip addr add 10.213.0.{}/24 dev eth0", number + 2));
                run("ip link set eth0 up");
                run("ip route add default via 10.213.0.1");
            });
        }
        let tid = scene.world.tid;
        scene.host.tell(move || {
            run(&format!("ip link add uplink type veth peer name eth0 netns {tid}"));
            run("ip addr add 192.0.2.1/24 dev uplink");
            run("ip link set uplink up");
        });
        scene.world.tell(|| {
            run("ip addr add 192.0.2.2/24 dev eth0");
            run("ip link set eth0 up");
        });
        scene
    }

    /// As the daemon does, on the host.
    pub(crate) fn apply(&self, effect: &Effect) -> Result<Handle, NetError> {
        let (net, effect) = (self.net.clone(), effect.clone());
        self.host.tell(move || runtime().block_on(net.apply(&effect)))
    }

    pub(crate) fn undo(&self, effect: &Effect) {
        let (net, effect) = (self.net.clone(), effect.clone());
        self.host.tell(move || runtime().block_on(net.undo(&effect, &Handle::None)).unwrap());
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}
