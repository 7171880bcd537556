//! Multiplexed sessions on a carrier.

use std::{io, task::Poll};

use futures::future::poll_fn;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{mpsc, oneshot},
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use vm_types::guest::control::Service;
use yamux::{Config, Connection, Mode};

use crate::{handshake, pings::AnswersPings};

/// What the guest says first on a stream, for the session's own ends: it has taken the stream. A stream without it was
/// never anybody's, whatever has become of its session, so nothing is lost by opening another.
const TAKEN: u8 = b'+';

/// One stream of a channel; a shut-down write side is end-of-file to the other end while its own direction goes on.
pub type ChannelStream = Compat<yamux::Stream>;

/// Streams that may be open at once in one session; whoever opens them keeps below this. yamux answers one too many
/// by ending the session.
///
/// yamux's own limit is above it by [`UNSEEN`], because streams that were dropped count until yamux has come to tell
/// the other end, which takes as long as that end does not read. It lets no more than 256 unacknowledged ones come about.
pub const MAX_STREAMS: usize = 256;
const UNSEEN: usize = 256;
/// What the guest's end allows, more than the host can have open: a service needs time to see the end of its stream.
const GUEST_STREAMS: usize = 4 * MAX_STREAMS;
/// Receive window of a stream in bytes, by yamux's specification.
const WINDOW: usize = 256 * 1024;
/// Bytes by which the windows of all streams of a session together may grow where that makes them faster. With the
/// streams' number it bounds what the other end can make this one hold.
const GROWTH: usize = 16 * 1024 * 1024;

type Session<S> = Connection<Compat<AnswersPings<S>>>;

type Open = oneshot::Sender<io::Result<yamux::Stream>>;

/// Host end of a session. Clones share the session; it ends when the carrier does or all clones are dropped.
#[derive(Debug, Clone)]
pub struct HostChannel {
    requests: mpsc::Sender<Open>,
}

impl HostChannel {
    /// Shakes hands with the guest's agent on `carrier`, which may take until the guest has booted, and runs the session
    /// in a task of its own.
    ///
    /// # Errors
    /// The carrier ending before the guest has answered.
    pub async fn connect<S>(mut carrier: S) -> io::Result<Self>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        handshake::host(&mut carrier).await?;
        let connection = connection(carrier, MAX_STREAMS + UNSEEN, Mode::Client);
        let (requests, queue) = mpsc::channel(16);
        tokio::spawn(drive_host(connection, queue));
        Ok(Self { requests })
    }

    /// Opens a stream to one of the agent's services: waits until the agent has taken it, which costs a round trip. A
    /// session may have lost its guest long before its end is seen here; a stream that was merely sent off would then
    /// end without a word, and nobody could tell that from a service that had nothing to say.
    ///
    /// # Errors
    /// `BrokenPipe` when the session has ended, any other when it has not taken the stream.
    pub async fn open(&self, service: Service) -> io::Result<ChannelStream> {
        let ended = || io::Error::new(io::ErrorKind::BrokenPipe, "the guest channel has ended");
        let (answer, stream) = oneshot::channel();
        self.requests.send(answer).await.map_err(|_| ended())?;
        let mut stream = stream.await.map_err(|_| ended())??.compat();
        stream.write_all(&[service as u8]).await?;
        stream.flush().await?;
        match stream.read_u8().await {
            Ok(TAKEN) => Ok(stream),
            Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "the guest did not take the stream")),
            Err(_) => Err(ended()),
        }
    }

    /// Ends when the session has ended.
    pub async fn closed(&self) {
        self.requests.closed().await;
    }
}

