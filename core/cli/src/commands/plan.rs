//! `vm plan`

use std::collections::BTreeSet;

use clap::{Args, Subcommand};
use vm_api::{ErrorKind, HookFailed, HookPlan, PluginSeverity, Problem, VmName, VmPlan, rpc::VmClient};

use super::machine::MachineArgs;
use crate::{context::Context, errors::CliError, output::for_stdout, progress::waiting};

/// Show what plugins would do, without doing it
///
/// Prints each effect that a start of a VM would have by its plugins, grouped by plugin. Changes nothing. Exits with 10 where a
/// plugin would refuse the start, or where one that is required fails.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Of a VM that is not made yet, made and started with these options
    Create(Box<CreateArgs>),
    /// Of a VM that there is
    Start {
        /// Name or id
        #[arg(value_name = "VM")]
        name: String,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// Name of the VM, as --name
    #[arg(value_name = "NAME", conflicts_with = "name")]
    vm_name: Option<VmName>,
    #[command(flatten)]
    machine: MachineArgs,
}

impl PlanArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        let (plan, stage) = match self.verb {
            Verb::Create(args) => {
                let CreateArgs { vm_name, mut machine } = *args;
                machine.name = machine.name.or(vm_name);
                let work = client.plan_create(machine.into_request(false, true));
                (waiting(context.output, "asking the plugins", work).await?, "made and started")
            }
            Verb::Start { name } => {
                (waiting(context.output, "asking the plugins", client.plan(name)).await?, "started")
            }
        };
        context.output.show(&plan, || for_stdout(text(&plan, stage, context.output.quiet)))?;
        match refusal(&plan) {
            None => Ok(0),
            Some(problem) => Err(problem.into()),
        }
    }
}

/// Why a start would end before it began: as it would be told then.
fn refusal(plan: &VmPlan) -> Option<Problem> {
    let refused = plan.plugins.iter().find_map(|planned| {
        let failure = |finding: &&vm_api::PluginFinding| finding.severity == PluginSeverity::Failure;
        let finding = planned.findings.iter().find(failure).filter(|_| planned.hook == "preflight")?;
        let message = format!("plugin {} would refuse VM {}: {}", planned.plugin, plan.vm, finding.message);
        Some(Problem { kind: ErrorKind::PluginRefused, message, hint: finding.hint.clone() })
    });
    let failed = || {
        let failure = plan.failures.iter().find(|failure| failure.required)?;
        let message = format!("the start of VM {} would fail: {}", plan.vm, failure.message);
        Some(Problem { kind: ErrorKind::PluginFailed, message, hint: failure.hint.clone() })
    };
    refused.or_else(failed)
}

fn text(plan: &VmPlan, stage: &str, quiet: bool) -> String {
    let mut seen = BTreeSet::new();
    let planned = plan.plugins.iter().map(|planned| planned.plugin.as_str());
    let failed = plan.failures.iter().map(|failure| failure.plugin.as_str());
    let plugins: Vec<_> = planned.chain(failed).filter(|plugin| seen.insert(*plugin)).collect();
    let mut text: String = plugins.iter().map(|plugin| of_plugin(plan, plugin, quiet)).collect();
    if quiet {
        return text;
    }
    let effects = plan.plugins.iter().map(|planned| planned.effects.len()).sum::<usize>();
    let (effects, acting) = (count(effects, "effect"), acting(plan));
    let head = match plugins.is_empty() {
        true => format!("VM {}: plugins would do nothing when it is {stage}\n", plan.vm),
        false => format!(
            "VM {}: {effects} of {} when it is {stage}; nothing of it was done\n\n",
            plan.vm,
            count(acting, "plugin")
        ),
    };
    text.insert_str(0, &head);
    text
}

/// How many plugins have effects.
fn acting(plan: &VmPlan) -> usize {
    let with = plan.plugins.iter().filter(|planned| !planned.effects.is_empty());
    with.map(|planned| planned.plugin.as_str()).collect::<BTreeSet<_>>().len()
}

fn count(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Its name, then a line for each effect, finding and failure.
fn of_plugin(plan: &VmPlan, plugin: &str, quiet: bool) -> String {
    let planned: Vec<&HookPlan> = plan.plugins.iter().filter(|planned| planned.plugin == plugin).collect();
    let failures: Vec<&HookFailed> =
        plan.failures.iter().filter(|failure| failure.plugin == plugin).collect();
    let hooks = planned.iter().map(|planned| planned.hook.len()).chain(failures.iter().map(|f| f.hook.len()));
    let hook_width = hooks.max().unwrap_or(0);
    let kinds = planned.iter().flat_map(|planned| &planned.effects).map(|effect| effect.kind.len());
    let kind_width = kinds.max().unwrap_or(0).max("refuses".len());
    let line = |hook: &str, kind: &str, what: &str, hint: Option<&String>| {
        let hint = hint.map(|hint| format!(" (hint: {hint})")).unwrap_or_default();
        let what = format!("{what}{hint}").replace('\n', " ");
        format!("  {hook:hook_width$}  {kind:kind_width$}  {what}\n")
    };
    let mut text = String::new();
    for planned in planned {
        for finding in &planned.findings {
            let word = match finding.severity {
                PluginSeverity::Ok if quiet => continue,
                PluginSeverity::Ok => "ok",
                PluginSeverity::Warning => "warns",
                PluginSeverity::Failure => "refuses",
            };
            let what = format!("{}: {}", finding.subject, finding.message);
            text.push_str(&line(&planned.hook, word, &what, finding.hint.as_ref()));
        }
        for effect in &planned.effects {
            text.push_str(&line(&planned.hook, &effect.kind, &effect.summary, None));
        }
    }
    for failure in failures {
        let word = if failure.required { "fails" } else { "is left out" };
        text.push_str(&line(&failure.hook, word, &failure.message, failure.hint.as_ref()));
    }
    if text.is_empty() {
        return String::new();
    }
    format!("{plugin}\n{text}")
}
