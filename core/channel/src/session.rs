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

use crate::handshake;

/// One stream of a channel; a shut-down write side is end-of-file to the other end while its own direction goes on.
pub type ChannelStream = Compat<yamux::Stream>;

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
        let connection = Connection::new(carrier.compat(), config(), Mode::Client);
        let (requests, queue) = mpsc::channel(16);
        tokio::spawn(drive_host(connection, queue));
        Ok(Self { requests })
    }

    /// Opens a stream to one of the agent's services.
    ///
    /// # Errors
    /// `BrokenPipe` when the session has ended.
    pub async fn open(&self, service: Service) -> io::Result<ChannelStream> {
        let ended = || io::Error::new(io::ErrorKind::BrokenPipe, "the guest channel has ended");
        let (answer, stream) = oneshot::channel();
        self.requests.send(answer).await.map_err(|_| ended())?;
        let mut stream = stream.await.map_err(|_| ended())??.compat();
        stream.write_all(&[service as u8]).await?;
        stream.flush().await?;
        Ok(stream)
    }

    /// Ends when the session has ended.
    pub async fn closed(&self) {
        self.requests.closed().await;
    }
}

/// A yamux connection makes progress only while it is polled for inbound streams, so one task does
/// that and serves the requests for outbound ones in between.
async fn drive_host<S>(mut connection: Connection<Compat<S>>, mut queue: mpsc::Receiver<Open>)
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
    let mut connection = Connection::new(carrier.compat(), config(), Mode::Server);
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

fn config() -> Config {
    let mut config = Config::default();
    // A virtio-serial port moves at most one page-sized buffer at a time; larger frames only add latency for the others.
    config.set_split_send_size(16 * 1024);
    config
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
        let flood = tokio::spawn(async move {
            let chunk = vec![0; 64 * 1024];
            while stuck.write_all(&chunk).await.is_ok() {}
        });
        for _ in 0..20 {
            let mut stream = channel.open(Service::Control).await.unwrap();
            stream.write_all(b"ping").await.unwrap();
            stream.flush().await.unwrap();
            let mut back = [0; 4];
            stream.read_exact(&mut back).await.unwrap();
            assert_eq!(&back, b"ping");
        }
        flood.abort();
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
