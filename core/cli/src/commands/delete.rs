//! `vm delete`

use clap::Args;
use vm_api::rpc::VmClient;

use super::several::each;
use crate::{context::Context, errors::CliError, operations::OnSignal};

/// Delete VMs with their disks
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    /// Also those that are up
    #[arg(short, long)]
    force: bool,
}

impl DeleteArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        each(context, &self.names, OnSignal::Leave, async |client, name| {
            VmClient::delete(client, name, self.force).await
        })
        .await?;
        Ok(0)
    }
}
