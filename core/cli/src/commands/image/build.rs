//! `vm image build`

use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use vm_api::{BuildImage, MadeImage, rpc::ImageClient};

use super::{absolute, called};
use crate::{
    context::Context,
    errors::CliError,
    operations::{OnSignal, listen},
    size,
};

/// Build an image by a Dockerfile; Ctrl-C undoes it
///
/// Commands run as in a VM of the image so far, and what they write is shown on stderr. A step that was done before, with the same
/// files and upon the same layers, is not done again.
#[derive(Debug, Args)]
pub(super) struct BuildArgs {
    /// Where files are copied from
    directory: PathBuf,
    /// The Dockerfile [default: DIRECTORY/Dockerfile]
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// A name that the image gets; may be given again
    #[arg(short, long = "tag", value_name = "NAME")]
    tags: Vec<String>,
    /// The value of an ARG; without one, that of our own variable of this name
    #[arg(long = "build-arg", value_name = "NAME[=VALUE]")]
    arguments: Vec<String>,
    /// The stage to build [default: the last one]
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Do each step anew
    #[arg(long)]
    no_cache: bool,
    /// CPUs of the VM that commands run in
    #[arg(long)]
    cpus: Option<u32>,
    /// Its memory, e.g. 2G
    #[arg(long, value_name = "SIZE", value_parser = size::memory_mib)]
    memory: Option<u64>,
}

impl BuildArgs {
    pub(super) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let directory = absolute(&self.directory)?;
        let file = absolute(&self.file.unwrap_or_else(|| directory.join("Dockerfile")))?;
        let params = BuildImage {
            directory,
            file,
            references: self.tags.clone(),
            arguments: arguments(&self.arguments)?,
            target: self.target,
            no_cache: self.no_cache,
            cpus: self.cpus,
            memory_mib: self.memory,
        };
        let (client, mut interrupts) = context.client_and_interrupts().await?;
        let begun = client.build(params).await?;
        let done = listen(&client, begun, context.output, OnSignal::CancelAsOurs, &mut interrupts).await?;
        let made: MadeImage = done.result;
        for warning in &made.warnings {
            context.output.note(&format!("warning: {warning}"));
        }
        let asked = self.tags.first().map(String::as_str);
        context.output.show(&made, || match asked {
            Some(asked) => called(&made.image, Some(asked)),
            None => made.image.digest.to_string(),
        })?;
        Ok(0)
    }
}

fn arguments(given: &[String]) -> Result<BTreeMap<String, String>, CliError> {
    let mut arguments = BTreeMap::new();
    for text in given {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, value.to_owned()),
            None => match std::env::var(text) {
                Ok(value) => (text.as_str(), value),
                // As if it had not been given.
                Err(_) => continue,
            },
        };
        if name.is_empty() {
            return Err(CliError::Usage {
                message: format!("{text:?} is no NAME=VALUE"),
                hint: "write --build-arg VERSION=1.2".into(),
            });
        }
        arguments.insert(name.to_owned(), value);
    }
    Ok(arguments)
}
