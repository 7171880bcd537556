//! `vm plugin test` and `vm plugin verify`

use std::collections::BTreeMap;

use vm_api::{ErrorKind, PluginCheck, rpc::PluginsClient};

use super::{listing::printed, source};
use crate::{context::Context, errors::CliError, progress::waiting};

pub(super) async fn test(context: &Context, source: &str) -> Result<u8, CliError> {
    let source = source::resolve(source, context.output)?;
    let client = context.client().await?;
    let checks = waiting(context.output, "trying the plugin", client.test(source)).await?;
    context.output.show(&checks, || printed(&lines(&checks, context.output.quiet)))?;
    judge(&checks, "", "docs/plugins.md says what a hook may do, and its limits")
}

pub(super) async fn verify(context: &Context, name: Option<String>) -> Result<u8, CliError> {
    let client = context.client().await?;
    let names = match name {
        Some(name) => vec![name],
        None => PluginsClient::list(&client).await?.into_iter().map(|plugin| plugin.name).collect(),
    };
    let mut all: BTreeMap<String, Vec<PluginCheck>> = BTreeMap::new();
    for name in &names {
        all.insert(name.clone(), PluginsClient::verify(&client, name.clone()).await?);
    }
    context.output.show(&all, || {
        let one = |name: &String| {
            let lines = lines(&all[name], context.output.quiet);
            if lines.is_empty() { String::new() } else { format!("{name}\n{lines}") }
        };
        printed(&names.iter().map(one).collect::<String>())
    })?;
    let failed: Vec<_> = names.iter().filter(|name| all[*name].iter().any(|check| !check.ok)).collect();
    let hint = match failed.as_slice() {
        [one] => {
            let again = match PluginsClient::get(&client, (*one).clone()).await {
                Ok(plugin) => format!(": vm plugin install {}", plugin.source),
                // What was found is told all the same.
                Err(_) => " from where it came from".to_owned(),
            };
            format!("install it again{again}; or remove it: vm plugin remove {one}")
        }
        _ => "install them again from where they came from (vm plugin show NAME), or remove them".to_owned(),
    };
    let whose = failed.into_iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    let checks: Vec<_> = all.values().flatten().cloned().collect();
    judge(&checks, &format!(": {whose}"), &hint)
}

/// A line for each; with `quiet` only for those that failed.
fn lines(checks: &[PluginCheck], quiet: bool) -> String {
    let width = checks.iter().map(|check| check.check.chars().count()).max().unwrap_or(0);
    let shown = checks.iter().filter(|check| !quiet || !check.ok);
    let line = |check: &PluginCheck| {
        let mark = if check.ok { "ok    " } else { "FAILED" };
        let detail = check.detail.trim_end().replace('\n', &format!("\n{:1$}", "", width + 12));
        let line = format!("  {mark}  {:width$}  {detail}", check.check);
        line.trim_end().to_owned() + "\n"
    };
    shown.map(line).collect()
}

fn judge(checks: &[PluginCheck], whose: &str, hint: &str) -> Result<u8, CliError> {
    match checks.iter().filter(|check| !check.ok).count() {
        0 => Ok(0),
        failed => Err(CliError::Partly {
            summary: format!("{failed} of {} checks failed{whose}", checks.len()),
            hint: Some(hint.to_owned()),
            kind: ErrorKind::HostFailure,
        }),
    }
}
