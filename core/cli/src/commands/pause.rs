//! `vm pause`

use clap::Args;
use vm_api::rpc::VmClient;

use super::several::each;
use crate::{context::Context, errors::CliError, operations::OnSignal};

/// Halt running VMs
///
/// Their CPUs stand still until vm resume; they keep their memory, and connections to them wait.
#[derive(Debug, Args)]
pub(crate) struct PauseArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl PauseArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        each(context, &self.names, OnSignal::Leave, async |client, name| VmClient::pause(client, name).await)
            .await?;
        Ok(0)
    }
}
