//! Connecting to a daemon.

use std::{io, path::Path, time::Duration};

use jsonrpsee::{
    client_transport::ws::{Url, WsTransportClientBuilder},
    core::client::{Client, ClientBuilder, Error},
};
use tokio::net::UnixStream;

use crate::Problem;

/// Connects to the daemon behind `socket`.
///
/// # Errors
/// No daemon there, no permission, or something that does not speak WebSocket.
pub async fn connect(socket: &Path) -> io::Result<Client> {
    let stream = UnixStream::connect(socket).await?;
    // The host in the URL only fills the handshake's Host header.
    let url = Url::parse("ws://localhost/").map_err(io::Error::other)?;
    let (sender, receiver) =
        WsTransportClientBuilder::default().build_with_stream(url, stream).await.map_err(io::Error::other)?;
    Ok(ClientBuilder::default()
        .request_timeout(Duration::from_secs(120))
        .max_buffer_capacity_per_subscription(4096)
        .build_with_tokio(sender, receiver))
}

/// What a failed call means.
pub fn problem(error: &Error) -> Problem {
    match error {
        Error::Call(object) => Problem::from(object),
        other => Problem::new(crate::ErrorKind::Internal, format!("lost the daemon: {other}"))
            .hint("is it still running? try `vm daemon status` and look at its log"),
    }
}
