//! `vm plugin configure`

use std::path::PathBuf;

use clap::Args;
use serde_json::Value;
use vm_api::{ConfigOutcome, ErrorKind, PluginConfigured, Problem, rpc::PluginsClient};

use super::{
    listing::printed,
    values::{self, Config},
};
use crate::{context::Context, errors::CliError, progress::waiting};

/// Change a plugin's configuration
///
/// Says for each VM that is up whether the change is in force, waits for a restart, or was refused; refused for one VM, it is made for
/// none. Exits with 10 then.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["values", "file", "reset", "unset"]))]
pub(super) struct ConfigureArgs {
    /// Its name
    name: String,
    /// Keys to set; of a key in an object: OUTER.INNER=VALUE
    #[arg(value_name = "KEY=VALUE")]
    values: Vec<String>,
    /// Keys to give their defaults
    #[arg(long, value_name = "KEY")]
    unset: Vec<String>,
    /// Begin with this JSON file in place of what is configured
    #[arg(long, value_name = "FILE", conflicts_with = "reset")]
    file: Option<PathBuf>,
    /// Begin with nothing in place of what is configured
    #[arg(long)]
    reset: bool,
}

impl ConfigureArgs {
    pub(super) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let from_file = self.file.as_deref().map(values::file).transpose()?;
        let client = context.client().await?;
        let plugin = PluginsClient::get(&client, self.name.clone()).await?;
        let mut config = match (from_file, self.reset, plugin.config_given) {
            (Some(config), ..) => config,
            (None, false, Value::Object(given)) => given,
            (None, ..) => Config::new(),
        };
        for key in &self.unset {
            if config.remove(key).is_none() && plugin.config.get(key).is_none() {
                return Err(CliError::Usage {
                    message: format!("there is no configuration key {key:?}"),
                    hint: format!("see `vm plugin show {}`", self.name),
                });
            }
        }
        for text in &self.values {
            values::assign(&mut config, &plugin.config_schema, text)?;
        }
        let work = client.configure(self.name.clone(), Value::Object(config));
        let configured = waiting(context.output, &format!("configuring {}", self.name), work).await?;
        context.output.show(&configured, || {
            if context.output.quiet { String::new() } else { printed(&text(&self.name, &configured)) }
        })?;
        judge(&self.name, &configured)
    }
}

fn text(name: &str, configured: &PluginConfigured) -> String {
    let mut text = format!("{name}: {}\n", if configured.changed { "configured" } else { "not changed" });
    for (vm, outcome) in &configured.vms {
        let told = match outcome {
            ConfigOutcome::Applied => "applied".to_owned(),
            ConfigOutcome::NeedsRestart => format!("needs a restart: vm restart {vm}"),
            ConfigOutcome::Refused { message, hint } => format!("refused: {}", with_hint(message, hint)),
            ConfigOutcome::Failed { message, hint } => {
                format!("failed, waits for a restart: {}", with_hint(message, hint))
            }
        };
        text.push_str(&format!("  {vm}: {told}\n"));
    }
    text
}

fn with_hint(message: &str, hint: &Option<String>) -> String {
    hint.as_ref().map(|hint| format!("{message} (hint: {hint})")).unwrap_or_else(|| message.to_owned())
}

fn judge(name: &str, configured: &PluginConfigured) -> Result<u8, CliError> {
    let mut refused = configured.vms.iter().filter_map(|(vm, outcome)| match outcome {
        ConfigOutcome::Refused { hint, .. } => Some((vm, hint)),
        _ => None,
    });
    if !configured.changed {
        let (message, hint) = match refused.next() {
            Some((vm, hint)) => {
                (format!("{name} refuses this configuration for VM {vm}: nothing was changed"), hint.clone())
            }
            None => (format!("{name} was not configured"), None),
        };
        return Err(Problem { kind: ErrorKind::PluginRefused, message, hint }.into());
    }
    let failed: Vec<_> = configured
        .vms
        .iter()
        .filter(|(_, outcome)| matches!(outcome, ConfigOutcome::Failed { .. }))
        .map(|(vm, _)| vm.as_str())
        .collect();
    if failed.is_empty() {
        return Ok(0);
    }
    Err(Problem::new(
        ErrorKind::PluginFailed,
        format!("{name} failed to change what {} has", failed.join(", ")),
    )
    .hint(format!("see `vm plugin logs {name}`; a restart of the VM brings the new configuration"))
    .into())
}
