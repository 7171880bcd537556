//! How the agent's SSH server is spoken with, also by a client of another kind than [`Guest`](crate::Guest): the host key that the daemon
//! gave the guest and no other, and what suits a stream that never leaves the host.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, PoisonError},
};

use russh::{
    Preferred, Sig, cipher,
    client::{self, DisconnectReason},
    compression, kex,
    keys::{Algorithm, PublicKey, PublicKeyOrCertificate},
};

/// Ciphers, cheapest for the guest first; the guest may be emulated, without instructions for AES.
const CIPHERS: &[cipher::Name] = &[cipher::AES_128_GCM, cipher::AES_256_GCM, cipher::CHACHA20_POLY1305];
/// The stream never leaves the host, so a key exchange that resists recorded traffic would only cost time.
const KEX: &[kex::Name] =
    &[kex::CURVE25519, kex::CURVE25519_PRE_RFC_8731, kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT];
/// An SSH packet's content, in bytes.
pub const PACKET: usize = 32 << 10;

/// What is agreed with the server; `window` bytes may be under way to us on a channel without an acknowledgement.
pub fn config(window: u32) -> client::Config {
    client::Config {
        window_size: window,
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

/// Why a connection ended, once it has.
#[derive(Debug, Clone, Default)]
pub struct End(Arc<Mutex<Option<String>>>);

impl End {
    /// What to put behind "lost", with a colon before it; empty where nobody gave a reason.
    pub fn reason(&self) -> String {
        let end = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        end.filter(|text| !text.is_empty()).map(|text| format!(": {text}")).unwrap_or_default()
    }
}

/// Accepts one host key and records why the connection ended.
#[derive(Debug)]
pub struct Verifier {
    expected: PublicKey,
    end: End,
}

impl Verifier {
    /// For a server that has this key; and where the connection's end will be told.
    pub fn new(expected: PublicKey) -> (Self, End) {
        let end = End::default();
        (Self { expected, end: end.clone() }, end)
    }
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
            DisconnectReason::Error(russh::Error::Disconnect) => {
                (String::new(), Err(russh::Error::Disconnect))
            }
            DisconnectReason::Error(error) => (error.to_string(), Err(error)),
        };
        *self.end.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        result
    }
}

/// A signal's name on the wire, without `SIG` (RFC 4254, section 6.10).
pub fn signal_name(signal: &Sig) -> &str {
    match signal {
        Sig::ABRT => "ABRT",
        Sig::ALRM => "ALRM",
        Sig::FPE => "FPE",
        Sig::HUP => "HUP",
        Sig::ILL => "ILL",
        Sig::INT => "INT",
        Sig::KILL => "KILL",
        Sig::PIPE => "PIPE",
        Sig::QUIT => "QUIT",
        Sig::SEGV => "SEGV",
        Sig::TERM => "TERM",
        Sig::USR1 => "USR1",
        Sig::Custom(name) => name,
    }
}
