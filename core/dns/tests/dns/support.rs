//! A server with a table of names, clients from any loopback address, and upstreams that do as they are told.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hickory_server::proto::{
    op::{Edns, Message, MessageType, Query, ResponseCode},
    rr::{RData, Record as WireRecord, RecordType, rdata::A},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    task::JoinSet,
    time::timeout,
};
use vm_dns::{Config, Limits, Name, Networks, Record, RecordData, Resolver, Server, Table, Upstreams};

/// Long enough for anything on a loaded machine; only a failing test waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// A guest and somebody who is none; each is an address of loopback.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(127, 20, 0, 2);
pub(crate) const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 66, 0, 1);
pub(crate) const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 20, 0, 1)), 0);

pub(crate) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub(crate) fn record(owner: &str, data: RecordData) -> Record {
    Record { name: name(owner), ttl: 30, data }
}

/// `web.vm` (two addresses), `10.213.4.9`, `www.vm` → `web.vm`, `out.vm` → `example.test`, `ring.vm` → itself by way of
/// another, `big.vm` with 200 addresses, `text.vm`, and `a.deep.vm`.
pub(crate) fn table() -> Arc<Table> {
    let table = Table::new([name("vm.")]);
    table.add_host(&name("web.vm."), IpAddr::from([10, 213, 4, 9]), 30);
    table.add(record("web.vm.", RecordData::Aaaa("fd00::9".parse().unwrap())));
    table.add(record("www.vm.", RecordData::Cname(name("web.vm."))));
    table.add(record("gone.vm.", RecordData::Cname(name("nobody.vm."))));
    table.add(record("out.vm.", RecordData::Cname(name("example.test."))));
    table.add(record("ring.vm.", RecordData::Cname(name("gnir.vm."))));
    table.add(record("gnir.vm.", RecordData::Cname(name("ring.vm."))));
    for low in 0..200 {
        table.add(record("big.vm.", RecordData::A(Ipv4Addr::new(10, 213, 5, low))));
    }
    table.add(record("text.vm.", RecordData::Txt(vec!["short".to_owned(), "x".repeat(300)])));
    table.add(record("a.deep.vm.", RecordData::A(Ipv4Addr::new(10, 213, 4, 10))));
    Arc::new(table)
}

pub(crate) fn config(upstreams: Vec<SocketAddr>) -> Config {
    Config {
        networks: Networks {
            clients: vec!["127.0.0.0/16".parse().unwrap(), "127.20.0.0/16".parse().unwrap()],
            reverse: vec!["10.213.4.0/24".parse().unwrap()],
        },
        upstreams: Upstreams::Given(upstreams),
        limits: Limits {
            resolver_deadline: PATIENCE,
            upstream_timeout: PATIENCE,
            forward_deadline: PATIENCE,
            ..Limits::default()
        },
    }
}

pub(crate) async fn serve(config: Config, resolver: Arc<dyn Resolver>) -> (Server, SocketAddr) {
    let server = Server::start(config, resolver, &[LISTEN]).await.unwrap();
    let address = server.listening().await[0];
    (server, address)
}

pub(crate) fn question(owner: &str, qtype: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(owner), qtype));
    message
}

pub(crate) fn with_edns(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    message.set_edns(edns);
    message
}

/// Sends bytes and takes whatever comes back.
pub(crate) async fn udp_raw(from: Ipv4Addr, server: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind((from, 0)).await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(bytes).await.unwrap();
    receive(&socket).await
}

pub(crate) async fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 65_535];
    let length = timeout(PATIENCE, socket.recv(&mut buffer)).await.expect("an answer").unwrap();
    buffer.truncate(length);
    buffer
}

pub(crate) async fn udp(from: Ipv4Addr, server: SocketAddr, message: &Message) -> Message {
    let bytes = udp_raw(from, server, &message.to_vec().unwrap()).await;
    let answer = Message::from_vec(&bytes).unwrap();
    assert_eq!(answer.metadata.id, message.metadata.id);
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    answer
}

