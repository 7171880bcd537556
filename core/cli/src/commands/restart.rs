//! `vm restart`

use clap::Args;
use vm_api::{StopVm, rpc::VmClient};

use super::several::each;
use crate::{context::Context, errors::CliError, operations::OnSignal};

/// Restart VMs
///
/// Shuts each VM down as vm stop does, starts it, and waits until it can be logged in to. One that is off is started.
/// What vm set has changed applies from then on.
#[derive(Debug, Args)]
pub(crate) struct RestartArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    /// Time for the guest before it is killed [default: the configuration's]
    #[arg(long, value_name = "SECONDS")]
    grace: Option<u64>,
}

impl RestartArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let params = StopVm { grace_seconds: self.grace };
        each(context, &self.names, OnSignal::Leave, async |client, name| {
            VmClient::restart(client, name, params.clone()).await
        })
        .await?;
        Ok(0)
    }
}
