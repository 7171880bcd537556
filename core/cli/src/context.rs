//! What every command needs: where the daemon is and how to answer.

use jsonrpsee::core::client::Client;
use vm_types::Layout;

use crate::{daemon, errors::CliError, interrupts::Interrupts, output::Output};

/// The global options.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// The daemon's directories.
    pub(crate) layout: Layout,
    /// How answers are shown.
    pub(crate) output: Output,
    /// Whether a daemon that is not there may be started.
    pub(crate) may_start: bool,
}

impl Context {
    /// Connects to the daemon, and starts it where it is not there and may be.
    pub(crate) async fn client(&self) -> Result<Client, CliError> {
        Ok(daemon::connect_or_start(&self.layout, self.may_start).await?)
    }

    /// As [`Self::client`], for verbs with a long operation that a signal cancels.
    pub(crate) async fn client_and_interrupts(&self) -> Result<(Client, Interrupts), CliError> {
        let interrupts = Interrupts::new()?;
        Ok((self.client().await?, interrupts))
    }
}
