//! `vm start`

use clap::Args;
use vm_api::rpc::VmClient;

use super::several::each;
use crate::{context::Context, errors::CliError, operations::OnSignal};

/// Start VMs
///
/// Starts VMs that are off and waits until each can be logged in to.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl StartArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        each(context, &self.names, OnSignal::Cancel, async |client, name| {
            VmClient::start(client, name).await
        })
        .await?;
        Ok(0)
    }
}
