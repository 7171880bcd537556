//! Connecting and logging in.

use std::{
    borrow::Cow,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use russh::{
    Disconnect, Preferred, cipher,
    client::{self, DisconnectReason},
    compression, kex,
    keys::{Algorithm, PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate, load_secret_key},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};
use vm_api::GuestAccess;

use super::{SshError, carrier::Carrier};

/// Ciphers, cheapest for the guest first; the guest may be emulated, without instructions for AES.
const CIPHERS: &[cipher::Name] = &[cipher::AES_128_GCM, cipher::AES_256_GCM, cipher::CHACHA20_POLY1305];
/// The stream never leaves the host, so a key exchange that resists recorded traffic would only cost start-up time.
const KEX: &[kex::Name] =
    &[kex::CURVE25519, kex::CURVE25519_PRE_RFC_8731, kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT];
/// Bytes that may be under way to us without an acknowledgement.
const WINDOW: u32 = 8 << 20;
/// Until greeting, key exchange and login are through; a guest that is emulated and busy takes seconds.
const LOGIN_DEADLINE: Duration = Duration::from_secs(60);
/// For the last packets before the stream is closed.
const CLOSE_DEADLINE: Duration = Duration::from_millis(500);

/// An authenticated connection.
pub(crate) struct Connection {
    pub(super) handle: client::Handle<Verifier>,
    end: Arc<Mutex<Option<String>>>,
}

/// Accepts one host key and records why the connection ended.
pub(super) struct Verifier {
    expected: PublicKey,
    end: Arc<Mutex<Option<String>>>,
}

impl client::Handler for Verifier {
    type Error = russh::Error;

    async fn check_server_key(&mut self, shown: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(match shown {
            PublicKeyOrCertificate::PublicKey { key, .. } => key.key_data() == self.expected.key_data(),
            PublicKeyOrCertificate::Certificate(_) => false,
        })
    }

    async fn disconnected(&mut self, reason: DisconnectReason<russh::Error>) -> Result<(), russh::Error> {
        let (text, result) = match reason {
            DisconnectReason::ReceivedDisconnect(info) => (info.message.clone(), Ok(())),
            DisconnectReason::Error(russh::Error::Disconnect) => {
                (String::new(), Err(russh::Error::Disconnect))
            }
            DisconnectReason::Error(error) => (error.to_string(), Err(error)),
        };
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        result
    }
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
        let end = Arc::new(Mutex::new(None));
        let verifier = Verifier { expected, end: Arc::clone(&end) };
        let login = async {
            let mut handle = client::connect_stream(Arc::new(config()), Carrier::new(stream), verifier)
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
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner).take();
        let reason = end.filter(|text| !text.is_empty()).map(|text| format!(": {text}")).unwrap_or_default();
        SshError::Lost { reason }
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

fn config() -> client::Config {
    client::Config {
        window_size: WINDOW,
        maximum_packet_size: 32 << 10,
        preferred: Preferred {
            kex: Cow::Borrowed(KEX),
            key: Cow::Borrowed(&[Algorithm::Ed25519]),
            cipher: Cow::Borrowed(CIPHERS),
            compression: Cow::Borrowed(&[compression::NONE]),
            ..Preferred::DEFAULT
        },
        ..client::Config::default()
    }
}
