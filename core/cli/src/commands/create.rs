//! `vm create`

use clap::Args;
use vm_api::{VmInfo, rpc::VmClient};

use super::machine::MachineArgs;
use crate::{
    context::Context,
    errors::CliError,
    operations::{OnSignal, follow},
    progress::PATIENCE,
};

/// Make a VM
///
/// Makes a VM and leaves it off, unless --start is given, and prints its name. Ctrl-C undoes what was made so far.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// Start it too
    #[arg(long)]
    start: bool,
}

impl CreateArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let (client, mut interrupts) = context.client_and_interrupts().await?;
        let begun = client.create(self.machine.into_request(false, self.start)).await?;
        let done =
            follow::<VmInfo>(&client, begun, context.output, PATIENCE, OnSignal::Cancel, &mut interrupts)
                .await?;
        context.output.show(&done.result, || done.result.name.to_string())?;
        Ok(0)
    }
}
