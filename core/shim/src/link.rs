//! The guest channel's host end: one session after another, and the connections that go through them.
//!
//! ```text
//!   dial the VMM's socket ──> shake hands ──> session ──┐
//!        ^                        │ no answer for long  │ ended (guest rebooted, restored, agent restarted)
//!        └────────────────────────┴─────────────────────┘
//! ```
//!
//! A hello may get lost: a guest that resets takes bytes with it that the VMM had already given it. Hence
//! the time-out, after which a new carrier brings a new hello. While no guest reads, the VMM leaves the
//! bytes in the socket, where they vanish with the carrier, so a slow boot leaves no stale hellos behind.

use std::{io, os::fd::AsFd, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::UnixStream,
    sync::watch,
};
use tokio_util::sync::CancellationToken;
use vm_channel::{ChannelStream, HostChannel, Service};
use vm_types::shim::ChannelEndpoint;

use crate::sockets::wait_hang_up;

/// How long a guest may take to answer a hello before it gets another.
const ANSWER: Duration = Duration::from_secs(10);
/// Pause between attempts to reach the VMM, from the first to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));

/// How long a service gets to take what a client has said that is gone, and to end its own direction.
const LINGER: Duration = Duration::from_secs(10);

/// The longest answer of a VMM to a request for a vsock stream.
const LINE_LIMIT: usize = 64;

/// The current session, if there is one.
pub(crate) type Session = watch::Receiver<Option<HostChannel>>;

