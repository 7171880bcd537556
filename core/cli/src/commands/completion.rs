//! `vm completion`

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use serde_json::json;

use crate::{cli::Cli, context::Context, errors::CliError};

/// Print a completion script for a shell
///
/// For bash, for example: vm completion bash > /etc/bash_completion.d/vm
#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell
    shell: Shell,
}

impl CompletionArgs {
    pub(crate) fn run(&self, context: &Context) -> Result<u8, CliError> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "vm", &mut script);
        let script = String::from_utf8_lossy(&script).into_owned();
        let document = json!({"shell": self.shell.to_string(), "script": script});
        context.output.show(&document, || script.clone())?;
        Ok(0)
    }
}
