//! `vm stop`

use clap::Args;
use vm_api::{StopVm, rpc::VmClient};

use super::several::each;
use crate::{context::Context, errors::CliError, operations::OnSignal};

/// Shut VMs down
///
/// Lets each guest's own init end everything and unmount; one that takes longer than the grace period is killed.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    /// Time for the guest before it is killed [default: the configuration's]
    #[arg(long, value_name = "SECONDS")]
    grace: Option<u64>,
}

impl StopArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let params = StopVm { grace_seconds: self.grace };
        each(context, &self.names, OnSignal::Leave, async |client, name| {
            VmClient::stop(client, name, params.clone()).await
        })
        .await?;
        Ok(0)
    }
}