/// Keeps a session with the guest for ever.
pub(crate) async fn maintain(endpoint: ChannelEndpoint, session: watch::Sender<Option<HostChannel>>) {
    let mut pause = PAUSE.0;
    loop {
        if let Some(channel) = shake_hands(&endpoint).await {
            session.send_replace(Some(channel.clone()));
            channel.closed().await;
            session.send_replace(None);
            pause = PAUSE.0;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

async fn shake_hands(endpoint: &ChannelEndpoint) -> Option<HostChannel> {
    let mut carrier = vm_host::socket::connect(endpoint.socket()).await.ok()?;
    let connect = async {
        if let ChannelEndpoint::Vsock { port, .. } = endpoint {
            reach(&mut carrier, *port).await?;
        }
        HostChannel::connect(carrier).await
    };
    tokio::time::timeout(ANSWER, connect).await.ok()?.ok()
}

/// Has the VMM connect a stream to a port of the guest's. It hangs up where nobody listens there.
async fn reach(stream: &mut UnixStream, port: u32) -> io::Result<()> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    // Byte by byte: what is behind the line belongs to the guest's agent.
    let mut line = Vec::new();
    while line.len() < LINE_LIMIT {
        match stream.read_u8().await? {
            b'\n' if line.starts_with(b"OK ") => return Ok(()),
            b'\n' => break,
            byte => line.push(byte),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, String::from_utf8_lossy(&line)))
}

/// Carries one connection to a service of the guest: waits for a session whose guest takes it, then copies both ways, each direction to its
/// own end, until both have ended or one has failed. A service that never ends its direction holds the stream no longer
/// than [`LINGER`] after the client has gone.
pub(crate) async fn carry(
    mut client: UnixStream,
    service: Service,
    mut session: Session,
    ending: CancellationToken,
) {
    // Waiting holds nothing that could be lost when the client goes away.
    let stream = tokio::select! {
        stream = open(service, &mut session) => stream,
        () = wait_hang_up(&client) => None,
        () = ending.cancelled() => None,
    };
    if let Some(stream) = stream {
        let _ = relay(&mut client, stream, LINGER).await;
    }
}

async fn relay(client: &mut UnixStream, mut stream: ChannelStream, linger: Duration) -> io::Result<()> {
    // A second descriptor, as the copying borrows the client.
    let watched = client.as_fd().try_clone_to_owned()?;
    let gone = async {
        wait_hang_up(&watched).await;
        tokio::time::sleep(linger).await;
    };
    // Whichever way it ends, both ends are closed: what was under way has had its time.
    tokio::select! {
        copied = copy_bidirectional(client, &mut stream) => copied.map(|_| ()),
        () = gone => Ok(()),
    }
}

/// A stream of the first session whose guest takes one; `None` when the shim ends. A session that is dying, which may be
/// known nowhere yet, takes none: the connection waits for the next, and has said nothing that could be lost.
async fn open(service: Service, session: &mut Session) -> Option<ChannelStream> {
    loop {
        let current = session.borrow_and_update().clone();
        if let Some(channel) = current
            && let Ok(stream) = channel.open(service).await
        {
            return Some(stream);
        }
        // A session that failed is replaced, which counts as a change since `borrow_and_update`.
        session.changed().await.ok()?;
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
        sync::mpsc,
        time::timeout,
    };

    use vm_channel::{ANSWER, HELLO};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// A session whose services tell what they have read to its end, and keep their own direction open.
    async fn session_of_holders() -> (HostChannel, mpsc::UnboundedReceiver<Vec<u8>>) {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let (told, heard) = mpsc::unbounded_channel();
        tokio::spawn(vm_channel::serve_guest(far, move |_, mut stream| {
            let told = told.clone();
            tokio::spawn(async move {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                told.send(all).unwrap();
                std::future::pending::<()>().await;
            });
        }));
        (HostChannel::connect(near).await.unwrap(), heard)
    }

    /// A session of a guest that has answered the hello and serves nothing, and its carrier.
    async fn dying_session() -> (HostChannel, DuplexStream) {
        let (near, mut far) = tokio::io::duplex(64 * 1024);
        let answer = async {
            let mut hello = [0; HELLO.len() + 16];
            far.read_exact(&mut hello).await.unwrap();
            far.write_all(&[ANSWER, &hello[HELLO.len()..]].concat()).await.unwrap();
            far
        };
        let (channel, far) = tokio::join!(HostChannel::connect(near), answer);
        (channel.unwrap(), far)
    }

    #[tokio::test]
    async fn a_connection_that_comes_while_a_session_dies_is_served_by_the_next() {
        let (dying, mut carrier) = dying_session().await;
        let (sessions, session) = watch::channel(Some(dying));
        let (mut client, near) = UnixStream::pair().unwrap();
        tokio::spawn(carry(near, Service::Ssh, session, CancellationToken::new()));
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        // The stream has been asked for, and nobody will ever take it.
        timeout(LIMIT, carrier.read_exact(&mut [0; 25])).await.unwrap().unwrap();
        drop(carrier);
        let (channel, mut heard) = session_of_holders().await;
        sessions.send_replace(Some(channel));
        assert_eq!(timeout(LIMIT, heard.recv()).await.unwrap().unwrap(), b"question");
        let mut end = [0];
        let soon = Duration::from_millis(50);
        assert!(
            timeout(soon, client.read(&mut end)).await.is_err(),
            "it was ended with the session that died"
        );
    }

    #[tokio::test]
    async fn a_service_that_never_ends_does_not_keep_the_stream_of_a_client_that_is_gone() {
        let (channel, mut heard) = session_of_holders().await;
        let (mut client, mut near) = UnixStream::pair().unwrap();
        let stream = channel.open(Service::Ssh).await.unwrap();
        let relayed = tokio::spawn(async move { relay(&mut near, stream, Duration::from_millis(50)).await });
        client.write_all(&[b'x'; 100_000]).await.unwrap();
        drop(client);
        assert_eq!(timeout(LIMIT, heard.recv()).await.unwrap().unwrap().len(), 100_000);
        timeout(LIMIT, relayed).await.expect("the stream is kept").unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_ended_only_its_own_direction_is_not_gone() {
        let (channel, mut heard) = session_of_holders().await;
        let (mut client, mut near) = UnixStream::pair().unwrap();
        let stream = channel.open(Service::Ssh).await.unwrap();
        let mut relayed = tokio::spawn(async move { relay(&mut near, stream, Duration::ZERO).await });
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(timeout(LIMIT, heard.recv()).await.unwrap().unwrap(), b"question");
        // Longer than hang-ups take to be seen.
        let soon = crate::sockets::HANG_UP_CHECK * 2;
        assert!(timeout(soon, &mut relayed).await.is_err(), "it was cut off while it waited for the answer");
    }
}
