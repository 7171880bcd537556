//! `vm ls`

use clap::Args;
use vm_api::rpc::VmClient;

use crate::{
    context::Context,
    errors::CliError,
    output::{ago, table},
    size::human,
};

/// List VMs
///
/// With --quiet, names only.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {}

impl LsArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        let vms = VmClient::list(&client).await?;
        context.output.show(&vms, || {
            if context.output.quiet {
                return vms.iter().map(|vm| format!("{}\n", vm.name)).collect();
            }
            table(
                ["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "DISK", "ADDRESS", "CREATED"],
                vms.iter().map(|vm| {
                    [
                        vm.name.to_string(),
                        vm.state.word().to_owned(),
                        vm.image.clone(),
                        vm.cpus.to_string(),
                        human(vm.memory_mib << 20),
                        format!("{} of {}", human(vm.disk_used_bytes), human(vm.disk_bytes)),
                        vm.address.map(|address| address.to_string()).unwrap_or_default(),
                        ago(vm.created_at),
                    ]
                }),
            )
        })?;
        Ok(0)
    }
}
