//! `vm kill`

use clap::Args;
use vm_api::rpc::VmClient;

use super::several::each;
use crate::{context::Context, errors::CliError, operations::OnSignal};

/// End VMs at once
///
/// As pulling the plug: what the guest had not written to its disk is lost.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl KillArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        each(context, &self.names, OnSignal::Leave, async |client, name| VmClient::kill(client, name).await)
            .await?;
        Ok(0)
    }
}
