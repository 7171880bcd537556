//! Connecting and logging in.

use std::{path::Path, sync::Arc, time::Duration};

use russh::{
    Disconnect, client,
    keys::{PrivateKeyWithHashAlg, PublicKey, load_secret_key},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};
use vm_api::GuestAccess;
use vm_guest::ssh::{self, End, Verifier};

use super::{SshError, carrier::Carrier};

/// Bytes that may be under way to us without an acknowledgement.
const WINDOW: u32 = 8 << 20;
/// Until greeting, key exchange and login are through; a guest that is emulated and busy takes seconds.
const LOGIN_DEADLINE: Duration = Duration::from_secs(60);
/// For the last packets before the stream is closed.
const CLOSE_DEADLINE: Duration = Duration::from_millis(500);

/// An authenticated connection.
pub(crate) struct Connection {
    pub(super) handle: client::Handle<Verifier>,
    end: End,
}

impl Connection {
    /// Connects to a guest and logs in as `user`.
    pub(crate) async fn open(access: &GuestAccess, user: &str) -> Result<Self, SshError> {
        let stream = UnixStream::connect(&access.ssh_socket)
            .await
            .map_err(|source| SshError::Connect { socket: access.ssh_socket.clone(), source })?;
        Self::over(stream, &access.host_key, &access.client_key, user).await
    }

    /// As [`Self::open`], over a given stream.
    pub(super) async fn over<S>(
        stream: S,
        host_key: &str,
        client_key: &Path,
        user: &str,
    ) -> Result<Self, SshError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let expected =
            PublicKey::from_openssh(host_key).map_err(|source| SshError::RecordedKey { source })?;
        let key = load_secret_key(client_key, None)
            .map_err(|source| SshError::ClientKey { path: client_key.to_owned(), source })?;
        let (verifier, end) = Verifier::new(expected);
        let login = async {
            let mut handle =
                client::connect_stream(Arc::new(ssh::config(WINDOW)), Carrier::new(stream), verifier)
                    .await
                    .map_err(|error| match error {
                    russh::Error::UnknownKey => SshError::HostKey,
                    source => SshError::Handshake { source },
                })?;
            let answer = handle
                .authenticate_publickey(user, PrivateKeyWithHashAlg::new(Arc::new(key), None))
                .await
                .map_err(|source| SshError::Login { user: user.to_owned(), source })?;
            if answer.success() { Ok(handle) } else { Err(SshError::LoginRefused { user: user.to_owned() }) }
        };
        let handle = tokio::time::timeout(LOGIN_DEADLINE, login)
            .await
            .map_err(|_| SshError::Silent { seconds: LOGIN_DEADLINE.as_secs() })??;
        Ok(Self { handle, end })
    }

    /// The error of the connection being gone.
    pub(super) fn lost(&self) -> SshError {
        SshError::Lost { reason: self.end.reason() }
    }

    /// Says goodbye, so that the server learns at once what it may end.
    pub(crate) async fn close(self) {
        let goodbye = async {
            if self.handle.disconnect(Disconnect::ByApplication, "", "").await.is_ok() {
                // Ends when the last packet is written; how it ended no longer matters.
                let _ = self.handle.await;
            }
        };
        let _ = tokio::time::timeout(CLOSE_DEADLINE, goodbye).await;
    }
}
