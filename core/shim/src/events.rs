//! What a VMM tells of its guest's end, on a socket of its own for this.
//!
//! A VMM says why it ends right before it does. The shim has read that when the socket ends, which it does with the
//! VMM at the latest. Without it (no such socket, a VMM that was killed) the cause stays unknown, and nothing waits.

use std::{io, path::Path, time::Duration};

use tokio::{
    io::{AsyncWriteExt, BufReader},
    net::UnixStream,
    sync::watch,
};
use tokio_util::sync::CancellationToken;
use vm_types::shim::{GuestEnd, QmpEvent};

use crate::lines;

/// Pause between attempts to reach the VMM, from the first to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));
/// The longest line in bytes; events are short, and a VMM that its guest has taken over may send anything.
const LINE_LIMIT: usize = 64 * 1024;

/// Listens until the socket ends after `over`, which says that the VMM has ended; how the guest did is in `end`.
pub(crate) async fn listen(socket: &Path, over: CancellationToken, end: watch::Sender<Option<GuestEnd>>) {
    let mut pause = PAUSE.0;
    loop {
        // Refused where the VMM has ended: then there is nothing to hear, and nothing more will come.
        if let Ok(stream) = UnixStream::connect(socket).await {
            // A connection that breaks is made again, as long as there is somebody.
            let _ = hear(stream, &end).await;
        }
        // Waiting holds nothing.
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = over.cancelled() => return,
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

async fn hear(mut stream: UnixStream, end: &watch::Sender<Option<GuestEnd>>) -> io::Result<()> {
    // QMP sends no events before the client has said this. It may be sent before the greeting is read.
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").await?;
    let mut stream = BufReader::with_capacity(1024, stream);
    while let Some(line) = lines::read_line(&mut stream, LINE_LIMIT).await? {
        if let Ok(event) = serde_json::from_slice::<QmpEvent>(&line) {
            end.send_modify(|end| *end = event.guest_end(*end));
        }
    }
    Ok(())
}
