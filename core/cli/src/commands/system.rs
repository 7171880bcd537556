//! `vm system`

use clap::{Args, Subcommand};
use vm_api::rpc::ImageClient;

use crate::{context::Context, errors::CliError, output::table, size::human};

/// Look at all that the daemon keeps
#[derive(Debug, Args)]
pub(crate) struct SystemArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show what images, layers, kernels and VMs take on the disk
    Df,
}

impl SystemArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let Verb::Df = self.verb;
        let usage = context.client().await?.disk_usage().await?;
        context.output.show(&usage, || {
            let rows = [
                ("images", usage.images, human(usage.images_unused)),
                ("layers", usage.layers, "-".to_owned()),
                ("kernels", usage.kernels, "-".to_owned()),
                ("VMs", usage.vms, "-".to_owned()),
            ];
            let rows = rows.into_iter().map(|(what, used, unused)| [what.to_owned(), human(used), unused]);
            table(["WHAT", "USED", "OF NO VM"], rows)
        })?;
        Ok(0)
    }
}
