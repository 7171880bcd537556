//! `vm logs`

use std::io::IsTerminal;

use clap::Args;
use vm_api::rpc::VmClient;

use crate::{
    context::Context,
    errors::{CliError, signalled},
    interrupts::Interrupts,
    size,
};

/// Show a VM's console
///
/// With --json and --follow, one JSON document a line.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Name or id
    name: String,
    /// Go on with what comes, until the VM is off
    #[arg(short, long)]
    follow: bool,
    /// How much of its end, e.g. 4096 or 1M
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = size::bytes)]
    bytes: u64,
}

impl LogsArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        if !self.follow {
            let chunk = client.console(self.name, self.bytes).await?;
            context.output.show(&chunk, || shown(&chunk.text))?;
            return Ok(0);
        }
        let mut interrupts = Interrupts::new()?;
        let mut chunks = client.console_follow(self.name, self.bytes).await?;
        loop {
            // Both branches are cancel-safe: a chunk or signal that was not taken is kept by its queue.
            tokio::select! {
                chunk = chunks.next() => match chunk {
                    Some(Ok(chunk)) => {
                        if context.output.json {
                            context.output.line(&chunk)?;
                        } else {
                            context.output.raw(shown(&chunk.text).as_bytes())?;
                        }
                        if chunk.end {
                            return Ok(0);
                        }
                    }
                    Some(Err(source)) => return Err(CliError::Answer { source }),
                    None => return Ok(0),
                },
                signal = interrupts.next() => return Ok(signalled(signal)),
            }
        }
    }
}

/// A guest may write what it likes to its console, but what it likes must not drive the reader's terminal: there, control
/// characters other than line ends and tabs are left out. A file or pipe gets everything.
fn shown(text: &str) -> String {
    if std::io::stdout().is_terminal() {
        text.chars().filter(|c| matches!(c, '\n' | '\t') || !c.is_control()).collect()
    } else {
        text.to_owned()
    }
}
