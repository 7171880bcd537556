//! Connecting to a daemon.

use std::{error::Error as _, io, path::Path, time::Duration};

use jsonrpsee::{
    client_transport::ws::{Url, WsHandshakeError, WsTransportClientBuilder},
    core::client::{Client, ClientBuilder, Error},
};
use tokio::net::UnixStream;

use crate::Problem;

/// Connects to the daemon behind `socket`.
///
/// # Errors
/// No daemon there or one that ends just now (`NotFound`, or that a connection was refused, reset, or closed), no permission,
/// or something that does not speak WebSocket.
pub async fn connect(socket: &Path) -> io::Result<Client> {
    let stream = UnixStream::connect(socket).await?;
    // The host in the URL only fills the handshake's Host header.
    let url = Url::parse("ws://localhost/").map_err(io::Error::other)?;
    let (sender, receiver) =
        WsTransportClientBuilder::default().build_with_stream(url, stream).await.map_err(failed)?;
    Ok(ClientBuilder::default()
        .request_timeout(Duration::from_secs(120))
        .max_buffer_capacity_per_subscription(4096)
        .build_with_tokio(sender, receiver))
}

/// With the kind of what failed beneath it.
fn failed(error: WsHandshakeError) -> io::Error {
    let mut kind = match &error {
        WsHandshakeError::Rejected { status_code: 403 } => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::Other,
    };
    let mut source = error.source();
    while let Some(cause) = source {
        kind = cause.downcast_ref::<io::Error>().map_or(kind, io::Error::kind);
        source = cause.source();
    }
    io::Error::new(kind, error)
}

/// What a failed call means.
pub fn problem(error: &Error) -> Problem {
    match error {
        Error::Call(object) => Problem::from(object),
        Error::RestartNeeded(_) => {
            Problem::new(crate::ErrorKind::Internal, "lost the daemon: it closed the connection")
                .hint("is it still running? try `vm daemon status` and look at its log")
        }
        other => Problem::new(crate::ErrorKind::Internal, format!("lost the daemon: {other}"))
            .hint("is it still running? try `vm daemon status` and look at its log"),
    }
}
