//! The SSH server: sessions, commands and forwarded connections, on any byte stream.
//!
//! ```text
//!  stream ── Throttled ── russh ── Handler ──┬── inbound queue ── stdin, terminal or socket
//!                                            └── ChannelWriteHalf (client's window) ── stdout, stderr
//! ```
//!
//! russh gives a channel's window back as data arrives, not as it is used, so what a command does not
//! read has to wait here: see [`backlog`].

mod backlog;
mod command;
mod files;
mod forward;
pub(crate) mod groups;
mod process;
mod pty;
mod server;
mod users;
pub(crate) mod warm;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::Duration,
};

use russh::{
    MethodKind, MethodSet, Preferred, SshId, cipher, kex,
    keys::{PrivateKey, PublicKey, ssh_key},
    server::Config,
};
use tokio::io::{AsyncRead, AsyncWrite};
use vm_types::guest::config::SshConfig;

use crate::{
    agent::{Shared, State},
    control,
};

/// `PATH` where nobody says otherwise.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where root is at home in the image.
pub(crate) fn home_of_root() -> PathBuf {
    users::find(Path::new("/"), "root").map_or_else(|| "/".into(), |root| root.home)
}

/// What is unusable in an SSH configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    /// The server's key.
    #[error("ssh: the host key is no OpenSSH private key")]
    HostKey { source: ssh_key::Error },
}

/// One configuration of the server.
pub(crate) struct Settings {
    /// For russh.
    pub config: Arc<Config>,
    /// Who may log in, as anybody.
    pub keys: Vec<PublicKey>,
    /// Environment of every command.
    pub environment: BTreeMap<String, String>,
    /// Lines of the configuration that were passed over.
    pub warnings: Vec<String>,
}

impl Settings {
    /// Parses keys.
    ///
    /// # Errors
    /// A host key that is none. An authorized key that is none becomes a warning.
    pub(crate) fn new(
        ssh: &SshConfig,
        environment: &BTreeMap<String, String>,
    ) -> Result<Self, SettingsError> {
        let host_key =
            PrivateKey::from_openssh(&ssh.host_key).map_err(|source| SettingsError::HostKey { source })?;
        let mut keys = Vec::new();
        let mut warnings = Vec::new();
        for line in ssh.authorized_keys.iter().map(|line| line.trim()) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match line.parse::<ssh_key::authorized_keys::Entry>() {
                Ok(entry) => keys.push(entry.public_key().clone()),
                Err(error) => warnings.push(format!("ssh: authorized key {line:.40?}: {error}")),
            }
        }
        Ok(Self { config: Arc::new(config(host_key)), keys, environment: environment.clone(), warnings })
    }
}

fn config(host_key: PrivateKey) -> Config {
    Config {
        server_id: SshId::Standard(Cow::Borrowed(concat!("SSH-2.0-vm-agent_", env!("CARGO_PKG_VERSION")))),
        methods: MethodSet::from([MethodKind::PublicKey].as_slice()),
        // Keys are not guessed, and every OpenSSH client begins with a "none" that fails.
        auth_rejection_time: Duration::ZERO,
        keys: vec![host_key],
        window_size: backlog::WINDOW,
        maximum_packet_size: 32 << 10,
        event_buffer_size: 32,
        inactivity_timeout: None,
        max_auth_attempts: 20,
        preferred: Preferred {
            // The client's order decides. Big-number groups are left out: they take a software-emulated processor seconds.
            kex: Cow::Borrowed(&[
                kex::CURVE25519,
                kex::CURVE25519_PRE_RFC_8731,
                kex::MLKEM768X25519_SHA256,
                kex::EXTENSION_SUPPORT_AS_SERVER,
                kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
            ]),
            cipher: Cow::Borrowed(&[
                cipher::CHACHA20_POLY1305,
                cipher::AES_128_GCM,
                cipher::AES_256_GCM,
                cipher::AES_128_CTR,
                cipher::AES_256_CTR,
            ]),
            ..Preferred::DEFAULT
        },
        ..Config::default()
    }
}

/// Serves one connection to its end.
pub(crate) async fn serve<S>(shared: Arc<Shared>, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    if control::settled(&shared).await != State::Ready {
        return;
    }
    let settings = shared.ssh.read().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(settings) = settings {
        run(settings, stream).await;
    }
}

async fn run<S>(settings: Arc<Settings>, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let backlog = Arc::default();
    let stream = backlog::Throttled::new(stream, Arc::clone(&backlog));
    let config = Arc::clone(&settings.config);
    let handler = server::Handler::new(settings, backlog);
    if let Ok(session) = russh::server::run_stream(config, stream, handler).await {
        // An unclean end is the client's affair; the handler's drop hangs up its commands.
        let _ = session.await;
    }
}

#[cfg(test)]
mod guest_tests;
#[cfg(test)]
mod tests;
