//! `vm plugin ls` and `vm plugin show`

use serde_json::Value;
use vm_api::{ErrorKind, HookCalls, PluginInfo, PluginState, PluginSummary, Problem, rpc::PluginsClient};

use super::consent;
use crate::{
    context::Context,
    errors::CliError,
    output::{ago, facts, for_stdout, table},
    size::human,
};

/// A text with an author's words in it, for stdout.
pub(super) fn printed(text: &str) -> String {
    for_stdout(text.to_owned())
}

pub(super) async fn ls(context: &Context) -> Result<u8, CliError> {
    let client = context.client().await?;
    let plugins = PluginsClient::list(&client).await?;
    context.output.show(&plugins, || {
        if context.output.quiet {
            return plugins.iter().map(|plugin| format!("{}\n", plugin.name)).collect();
        }
        printed(&list(&plugins))
    })?;
    Ok(0)
}

fn list(plugins: &[PluginSummary]) -> String {
    table(
        ["#", "NAME", "VERSION", "WORLD", "STATE", "REQUIRED", "GRANTS", "CALLS", "ERRORS", "DESCRIPTION"],
        plugins.iter().map(|plugin| {
            [
                plugin.position.map(|position| position.to_string()).unwrap_or_default(),
                plugin.name.clone(),
                plugin.version.clone(),
                plugin.world.clone(),
                plugin.state.word().to_owned(),
                if plugin.required { "yes" } else { "no" }.to_owned(),
                format!("{} of {}", plugin.granted, plugin.requested),
                plugin.calls.to_string(),
                plugin.errors.to_string(),
                plugin.description.clone(),
            ]
        }),
    )
}

pub(super) async fn show(context: &Context, name: String) -> Result<u8, CliError> {
    let client = context.client().await?;
    let plugin = PluginsClient::get(&client, name).await?;
    context.output.show(&plugin, || {
        if context.output.quiet { plugin.summary.name.clone() } else { printed(&text(&plugin)) }
    })?;
    Ok(0)
}

/// A state with its reason.
pub(super) fn state(state: &PluginState) -> String {
    match state {
        PluginState::Enabled | PluginState::Disabled => state.word().to_owned(),
        PluginState::Failed { failures, reason } => {
            format!("failed, not called any more after {failures} failures in a row: {reason}")
        }
        PluginState::Broken { reason, .. } => format!("broken: {reason}"),
    }
}

/// An error where a plugin is enabled and cannot be loaded.
pub(super) fn unless_broken(state: &PluginState) -> Result<(), CliError> {
    match state {
        PluginState::Broken { reason, hint } => {
            Err(Problem { kind: ErrorKind::PluginFailed, message: reason.clone(), hint: hint.clone() }.into())
        }
        _ => Ok(()),
    }
}

fn text(plugin: &PluginInfo) -> String {
    let summary = &plugin.summary;
    let list = |names: &[String]| (!names.is_empty()).then(|| names.join(", "));
    let hint = match &summary.state {
        PluginState::Broken { hint, .. } => hint.clone(),
        PluginState::Failed { .. } => {
            Some(format!("see `vm plugin logs {0}`, then `vm plugin enable {0}`", summary.name))
        }
        _ => None,
    };
    let mut text = facts([
        ("name", Some(summary.name.clone())),
        ("version", (!summary.version.is_empty()).then(|| summary.version.clone())),
        ("description", (!summary.description.is_empty()).then(|| summary.description.clone())),
        ("state", Some(state(&summary.state))),
        ("hint", hint),
        (
            "world",
            (!summary.world.is_empty()).then(|| format!("{}, of vm:plugin {}", summary.world, plugin.wit)),
        ),
        ("hooks", list(&summary.hooks)),
        ("position", summary.position.map(|position| position.to_string())),
        (
            "required",
            Some(if summary.required { "yes: where it fails, VMs do not start" } else { "no" }.to_owned()),
        ),
        ("before", list(&plugin.before)),
        ("after", list(&plugin.after)),
        ("digest", Some(summary.digest.clone())),
        ("source", Some(plugin.source.clone())),
        ("signature", consent::signature(&plugin.source, &plugin.signature)),
        ("installed", Some(ago(plugin.installed_at))),
        (
            "files",
            Some(format!(
                "{} ({})",
                plugin.files_dir,
                list(&plugin.blobs).unwrap_or_else(|| "none".to_owned())
            )),
        ),
    ]);
    text.push_str(&config(plugin));
    let head = if plugin.grants.is_empty() { "\ngrants: asks for none\n" } else { "\ngrants:\n" };
    let mark = |grant: &vm_api::PluginGrant| if grant.granted { "granted" } else { "NOT GRANTED" };
    text.push_str(&format!("{head}{}", consent::grants(&plugin.grants, mark)));
    if !plugin.stats.is_empty() {
        text.push_str(&format!("\ncalls since it was loaded:\n{}", indent(&stats(&plugin.stats))));
    }
    if !plugin.disks.is_empty() {
        let rows = plugin.disks.iter().map(|disk| {
            let vm = disk.vm.as_ref().map_or("none, kept", |vm| vm.as_str()).to_owned();
            [disk.name.clone(), vm, human(disk.size_bytes), human(disk.used_bytes), disk.path.clone()]
        });
        text.push_str(&format!("\ndisks:\n{}", indent(&table(["NAME", "VM", "SIZE", "USED", "PATH"], rows))));
    }
    text
}

/// What is configured, a line each; what the operator gave is marked, for the rest are defaults.
fn config(plugin: &PluginInfo) -> String {
    let Some(config) = plugin.config.as_object().filter(|config| !config.is_empty()) else {
        return String::new();
    };
    let line = |(key, value): (&String, &Value)| {
        let default = if plugin.config_given.get(key).is_some() { "" } else { "  (default)" };
        format!("  {key} = {value}{default}\n")
    };
    format!("\nconfiguration:\n{}", config.iter().map(line).collect::<String>())
}

fn stats(stats: &[HookCalls]) -> String {
    table(
        ["HOOK", "CALLS", "ERRORS", "FAULTS", "MEAN", "LONGEST"],
        stats.iter().map(|hook| {
            [
                hook.hook.clone(),
                hook.calls.to_string(),
                hook.errors.to_string(),
                hook.faults.to_string(),
                micros(hook.mean_us),
                micros(hook.longest_us),
            ]
        }),
    )
}

/// A short time, e.g. `41 µs` or `1.7 ms`.
pub(super) fn micros(us: u64) -> String {
    match us {
        0..1000 => format!("{us} µs"),
        1000..1_000_000 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        _ => format!("{}.{} s", us / 1_000_000, us % 1_000_000 / 100_000),
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_times_are_told_in_the_unit_that_fits() {
        assert_eq!(micros(41), "41 µs");
        assert_eq!(micros(1_790), "1.7 ms");
        assert_eq!(micros(7_850_000), "7.8 s");
    }
}
