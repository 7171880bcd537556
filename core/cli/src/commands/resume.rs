//! `vm resume`

use clap::Args;
use vm_api::rpc::VmClient;

use super::several::each;
use crate::{context::Context, errors::CliError, operations::OnSignal};

/// Let paused VMs run again
#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl ResumeArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        each(context, &self.names, OnSignal::Leave, async |client, name| {
            VmClient::resume(client, name).await
        })
        .await?;
        Ok(0)
    }
}