pub(crate) async fn connect(from: Ipv4Addr, server: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    timeout(PATIENCE, socket.connect(server)).await.unwrap().unwrap()
}

pub(crate) async fn write_frame(stream: &mut TcpStream, message: &Message) {
    let bytes = message.to_vec().unwrap();
    let mut frame = u16::try_from(bytes.len()).unwrap().to_be_bytes().to_vec();
    frame.extend(bytes);
    stream.write_all(&frame).await.unwrap();
}

/// The next message of a connection, or nothing at its end.
pub(crate) async fn read_frame(stream: &mut TcpStream) -> Option<Message> {
    let read = async {
        let length = stream.read_u16().await.ok()?;
        let mut bytes = vec![0; usize::from(length)];
        stream.read_exact(&mut bytes).await.ok()?;
        Some(Message::from_vec(&bytes).unwrap())
    };
    timeout(PATIENCE, read).await.expect("an answer or an end")
}

pub(crate) async fn tcp(from: Ipv4Addr, server: SocketAddr, message: &Message) -> Message {
    let mut stream = connect(from, server).await;
    write_frame(&mut stream, message).await;
    let answer = read_frame(&mut stream).await.expect("an answer");
    assert_eq!(answer.metadata.id, message.metadata.id);
    answer
}

pub(crate) async fn ask(server: SocketAddr, owner: &str, qtype: RecordType) -> Message {
    udp(GUEST, server, &question(owner, qtype)).await
}

pub(crate) fn code(message: &Message) -> ResponseCode {
    message.metadata.response_code
}

/// What the answers say, e.g. `A 10.0.0.1`.
pub(crate) fn data(message: &Message) -> Vec<String> {
    message.answers.iter().map(|record| format!("{} {}", record.record_type(), record.data)).collect()
}

/// A name server on one port, UDP and TCP, that answers by a function of the question.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    pub(crate) asked: Arc<AtomicUsize>,
    pub(crate) over_tcp: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Upstream {
    pub(crate) async fn start(answer: impl Fn(&Message) -> Option<Message> + Send + Sync + 'static) -> Self {
        let (socket, listener) = loop {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            if let Ok(listener) = TcpListener::bind(socket.local_addr().unwrap()).await {
                break (socket, listener);
            }
        };
        let address = socket.local_addr().unwrap();
        let answer = Arc::new(answer);
        let (asked, over_tcp) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = JoinSet::new();
        let (reply, count) = (Arc::clone(&answer), Arc::clone(&asked));
        tasks.spawn(async move {
            let mut buffer = vec![0; 4096];
            loop {
                let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                let question = Message::from_vec(&buffer[..length]).unwrap();
                if let Some(mut reply) = reply(&question) {
                    let max = usize::from(question.max_payload());
                    if reply.to_vec().unwrap().len() > max {
                        reply = reply.truncate();
                    }
                    socket.send_to(&reply.to_vec().unwrap(), client).await.unwrap();
                }
            }
        });
        let count = Arc::clone(&over_tcp);
        tasks.spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                while let Some(question) = read_frame(&mut stream).await {
                    count.fetch_add(1, Ordering::SeqCst);
                    if let Some(reply) = answer(&question) {
                        write_frame(&mut stream, &reply).await;
                    }
                }
            }
        });
        Self { address, asked, over_tcp, _tasks: tasks }
    }

    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

/// An answer with these addresses.
pub(crate) fn addresses(question: &Message, addresses: impl IntoIterator<Item = Ipv4Addr>) -> Message {
    let mut reply = response(question, ResponseCode::NoError);
    let owner = question.queries[0].name().clone();
    for address in addresses {
        reply.add_answer(WireRecord::from_rdata(owner.clone(), 60, RData::A(A(address))));
    }
    reply
}

pub(crate) fn response(question: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::response(question.metadata.id, question.metadata.op_code);
    reply.metadata.recursion_desired = question.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.add_query(question.queries[0].clone());
    reply
}

/// An upstream that knows one address for every name.
pub(crate) async fn knows(address: [u8; 4]) -> Upstream {
    Upstream::start(move |question| Some(addresses(question, [address.into()]))).await
}
