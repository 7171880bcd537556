//! Connecting and logging in.

use std::{path::Path, sync::Arc};

use russh::{
    Disconnect, client,
    keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKey},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream},
    net::UnixStream,
};

use crate::{
    GuestError,
    ssh::{self, End, PACKET, Verifier},
};

/// Bytes that may be under way to us on one channel without an acknowledgement.
const WINDOW: u32 = 2 << 20;
/// What we say may wait for the guest to read it, in bytes: more than the agent's windows let us say on many channels.
const UNREAD: usize = 16 << 20;

/// An authenticated connection.
pub(crate) struct Connection {
    handle: client::Handle<Verifier>,
    end: End,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("lost", &self.is_lost()).finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects and logs in.
    pub(crate) async fn open(
        socket: &Path,
        host_key: &PublicKey,
        key: Arc<PrivateKey>,
        user: &str,
    ) -> Result<Self, GuestError> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|source| GuestError::Connect { socket: socket.to_owned(), source })?;
        let (verifier, end) = Verifier::new(host_key.clone());
        let mut handle = client::connect_stream(Arc::new(ssh::config(WINDOW)), carried(stream), verifier)
            .await
            .map_err(|error| match error {
                russh::Error::UnknownKey => GuestError::HostKey,
                source => GuestError::Handshake { source },
            })?;
        let answer = handle
            .authenticate_publickey(user, PrivateKeyWithHashAlg::new(key, None))
            .await
            .map_err(|source| GuestError::Login { user: user.to_owned(), source })?;
        if !answer.success() {
            return Err(GuestError::LoginRefused { user: user.to_owned() });
        }
        Ok(Self { handle, end })
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.handle.is_closed()
    }

    /// The error of the connection being gone.
    pub(crate) fn lost(&self) -> GuestError {
        GuestError::Lost { reason: self.end.reason() }
    }

    /// A new channel.
    pub(crate) async fn channel(&self) -> Result<russh::Channel<client::Msg>, GuestError> {
        self.handle
            .channel_open_session()
            .await
            .map_err(|source| if self.is_lost() { self.lost() } else { GuestError::Begin { source } })
    }

    pub(crate) async fn close(&self) {
        let _ = self.handle.disconnect(Disconnect::ByApplication, "", "").await;
    }
}

/// The stream, with a buffer before it. russh does not read while it writes, so two ends that each have much to say would
/// wait for each other; what this end says waits in the buffer instead.
fn carried(mut stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> DuplexStream {
    let (near, mut far) = tokio::io::duplex(UNREAD);
    tokio::spawn(async move {
        // Ends when either side does; who is concerned learns that from its own end.
        let _ = tokio::io::copy_bidirectional_with_sizes(&mut far, &mut stream, 2 * PACKET, 2 * PACKET).await;
    });
    near
}
