//! The guest channel over vsock, for machines without our virtio-serial port: each connection from the host is a session.

use std::{future::Future, io};

use tokio::task::JoinHandle;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use vm_types::guest::CHANNEL_VSOCK_PORT;

use crate::{console, kmod};

/// The kernel's driver of the device; nothing else loads it before an image's udev does.
const MODULE: &str = "vmw_vsock_virtio_transport";

/// Listens for ever, and serves one session: a host that connects again has let go of the one before.
///
/// # Errors
/// The kernel without the driver, or the port taken.
pub(crate) async fn serve<S, F>(session: S) -> io::Result<()>
where
    S: Fn(VsockStream) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let failures = tokio::task::spawn_blocking(|| kmod::load_named(&[MODULE.to_owned()])).await?;
    let listener =
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, CHANNEL_VSOCK_PORT)).map_err(|error| {
            // What could not be loaded may be built in.
            match failures.first() {
                Some(failure) => io::Error::new(error.kind(), format!("{error} ({failure})")),
                None => error,
            }
        })?;
    let mut running: Option<JoinHandle<()>> = None;
    loop {
        let (stream, peer) = listener.accept().await?;
        // Processes of the guest could come this way too, where it has a loopback transport.
        if peer.cid() != VMADDR_CID_HOST {
            console::note(format_args!("refused a channel session from vsock context {}", peer.cid()));
            continue;
        }
        if let Some(former) = running.replace(tokio::spawn(session(stream))) {
            former.abort();
        }
    }
}
