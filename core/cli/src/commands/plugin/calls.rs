//! `vm plugin replay`

use clap::Args;
use serde_json::Value;
use vm_api::{ErrorKind, PluginCall, PluginReplay, rpc::PluginsClient};

use super::{
    listing::{micros, printed},
    logs::time,
};
use crate::{context::Context, errors::CliError, output::table, progress::waiting};

/// Make a recorded call again, or list those there are
///
/// A plugin without the grants clock and random answers the same as then; where it does not, both answers are shown, and the exit
/// code is 1. Changes nothing.
#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    /// The plugin's name
    name: String,
    /// The call's number [default: lists the calls, newest first]
    call: Option<u64>,
}

impl ReplayArgs {
    pub(super) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        let Some(call) = self.call else {
            let calls = client.calls(self.name).await?;
            context.output.show(&calls, || {
                if context.output.quiet {
                    return calls.iter().map(|call| format!("{}\n", call.id)).collect();
                }
                printed(&list(&calls))
            })?;
            return Ok(0);
        };
        let work = PluginsClient::replay(&client, self.name, call);
        let replay = waiting(context.output, "replaying", work).await?;
        context
            .output
            .show(&replay, || if context.output.quiet { String::new() } else { printed(&text(&replay)) })?;
        if replay.same {
            return Ok(0);
        }
        let hint = if replay.same_component {
            "it depends on something that it was not told: on memory between calls, or on the order of a hash map"
        } else {
            "another version of it was called then"
        };
        Err(CliError::Partly {
            summary: "the plugin answers otherwise than it did".to_owned(),
            hint: Some(hint.to_owned()),
            kind: ErrorKind::HostFailure,
        })
    }
}

fn list(calls: &[PluginCall]) -> String {
    table(
        ["CALL", "TIME", "HOOK", "VM", "REASON", "TOOK", "EFFECTS", "RESULT"],
        calls.iter().map(|call| {
            let result = match (&call.error, &call.not_replayable) {
                (Some(error), _) => format!("error: {}", error.lines().next().unwrap_or_default()),
                (None, Some(why)) => format!("ok; cannot be replayed: {why}"),
                (None, None) => "ok".to_owned(),
            };
            [
                call.id.to_string(),
                time(call.at_ms),
                call.hook.clone(),
                call.vm.clone().unwrap_or_default(),
                call.reason.clone(),
                micros(call.took_us),
                call.effects.to_string(),
                result,
            ]
        }),
    )
}

fn text(replay: &PluginReplay) -> String {
    let PluginCall { id, hook, vm, .. } = &replay.call;
    let of = vm.as_ref().map(|vm| format!(" for {vm}")).unwrap_or_default();
    let component = if replay.same_component { "" } else { ", of another component" };
    let pretty = |value: &Value| serde_json::to_string_pretty(value).unwrap_or_default();
    if replay.same {
        return format!("call {id}, {hook}{of}{component}: the same answer\n{}\n", pretty(&replay.replayed));
    }
    let (then, now) = (pretty(&replay.recorded), pretty(&replay.replayed));
    format!("call {id}, {hook}{of}{component}: another answer\nthen:\n{then}\nnow:\n{now}\n")
}
