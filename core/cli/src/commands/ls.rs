//! `vm ls`

use clap::Args;
use vm_api::{VmInfo, rpc::VmClient};

use crate::{
    context::Context,
    errors::CliError,
    output::{ago, table, until},
    size::human,
};

/// List VMs
///
/// With --quiet, names only. A state with a star is of a VM with changes that only a restart brings (see vm show);
/// the column EXPIRES is there if one of them has a time to live.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {}

impl LsArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        let vms = VmClient::list(&client).await?.into_vec();
        context.output.show(&vms, || {
            if context.output.quiet {
                return vms.iter().map(|vm| format!("{}\n", vm.name)).collect();
            }
            text(&vms)
        })?;
        Ok(0)
    }
}

const COLUMNS: [&str; 8] = ["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "DISK", "ADDRESS", "CREATED"];

fn text(vms: &[VmInfo]) -> String {
    let row = |vm: &VmInfo| {
        [
            vm.name.to_string(),
            format!("{}{}", vm.state.word(), if vm.needs_restart.is_empty() { "" } else { "*" }),
            vm.image.clone(),
            vm.cpus.to_string(),
            human(vm.memory_mib << 20),
            format!("{} of {}", human(vm.disk_used_bytes), human(vm.disk_bytes)),
            vm.address.map(|address| address.to_string()).unwrap_or_default(),
            ago(vm.created_at),
        ]
    };
    if vms.iter().all(|vm| vm.expires_at.is_none()) {
        return table(COLUMNS, vms.iter().map(row));
    }
    let [name, state, image, cpus, memory, disk, address, created] = COLUMNS;
    let columns = [name, state, image, cpus, memory, disk, address, created, "EXPIRES"];
    table(
        columns,
        vms.iter().map(|vm| {
            let [name, state, image, cpus, memory, disk, address, created] = row(vm);
            let expires = vm.expires_at.map(until).unwrap_or_default();
            [name, state, image, cpus, memory, disk, address, created, expires]
        }),
    )
}
