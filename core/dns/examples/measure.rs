//! What an answer costs: `cargo run --release -p vm-dns --example measure`.
//!
//! Client and server share this process, its threads and its memory, so the real figures are somewhat better.

use std::{
    error::Error,
    fs,
    future::pending,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use hickory_server::proto::{
    op::{Message, Query},
    rr::RecordType,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};
use vm_dns::{
    Answer, Config, Limits, Name, Networks, Question, Resolver, Server, Table, Upstreams, loopback,
};

type Failure = Box<dyn Error + Send + Sync>;

/// A table with a thousand VMs, beside names that are never answered.
struct Zone(Table);

#[async_trait]
impl Resolver for Zone {
    fn zones(&self) -> Vec<Name> {
        self.0.zones()
    }

    async fn resolve(&self, question: &Question) -> Result<Answer, Failure> {
        if question.name.to_string().starts_with("slow") {
            pending().await
        } else {
            self.0.resolve(question).await
        }
    }
}

fn message(name: &str) -> Result<Vec<u8>, Failure> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.parse()?, RecordType::A));
    Ok(message.to_vec()?)
}

async fn client(server: SocketAddr) -> Result<UdpSocket, Failure> {
    let socket = UdpSocket::bind("127.0.0.1:0").await?;
    socket.connect(server).await?;
    Ok(socket)
}

async fn one(socket: &UdpSocket, question: &[u8], buffer: &mut [u8]) -> Result<(), Failure> {
    socket.send(question).await?;
    socket.recv(buffer).await?;
    Ok(())
}

async fn latency(server: SocketAddr, name: &str, what: &str) -> Result<(), Failure> {
    let (socket, question, mut buffer) = (client(server).await?, message(name)?, vec![0; 4096]);
    let mut times = Vec::new();
    for _ in 0..20_000 {
        let start = Instant::now();
        one(&socket, &question, &mut buffer).await?;
        times.push(start.elapsed());
    }
    times.sort();
    println!("{what}: p50 {:?}, p99 {:?}", times[times.len() / 2], times[times.len() * 99 / 100]);
    Ok(())
}

async fn rate(server: SocketAddr, name: &'static str, what: &str) -> Result<(), Failure> {
    const CLIENTS: usize = 64;
    let end = Instant::now() + Duration::from_secs(3);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            tokio::spawn(async move {
                let (socket, question, mut buffer) = (client(server).await?, message(name)?, vec![0; 4096]);
                let mut count = 0_u64;
                while Instant::now() < end {
                    one(&socket, &question, &mut buffer).await?;
                    count += 1;
                }
                Ok::<_, Failure>(count)
            })
        })
        .collect();
    let mut total = 0;
    for client in clients {
        total += client.await??;
    }
    println!("{what}: {} questions/s, {CLIENTS} clients; {}", total / 3, memory()?);
    Ok(())
}

async fn over_tcp(server: SocketAddr) -> Result<(), Failure> {
    let mut stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let question = message("vm7.vm.")?;
    let frame = [&u16::try_from(question.len())?.to_be_bytes()[..], &question].concat();
    let mut times = Vec::new();
    for _ in 0..5000 {
        let start = Instant::now();
        stream.write_all(&frame).await?;
        let mut answer = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut answer).await?;
        times.push(start.elapsed());
    }
    times.sort();
    println!("zone, TCP: p50 {:?}", times[times.len() / 2]);
    Ok(())
}

fn memory() -> Result<String, Failure> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or_default();
    Ok(line.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
}

fn config(upstreams: Vec<SocketAddr>) -> Config {
    Config {
        networks: Networks { clients: loopback().into(), reverse: vec![] },
        upstreams: Upstreams::Given(upstreams),
        limits: Limits { resolver_deadline: Duration::from_secs(600), ..Limits::default() },
    }
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    println!("before: {}", memory()?);
    let table = || -> Result<Arc<Zone>, Failure> {
        let table = Table::new(["vm.".parse()?, "example.test.".parse()?]);
        for number in 0..1000_u16 {
            let [high, low] = number.to_be_bytes();
            table.add_host(&format!("vm{number}.vm.").parse()?, IpAddr::from([10, 213, high, low]), 5);
        }
        table.add_host(&"example.test.".parse()?, IpAddr::from([192, 0, 2, 1]), 600);
        Ok(Arc::new(Zone(table)))
    };
    let at = ["127.0.0.1:0".parse()?];
    let upstream = Server::start(config(vec![]), table()?, &at).await?;
    let zone = table()?;
    let server = Server::start(config(upstream.listening().await), Arc::new(OnlyVm(zone)), &at).await?;
    let address = server.listening().await[0];
    println!("idle, 1000 names twice: {}", memory()?);
    latency(address, "vm7.vm.", "zone, UDP").await?;
    over_tcp(address).await?;
    latency(address, "example.test.", "remembered answer of an upstream, UDP").await?;
    rate(address, "vm7.vm.", "zone").await?;
    rate(address, "example.test.", "remembered").await?;
    let slow = client(address).await?;
    for number in 0..500 {
        slow.send(&message(&format!("slow{number}.vm."))?).await?;
    }
    latency(address, "vm7.vm.", "zone, UDP, beside 500 questions without an answer").await?;
    rate(address, "vm7.vm.", "zone, beside those").await?;
    println!("{:?}", server.stats());
    Ok(())
}

/// The same without the zone that the upstream has.
struct OnlyVm(Arc<Zone>);

#[async_trait]
impl Resolver for OnlyVm {
    fn zones(&self) -> Vec<Name> {
        self.0.zones().into_iter().take(1).collect()
    }

    async fn resolve(&self, question: &Question) -> Result<Answer, Failure> {
        self.0.resolve(question).await
    }
}
