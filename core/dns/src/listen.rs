//! Sockets: one task for each address, which owns its UDP socket, its TCP listener and every question that came by them.
//!
//! hickory-server has loops of this kind, but they bound neither connections nor questions, spin when the process is out
//! of descriptors, and answer one question of a connection at a time. A hostile guest must not be able to use any of that.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use futures::{SinkExt, StreamExt};
use hickory_server::net::xfer::Protocol;
use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::{
    bytes::Bytes,
    codec::{Framed, LengthDelimitedCodec},
    sync::CancellationToken,
};
use tracing::{debug, warn};

use crate::{
    DnsError, Limits,
    gate::{Entered, Gate},
    handler::Handler,
};

/// Largest UDP message that is read; questions are far smaller.
const MAX_UDP: usize = 4096;
/// Questions of one connection being answered at one time (RFC 7766, section 6.2.1.1: pipelining).
const PIPELINE: usize = 32;
/// Connections of strangers at one time, who are told no and cut off.
const STRANGERS: usize = 8;
/// How long to wait when the kernel cannot accept or receive, e.g. for want of descriptors.
const BACKOFF: Duration = Duration::from_millis(100);

/// What all listeners share.
pub(crate) struct Doors {
    pub(crate) handler: Arc<Handler>,
    questions: Arc<Gate>,
    connections: Arc<Gate>,
    strangers: Arc<Gate>,
    idle: Duration,
}

/// One address that is listened on.
pub(crate) struct Listener {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Doors {
    pub(crate) fn new(handler: Arc<Handler>, limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            handler,
            questions: Gate::new(limits.questions, limits.questions_per_client),
            connections: Gate::new(limits.connections, limits.connections_per_client),
            strangers: Gate::new(STRANGERS, STRANGERS),
            idle: limits.idle,
        })
    }
}

impl Listener {
    /// Binds UDP and TCP on one address and serves them. Port 0 is one that is free for both.
    pub(crate) async fn start(
        address: SocketAddr,
        doors: Arc<Doors>,
    ) -> Result<(SocketAddr, Self), DnsError> {
        let (udp, tcp, address) = bind(address).await?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            tokio::join!(serve_udp(Arc::new(udp), &doors, &stopped), serve_tcp(tcp, &doors, &stopped));
        });
        Ok((address, Self { stop, task }))
    }

    /// Ends every question that came by this listener and gives the address back.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        if let Err(error) = (&mut self.task).await {
            warn!(%error, "a DNS listener ended badly");
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn bind(address: SocketAddr) -> Result<(UdpSocket, TcpListener, SocketAddr), DnsError> {
    const ATTEMPTS: usize = 32;
    let failed = |transport| move |source| DnsError::Bind { address, transport, source };
    let mut attempts = 0;
    loop {
        attempts += 1;
        let udp = UdpSocket::bind(address).await.map_err(failed("UDP"))?;
        let local = udp.local_addr().map_err(failed("UDP"))?;
        match TcpListener::bind(local).await {
            Ok(tcp) => return Ok((udp, tcp, local)),
            // The kernel chose a port that is free for UDP only.
            Err(error)
                if address.port() == 0 && error.kind() == io::ErrorKind::AddrInUse && attempts < ATTEMPTS => {
            }
            Err(source) => return Err(failed("TCP")(source)),
        }
    }
}

async fn serve_udp(socket: Arc<UdpSocket>, doors: &Arc<Doors>, stop: &CancellationToken) {
    let mut questions = JoinSet::new();
    let mut buffer = vec![0; MAX_UDP];
    loop {
        // Each branch is cancel-safe: recv_from takes nothing unless it returns, and a finished task stays in the set.
        let (length, client) = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = questions.join_next() => continue,
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                Err(error) => {
                    warn!(%error, "cannot receive questions");
                    sleep(BACKOFF).await;
                    continue;
                }
            },
        };
        if client.port() == 0 {
            continue;
        }
        let message = buffer[..length].to_vec();
        let Some(entered) = doors.questions.enter(client.ip()) else {
            if let Some(answer) = doors.handler.overloaded(&message, client, Protocol::Udp) {
                // What does not fit the socket's buffer now is lost, which is what overload means.
                let _ = socket.try_send_to(&answer, client);
            }
            continue;
        };
        let (socket, handler) = (Arc::clone(&socket), Arc::clone(&doors.handler));
        questions.spawn(async move {
            let _entered = entered;
            if let Some(answer) = handler.answer(message, client, Protocol::Udp).await
                && let Err(error) = socket.send_to(&answer, client).await
            {
                debug!(%client, %error, "an answer could not be sent");
            }
        });
    }
    questions.shutdown().await;
}

async fn serve_tcp(listener: TcpListener, doors: &Arc<Doors>, stop: &CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        // Cancel-safe, as above.
        let (stream, client) = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "cannot accept connections");
                    sleep(BACKOFF).await;
                    continue;
                }
            },
        };
        let known = doors.handler.knows(client);
        let gate = if known { &doors.connections } else { &doors.strangers };
        let Some(entered) = gate.enter(client.ip()) else {
            debug!(%client, "too many connections");
            continue;
        };
        let doors = Arc::clone(doors);
        connections.spawn(async move {
            if let Err(error) = serve_connection(stream, client, known, &doors, entered).await {
                debug!(%client, %error, "a connection ended");
            }
        });
    }
    connections.shutdown().await;
}

/// Answers the questions of one connection as they come, each when it is ready (RFC 7766, section 7), until the client
/// ends it or says nothing for too long. Half a question is nothing.
async fn serve_connection(
    stream: TcpStream,
    client: SocketAddr,
    known: bool,
    doors: &Arc<Doors>,
    _entered: Entered,
) -> io::Result<()> {
    // Answers are whole messages, not to be held back for more.
    stream.set_nodelay(true)?;
    // A two-byte length before each message (RFC 1035, section 4.2.2).
    let codec = LengthDelimitedCodec::builder()
        .length_field_length(2)
        .max_frame_length(usize::from(u16::MAX))
        .new_codec();
    let mut framed = Framed::new(stream, codec);
    let mut answers = JoinSet::new();
    let mut ended = false;
    let mut silent_since = Instant::now();
    while !ended || !answers.is_empty() {
        // Cancel-safe: a frame is taken whole or not at all, and a finished task stays in the set.
        let message = tokio::select! {
            Some(answer) = answers.join_next() => {
                silent_since = Instant::now();
                if let Ok(Some(answer)) = answer {
                    let answer: Vec<u8> = answer;
                    timeout(doors.idle, framed.send(Bytes::from(answer))).await??;
                }
                if !known && answers.is_empty() {
                    break;
                }
                continue;
            }
            message = timeout_at(silent_since + doors.idle, framed.next()), if !ended && answers.len() < PIPELINE => {
                match message {
                    Ok(Some(message)) => message?,
                    Ok(None) => {
                        ended = true;
                        continue;
                    }
                    // An answer that is still being looked for is no silence.
                    Err(_) if !answers.is_empty() => {
                        silent_since = Instant::now();
                        continue;
                    }
                    Err(_) => break,
                }
            }
        };
        silent_since = Instant::now();
        ended |= !known;
        let message = message.to_vec();
        match doors.questions.enter(client.ip()) {
            Some(entered) => {
                let handler = Arc::clone(&doors.handler);
                answers.spawn(async move {
                    let _entered = entered;
                    handler.answer(message, client, Protocol::Tcp).await
                });
            }
            None => {
                let answer = doors.handler.overloaded(&message, client, Protocol::Tcp);
                answers.spawn(async move { answer });
            }
        }
    }
    Ok(())
}
