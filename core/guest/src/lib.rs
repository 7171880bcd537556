//! Acts in a running guest: commands and files, over the SSH server of its agent.
//!
//! ```text
//!  Guest ─┬─ connection as root ──┬─ channel: a command
//!         │                       └─ channel: one operation of the file service
//!         └─ connection as dev ───── channel: a command
//!              └─ shim's ssh.sock ══ guest channel ══ agent
//! ```
//!
//! Needs nothing of the image but what a command itself is: files are the agent's own service
//! ([`vm_types::guest::files`]). Whoever drops a future ends the work: the channel is closed, upon which the agent ends the
//! command and removes what is half written. Nothing here has a time-out, but a command that is given one.

mod channel;
mod command;
mod connection;
mod error;
mod files;
pub mod ssh;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

pub use command::{Command, Ended, Output};
pub use error::GuestError;
pub use files::{Content, Packed};
use russh::keys::{PrivateKey, PublicKey};

use connection::Connection;

/// Who everything is done as where nobody says otherwise.
const ROOT: &str = "root";

/// A running guest. Cheap to share; all its methods can go on side by side.
#[derive(Debug)]
pub struct Guest {
    socket: PathBuf,
    host_key: PublicKey,
    client_key: Arc<PrivateKey>,
    /// By the guest's user.
    connections: Mutex<HashMap<String, Arc<Connection>>>,
}

impl Guest {
    /// Connects through the shim's socket and logs in as root.
    ///
    /// `client_key` is a file with an OpenSSH private key without a passphrase, `host_public_key` the line of the guest's key, which
    /// must be the one that the guest shows.
    ///
    /// # Errors
    /// Unusable keys, a guest that is not there, that is another or does not let us in.
    pub async fn connect(
        ssh_socket: &Path,
        client_key: &Path,
        host_public_key: &str,
    ) -> Result<Self, GuestError> {
        let host_key =
            PublicKey::from_openssh(host_public_key).map_err(|source| GuestError::RecordedKey { source })?;
        let text = tokio::fs::read_to_string(client_key)
            .await
            .map_err(|source| GuestError::ReadKey { path: client_key.to_owned(), source })?;
        let key = PrivateKey::from_openssh(text)
            .map_err(|source| GuestError::ClientKey { path: client_key.to_owned(), source })?;
        let guest = Self {
            socket: ssh_socket.to_owned(),
            host_key,
            client_key: Arc::new(key),
            connections: Mutex::default(),
        };
        guest.connection(ROOT).await?;
        Ok(guest)
    }

    /// Says goodbye, so that the guest learns at once that nobody is there any more. What is still under way fails.
    pub async fn close(self) {
        let connections = self.connections.into_inner().unwrap_or_else(PoisonError::into_inner);
        for connection in connections.into_values() {
            connection.close().await;
        }
    }

    /// The connection as `user`, made anew if it was lost.
    async fn connection(&self, user: &str) -> Result<Arc<Connection>, GuestError> {
        let known = self.connections.lock().unwrap_or_else(PoisonError::into_inner).get(user).cloned();
        if let Some(connection) = known.filter(|connection| !connection.is_lost()) {
            return Ok(connection);
        }
        let new = Connection::open(&self.socket, &self.host_key, Arc::clone(&self.client_key), user).await?;
        let new = Arc::new(new);
        // Of two that were made at once the second stays; the other goes with its last channel.
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(user.to_owned(), Arc::clone(&new));
        Ok(new)
    }
}