/// A yamux connection makes progress only while it is polled for inbound streams, so one task does
/// that and serves the requests for outbound ones in between.
async fn drive_host<S>(mut connection: Session<S>, mut queue: mpsc::Receiver<Open>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut waiting: Option<Open> = None;
    let ended: Result<(), yamux::ConnectionError> = poll_fn(|context| {
        loop {
            if waiting.is_none() {
                match queue.poll_recv(context) {
                    Poll::Ready(Some(request)) => waiting = Some(request),
                    Poll::Ready(None) => return Poll::Ready(Ok(())),
                    Poll::Pending => {}
                }
            }
            if waiting.is_some()
                && let Poll::Ready(result) = connection.poll_new_outbound(context)
            {
                if let Some(answer) = waiting.take() {
                    let _ = answer.send(result.map_err(io::Error::other));
                }
                continue;
            }
            match connection.poll_next_inbound(context) {
                // The guest never opens streams; one that does is told so by the reset that dropping it sends.
                Poll::Ready(Some(Ok(stream))) => drop(stream),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
    match ended {
        Ok(()) => {
            let _ = poll_fn(|context| connection.poll_close(context)).await;
        }
        Err(error) => tracing::debug!(%error, "guest channel session ended"),
    }
}

/// Guest end: answers the handshake and hands each stream to `on_stream` until the session ends.
/// `on_stream` must not block; it spawns a task per stream.
///
/// # Errors
/// The carrier failing. Its end is `Ok`.
pub async fn serve_guest<S, F>(mut carrier: S, mut on_stream: F) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(Service, ChannelStream),
{
    handshake::guest(&mut carrier).await?;
    let mut connection = connection(carrier, GUEST_STREAMS, Mode::Server);
    let (named, mut ready) = mpsc::unbounded_channel();
    loop {
        // Cancel-safe: both arms only poll, and lose nothing when dropped between two polls.
        tokio::select! {
            inbound = poll_fn(|context| connection.poll_next_inbound(context)) => match inbound {
                None => return Ok(()),
                Some(Err(error)) => return Err(io::Error::other(error)),
                Some(Ok(stream)) => {
                    // The first byte comes with the connection being polled, so it is awaited beside it.
                    let named = named.clone();
                    tokio::spawn(async move {
                        let mut stream = stream.compat();
                        if let Ok(byte) = stream.read_u8().await
                            && let Some(service) = Service::from_byte(byte)
                            && stream.write_all(&[TAKEN]).await.is_ok()
                            && stream.flush().await.is_ok()
                        {
                            let _ = named.send((service, stream));
                        }
                    });
                }
            },
            Some((service, stream)) = ready.recv() => on_stream(service, stream),
        }
    }
}

fn connection<S>(carrier: S, streams: usize, mode: Mode) -> Session<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut config = Config::default();
    // A virtio-serial port moves at most one page-sized buffer at a time; larger frames only add latency for the others.
    config.set_split_send_size(16 * 1024);
    // In this order: each must fit the other at any time.
    config.set_max_connection_receive_window(None);
    config.set_max_num_streams(streams);
    config.set_max_connection_receive_window(Some(streams * WINDOW + GROWTH));
    Connection::new(AnswersPings::new(carrier).compat(), config, mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pair() -> HostChannel {
        let (near, far) = tokio::io::duplex(8 * 1024);
        tokio::spawn(serve_guest(far, |service, stream| {
            tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(stream);
                match service {
                    Service::Control => drop(tokio::io::copy(&mut read, &mut write).await),
                    // Never reads: its peer must not hold up anybody else.
                    Service::Ssh => std::future::pending().await,
                }
                let _ = write.shutdown().await;
            });
        }));
        HostChannel::connect(near).await.unwrap()
    }

    #[tokio::test]
    async fn bytes_come_back_whole_and_eof_passes_both_ways() {
        let channel = pair().await;
        let data: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 / 3) as u8).collect();
        let (mut read, mut write) = tokio::io::split(channel.open(Service::Control).await.unwrap());
        let mut back = Vec::new();
        let send = async {
            write.write_all(&data).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let (_, got) = tokio::join!(send, read.read_to_end(&mut back));
        got.unwrap();
        assert!(back == data);
    }

    #[tokio::test]
    async fn a_stream_nobody_reads_blocks_no_other() {
        let channel = pair().await;
        let mut stuck = channel.open(Service::Ssh).await.unwrap();
        let chunk = vec![0; 64 * 1024];
        let mut taken = 0;
        // Until nothing more is taken although the session runs: round trips of others show that.
        let mut idle_rounds = 0;
        while idle_rounds < 20 {
            match poll_once(&mut stuck, &chunk).await {
                Some(count) => (taken, idle_rounds) = (taken + count, 0),
                None => idle_rounds += 1,
            }
            assert!(taken < 64 << 20, "an unread stream takes bytes without end");
            ping(&channel).await;
        }
        // Less the byte that named the service.
        assert!(taken >= WINDOW - 1, "the flood stopped after {taken} bytes, before the window was full");
        for _ in 0..20 {
            ping(&channel).await;
        }
    }

    /// How many bytes are taken at once, if any.
    async fn poll_once(stream: &mut ChannelStream, bytes: &[u8]) -> Option<usize> {
        poll_fn(|context| {
            Poll::Ready(match std::pin::Pin::new(&mut *stream).poll_write(context, bytes) {
                Poll::Ready(count) => Some(count.unwrap()),
                Poll::Pending => None,
            })
        })
        .await
    }

    async fn ping(channel: &HostChannel) {
        let mut stream = channel.open(Service::Control).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        stream.flush().await.unwrap();
        let mut back = [0; 4];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"ping");
    }

    #[tokio::test]
    async fn as_many_streams_as_allowed_come_and_go() {
        let channel = pair().await;
        for _ in 0..3 {
            let mut open = Vec::new();
            for _ in 0..MAX_STREAMS {
                open.push(channel.open(Service::Control).await.unwrap());
            }
            for stream in &mut open {
                stream.write_all(b"x").await.unwrap();
                assert_eq!(stream.read_u8().await.unwrap(), b'x');
            }
        }
        ping(&channel).await;
    }

    #[tokio::test]
    async fn streams_dropped_while_the_guest_is_stuck_do_not_end_the_session() {
        let (near, mut far) = tokio::io::duplex(256);
        let (channel, answered) = tokio::join!(HostChannel::connect(near), handshake::guest(&mut far));
        answered.unwrap();
        let channel = channel.unwrap();
        // Nobody reads: they are sent off as far as that goes, and dropped.
        for _ in 0..4 * MAX_STREAMS {
            let sent_off = async {
                for _ in 0..8 {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                opened = channel.open(Service::Control) => panic!("nobody took it: {opened:?}"),
                () = sent_off => {}
            }
        }
        assert!(!channel.requests.is_closed());
    }

    /// What a host says up to its first stream's service, in bytes: a ping, and a frame with the byte that names the service.
    const OPENING: usize = 12 + 12 + 1;

    #[tokio::test]
    async fn a_stream_that_a_dying_guest_did_not_take_is_not_opened() {
        let (near, mut far) = tokio::io::duplex(4 * 1024);
        let (channel, answered) = tokio::join!(HostChannel::connect(near), handshake::guest(&mut far));
        answered.unwrap();
        let channel = channel.unwrap();
        let dying = async {
            far.read_exact(&mut [0; OPENING]).await.unwrap();
            drop(far);
        };
        let (opened, ()) = tokio::join!(channel.open(Service::Ssh), dying);
        assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    /// Both directions of a carrier full of data, and at each end a ping that cannot be answered until the other reads.
    #[tokio::test]
    async fn a_ping_that_cannot_be_answered_yet_holds_up_no_data() {
        let (near, mut far) = tokio::io::duplex(4 * 1024);
        let (channel, answered) = tokio::join!(HostChannel::connect(near), handshake::guest(&mut far));
        answered.unwrap();
        let channel = channel.unwrap();
        let taking = async {
            far.read_exact(&mut [0; OPENING]).await.unwrap();
            far.write_all(&[0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, TAKEN]).await.unwrap();
        };
        let (stream, ()) = tokio::join!(channel.open(Service::Ssh), taking);
        let (mut read, mut write) = tokio::io::split(stream.unwrap());
        let flood = tokio::spawn(async move { write.write_all(&vec![0; WINDOW / 2]).await.map(|()| write) });
        // The peer reads only one byte: the host's end is in the midst of its writes.
        far.read_u8().await.unwrap();
        let ping = [0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1];
        let data = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, b'h', b'e', b'l', b'l', b'o'];
        for _ in 0..3 {
            far.write_all(&ping).await.unwrap();
            far.write_all(&data).await.unwrap();
            let mut got = [0; 5];
            let limit = std::time::Duration::from_secs(20);
            tokio::time::timeout(limit, read.read_exact(&mut got)).await.expect("a deadlock").unwrap();
            assert_eq!(&got, b"hello");
        }
        flood.abort();
    }

    #[tokio::test]
    async fn floods_in_both_directions_end() {
        const BYTES: u64 = 64 << 20;
        let (near, far) = tokio::io::duplex(4 * 1024);
        tokio::spawn(serve_guest(far, |_, stream| drop(tokio::spawn(flood(stream)))));
        let channel = HostChannel::connect(near).await.unwrap();

        async fn flood(stream: ChannelStream) -> u64 {
            let (mut read, mut write) = tokio::io::split(stream);
            let send = async {
                tokio::io::copy(&mut tokio::io::repeat(7).take(BYTES), &mut write).await.unwrap();
                write.shutdown().await.unwrap();
            };
            let mut nowhere = tokio::io::sink();
            tokio::join!(send, tokio::io::copy(&mut read, &mut nowhere)).1.unwrap()
        }
        let first = flood(channel.open(Service::Ssh).await.unwrap());
        let second = flood(channel.open(Service::Ssh).await.unwrap());
        let both = async { tokio::join!(first, second) };
        let limit = std::time::Duration::from_secs(120);
        let got = tokio::time::timeout(limit, both).await.expect("a deadlock");
        assert_eq!(got, (BYTES, BYTES));
    }

    #[tokio::test]
    async fn the_end_of_the_carrier_is_seen() {
        let (near, far) = tokio::io::duplex(1024);
        let guest = tokio::spawn(serve_guest(far, |_, _| {}));
        let channel = HostChannel::connect(near).await.unwrap();
        guest.abort();
        channel.closed().await;
        assert!(channel.open(Service::Control).await.is_err());
    }
}
