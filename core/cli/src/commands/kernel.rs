//! `vm kernel`

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use vm_api::{ImportKernel, KernelRecord, rpc::KernelClient};

use super::image::absolute;
use crate::{
    context::Context,
    errors::CliError,
    operations::{OnSignal, follow},
    output::{ago, table},
    progress::PATIENCE,
};

/// Manage kernels
#[derive(Debug, Args)]
pub(crate) struct KernelArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List kernels
    #[command(visible_alias = "list")]
    Ls,
    /// Import a kernel: a distribution's package, or files
    #[command(group = clap::ArgGroup::new("from").required(true).args(["distribution", "kernel"]))]
    Import {
        /// Whose package
        distribution: Option<Distribution>,
        /// A bzImage or vmlinux
        #[arg(long, value_name = "FILE")]
        kernel: Option<PathBuf>,
        /// Its module directory, the one with modules.dep
        #[arg(long, value_name = "DIR", requires = "kernel", conflicts_with = "distribution")]
        modules: Option<PathBuf>,
    },
    /// Delete kernels that no VM uses
    #[command(visible_alias = "rm")]
    Delete {
        /// Ids or releases
        #[arg(required = true, value_name = "KERNEL")]
        kernels: Vec<String>,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Distribution {
    /// Debian's cloud kernel
    Debian,
}

impl KernelArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        match self.verb {
            Verb::Ls => ls(context).await,
            Verb::Import { distribution, kernel, modules } => {
                let source = match (distribution, kernel) {
                    (None, Some(kernel)) => ImportKernel::Files {
                        kernel: absolute(&kernel)?,
                        modules: modules.as_deref().map(absolute).transpose()?,
                    },
                    // clap sees to it that there is exactly one.
                    (Some(Distribution::Debian), _) | (None, None) => ImportKernel::Debian,
                };
                import(context, source).await
            }
            Verb::Delete { kernels } => {
                let client = context.client().await?;
                for kernel in &kernels {
                    KernelClient::delete(&client, kernel.clone()).await?;
                }
                let text = || kernels.iter().map(|kernel| format!("{kernel}\n")).collect();
                context.output.show(&json!({"deleted": kernels}), text)?;
                Ok(0)
            }
        }
    }
}

async fn import(context: &Context, source: ImportKernel) -> Result<u8, CliError> {
    let (client, mut interrupts) = context.client_and_interrupts().await?;
    let begun = KernelClient::import(&client, source).await?;
    let done =
        follow::<KernelRecord>(&client, begun, context.output, PATIENCE, OnSignal::Cancel, &mut interrupts)
            .await?;
    context.output.show(&done.result, || {
        let kernel = &done.result;
        if context.output.quiet { kernel.id.to_string() } else { format!("{} {}", kernel.id, kernel.release) }
    })?;
    Ok(0)
}

async fn ls(context: &Context) -> Result<u8, CliError> {
    let client = context.client().await?;
    let kernels = KernelClient::list(&client).await?;
    context.output.show(&kernels, || {
        if context.output.quiet {
            return kernels.iter().map(|kernel| format!("{}\n", kernel.id)).collect();
        }
        table(
            ["ID", "RELEASE", "SOURCE", "DEFAULT", "CREATED"],
            kernels.iter().map(|kernel| {
                [
                    kernel.id.to_string(),
                    kernel.release.clone(),
                    kernel.source.clone(),
                    if kernel.default { "yes".to_owned() } else { String::new() },
                    ago(kernel.created_at),
                ]
            }),
        )
    })?;
    Ok(0)
}
