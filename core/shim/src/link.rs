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

use std::{path::Path, time::Duration};

use tokio::{io::copy_bidirectional, net::UnixStream, sync::watch};
use tokio_util::sync::CancellationToken;
use vm_channel::{ChannelStream, HostChannel, Service};
use vm_types::shim::ChannelEndpoint;

use crate::sockets::wait_hang_up;

/// How long a guest may take to answer a hello before it gets another.
const ANSWER: Duration = Duration::from_secs(10);
/// Pause between attempts to reach the VMM, from the first to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));

/// The current session, if there is one.
pub(crate) type Session = watch::Receiver<Option<HostChannel>>;

/// Keeps a session with the guest for ever.
pub(crate) async fn maintain(endpoint: ChannelEndpoint, session: watch::Sender<Option<HostChannel>>) {
    let ChannelEndpoint::VirtioSerial { socket } = endpoint;
    let mut pause = PAUSE.0;
    loop {
        if let Some(channel) = shake_hands(&socket).await {
            session.send_replace(Some(channel.clone()));
            channel.closed().await;
            session.send_replace(None);
            pause = PAUSE.0;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

async fn shake_hands(socket: &Path) -> Option<HostChannel> {
    let carrier = UnixStream::connect(socket).await.ok()?;
    tokio::time::timeout(ANSWER, HostChannel::connect(carrier)).await.ok()?.ok()
}

/// Carries one connection to a service of the guest: waits for a session, then copies both ways, each direction to its
/// own end, until both have ended or one has failed.
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
    if let Some(mut stream) = stream {
        let _ = copy_bidirectional(&mut client, &mut stream).await;
    }
}

/// A stream of the first session that yields one; `None` when the shim ends.
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
