//! Connecting and logging in.

use std::{
    borrow::Cow,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use russh::{
    Disconnect, Preferred, cipher,
    client::{self, DisconnectReason},
    compression, kex,
    keys::{Algorithm, PrivateKey, PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream},
    net::UnixStream,
};

use crate::GuestError;

/// Ciphers, cheapest for the guest first; the guest may be emulated, without instructions for AES.
const CIPHERS: &[cipher::Name] = &[cipher::AES_128_GCM, cipher::AES_256_GCM, cipher::CHACHA20_POLY1305];
/// The stream never leaves the host, so a key exchange that resists recorded traffic would only cost time.
const KEX: &[kex::Name] =
    &[kex::CURVE25519, kex::CURVE25519_PRE_RFC_8731, kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT];
/// Bytes that may be under way to us on one channel without an acknowledgement.
const WINDOW: u32 = 2 << 20;
/// An SSH packet's content.
pub(crate) const PACKET: usize = 32 << 10;
/// What we say may wait for the guest to read it, in bytes: more than the agent's windows let us say on many channels.
const UNREAD: usize = 16 << 20;

/// An authenticated connection.
pub(crate) struct Connection {
    handle: client::Handle<Verifier>,
    end: Arc<Mutex<Option<String>>>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("lost", &self.is_lost()).finish_non_exhaustive()
    }
}

/// Accepts one host key and records why the connection ended.
struct Verifier {
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
            DisconnectReason::ReceivedDisconnect(info) => (info.message, Ok(())),
            DisconnectReason::Error(error) => (error.to_string(), Err(error)),
        };
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        result
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
        let end = Arc::new(Mutex::new(None));
        let verifier = Verifier { expected: host_key.clone(), end: Arc::clone(&end) };
        let mut handle = client::connect_stream(Arc::new(config()), carried(stream), verifier)
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
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let reason = end.filter(|text| !text.is_empty()).map(|text| format!(": {text}")).unwrap_or_default();
        GuestError::Lost { reason }
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

fn config() -> client::Config {
    client::Config {
        window_size: WINDOW,
        maximum_packet_size: PACKET as u32,
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
