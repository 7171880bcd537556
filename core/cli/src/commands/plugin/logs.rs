//! `vm plugin logs`

use std::time::{Duration, SystemTime};

use clap::Args;
use vm_api::{ErrorKind, PluginLogLine, Problem, rpc::PluginsClient};

use super::listing::printed;
use crate::{
    context::Context,
    errors::{CliError, signalled},
    interrupts::Interrupts,
    output::Output,
};

/// Show a plugin's messages
///
/// The last ones since the daemon began, oldest first: time (UTC), level, hook, message. With --json, one JSON document a line.
#[derive(Debug, Args)]
pub(super) struct LogsArgs {
    /// Its name
    name: String,
    /// Go on with what comes, until the plugin is gone
    #[arg(short, long)]
    follow: bool,
    /// How many of the last
    #[arg(short = 'n', long, value_name = "N", default_value_t = 200)]
    lines: usize,
}

impl LogsArgs {
    pub(super) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        if !self.follow {
            for line in PluginsClient::logs(&client, self.name, self.lines).await? {
                show(context.output, &line)?;
            }
            return Ok(0);
        }
        let mut interrupts = Interrupts::new()?;
        let mut lines = PluginsClient::logs_follow(&client, self.name, self.lines).await?;
        loop {
            // Both branches are cancel-safe: a line or signal that was not taken is kept by its queue.
            tokio::select! {
                line = lines.next() => match line {
                    Some(Ok(line)) => show(context.output, &line)?,
                    Some(Err(source)) => return Err(CliError::Answer { source }),
                    None if client.is_connected() => return Ok(0),
                    None => {
                        let problem = Problem::new(ErrorKind::ShuttingDown, "the daemon has ended");
                        return Err(problem.hint("`vm daemon start` starts it").into());
                    }
                },
                signal = interrupts.next() => return Ok(signalled(signal)),
            }
        }
    }
}

fn show(output: Output, line: &PluginLogLine) -> Result<(), CliError> {
    if output.json { output.line(line) } else { output.raw(printed(&text(line)).as_bytes()) }
}

/// Milliseconds since the Unix epoch, as people read them.
pub(super) fn time(ms: u64) -> String {
    humantime::format_rfc3339_millis(SystemTime::UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}

/// A message on a line; further lines of it are indented.
fn text(line: &PluginLogLine) -> String {
    let message = line.message.trim_end().replace('\n', "\n    ");
    format!("{}  {:<5}  {:<18} {message}\n", time(line.at_ms), line.level, line.hook)
}
