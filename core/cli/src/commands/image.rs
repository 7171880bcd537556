//! `vm image`

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;
use vm_api::{ImageRecord, ImportImage, rpc::ImageClient};

use crate::{
    context::Context,
    errors::CliError,
    operations::{OnSignal, follow},
    output::{ago, table},
    progress::PATIENCE,
    size::human,
};

/// Manage images
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List images
    #[command(visible_alias = "list")]
    Ls,
    /// Acquire an image; Ctrl-C undoes it
    Pull {
        /// For example debian:bookworm
        reference: String,
    },
    /// Make an image of a root filesystem's tarball
    Import {
        /// The tarball
        file: PathBuf,
        /// The name it gets
        reference: String,
    },
    /// Delete images that no VM uses
    #[command(visible_alias = "rm")]
    Delete {
        /// References or digests
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
}

impl ImageArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        match self.verb {
            Verb::Ls => ls(context).await,
            Verb::Pull { reference } => {
                let (client, mut interrupts) = context.client_and_interrupts().await?;
                let begun = client.pull(reference).await?;
                let image =
                    follow(&client, begun, context.output, PATIENCE, OnSignal::Cancel, &mut interrupts)
                        .await?;
                shown(context, &image.result)
            }
            Verb::Import { file, reference } => {
                let path = absolute(&file)?;
                let (client, mut interrupts) = context.client_and_interrupts().await?;
                let begun = ImageClient::import(&client, ImportImage { path, reference }).await?;
                let image =
                    follow(&client, begun, context.output, PATIENCE, OnSignal::Cancel, &mut interrupts)
                        .await?;
                shown(context, &image.result)
            }
            Verb::Delete { images } => {
                let client = context.client().await?;
                for image in &images {
                    ImageClient::delete(&client, image.clone()).await?;
                }
                let text = || images.iter().map(|image| format!("{image}\n")).collect();
                context.output.show(&json!({"deleted": images}), text)?;
                Ok(0)
            }
        }
    }
}

async fn ls(context: &Context) -> Result<u8, CliError> {
    let client = context.client().await?;
    let images = ImageClient::list(&client).await?;
    context.output.show(&images, || {
        if context.output.quiet {
            return images.iter().map(|image| format!("{}\n", name(image))).collect();
        }
        table(
            ["REFERENCE", "DIGEST", "SIZE", "USED", "SOURCE", "CREATED"],
            images.iter().map(|image| {
                [
                    image.references.join(", "),
                    image.digest.short().to_owned(),
                    human(image.size_bytes),
                    human(image.used_bytes),
                    image.source.clone(),
                    ago(image.created_at),
                ]
            }),
        )
    })?;
    Ok(0)
}

fn shown(context: &Context, image: &ImageRecord) -> Result<u8, CliError> {
    context.output.show(image, || name(image))?;
    Ok(0)
}

fn name(image: &ImageRecord) -> String {
    image.references.first().cloned().unwrap_or_else(|| image.digest.to_string())
}

/// The path as the daemon, which has another working directory, finds it.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    path.canonicalize().map_err(|source| CliError::File { path: path.to_owned(), source })
}
