//! `vm kernel`

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use vm_api::{ImportKernel, KernelRecord, rpc::KernelClient};

use super::image::{absolute, file_or_address, from_here};
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
    /// Import a kernel: a distribution's package, files, or that of a bundle
    #[command(group = clap::ArgGroup::new("from").required(true).args(["distribution", "kernel", "bundle"]))]
    Import {
        /// Whose package
        distribution: Option<Distribution>,
        /// A bzImage or vmlinux
        #[arg(long, value_name = "FILE")]
        kernel: Option<PathBuf>,
        /// Its module directory, the one with modules.dep
        #[arg(long, value_name = "DIR", requires = "kernel", conflicts_with = "distribution")]
        modules: Option<PathBuf>,
        /// A bundle with a kernel, or the https address of one
        #[arg(long, value_name = "FILE|URL")]
        bundle: Option<String>,
        /// The SHA-256 that the bundle must have; an address needs it
        #[arg(long, value_name = "DIGITS", requires = "bundle")]
        sha256: Option<String>,
    },
    /// Get a kernel from a registry or an image layout
    Pull {
        /// [REGISTRY/]NAME[:TAG][@DIGEST], oci:DIR[:TAG] or oci-archive:FILE[:TAG]
        reference: String,
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
            Verb::Import { distribution, kernel, modules, bundle, sha256 } => {
                let source = match (distribution, kernel, bundle) {
                    (None, Some(kernel), _) => ImportKernel::Files {
                        kernel: absolute(&kernel)?,
                        modules: modules.as_deref().map(absolute).transpose()?,
                    },
                    (None, None, Some(bundle)) => {
                        ImportKernel::Bundle { source: file_or_address(bundle)?, sha256 }
                    }
                    // clap sees to it that there is exactly one.
                    (Some(Distribution::Debian), ..) | (None, None, None) => ImportKernel::Debian,
                };
                import(context, source).await
            }
            Verb::Pull { reference } => {
                import(context, ImportKernel::Artifact { reference: from_here(reference)? }).await
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
