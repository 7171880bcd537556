//! `vm plugin`

mod calls;
mod checks;
mod configure;
mod consent;
mod install;
mod listing;
mod logs;
mod new;
mod pack;
mod source;
mod values;

use std::collections::BTreeSet;

use clap::{Args, Subcommand};
use serde_json::json;
use vm_api::{PluginDisk, PluginInfo, rpc::PluginsClient};

use crate::{context::Context, errors::CliError, progress::waiting, size::human};

/// Manage plugins: components that decide what happens around VMs
#[derive(Debug, Args)]
pub(crate) struct PluginArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    New(new::NewArgs),
    /// Try a plugin without installing it: loads it, calls its hooks
    ///
    /// Checks that its hooks answer, twice the same, and within the limits. Changes nothing. Exits with 1 if a check failed.
    Test {
        /// As of vm plugin install
        #[arg(value_name = "SOURCE")]
        source: String,
    },
    Pack(pack::PackArgs),
    Install(install::InstallArgs),
    /// List plugins, in the order in which they are called
    #[command(visible_alias = "list")]
    Ls,
    /// Show all about a plugin
    Show {
        /// Its name
        name: String,
    },
    Configure(configure::ConfigureArgs),
    /// Call a plugin from now on; also one that had failed too often
    Enable {
        /// Its name
        name: String,
    },
    /// Call a plugin no more; VMs that are up keep what they have
    Disable {
        /// Its name
        name: String,
    },
    /// Show or change the order in which plugins are called
    Order {
        /// Those that come first, in this order; none shows the order in force
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// By their names again, and what their manifests say
        #[arg(long, conflicts_with = "names")]
        reset: bool,
    },
    Logs(logs::LogsArgs),
    Replay(calls::ReplayArgs),
    /// Compare what is installed with what was recorded then
    ///
    /// Exits with 1 if something differs.
    Verify {
        /// Its name [default: all]
        name: Option<String>,
    },
    /// Remove a plugin, and what it planned and is not in use
    #[command(visible_alias = "rm")]
    Remove {
        /// Its name
        name: String,
        /// Delete the disks it keeps, and the files that were put beside it, too; also after it was removed
        #[arg(long)]
        purge: bool,
    },
}

impl PluginArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        match self.verb {
            Verb::New(args) => args.run(context),
            Verb::Test { source } => checks::test(context, &source).await,
            Verb::Pack(args) => args.run(context),
            Verb::Install(args) => args.run(context).await,
            Verb::Ls => listing::ls(context).await,
            Verb::Show { name } => listing::show(context, name).await,
            Verb::Configure(args) => args.run(context).await,
            Verb::Enable { name } => {
                let client = context.client().await?;
                let stage = format!("loading {name}");
                let plugin = waiting(context.output, &stage, client.enable(name)).await?;
                changed(context, &plugin)
            }
            Verb::Disable { name } => {
                let client = context.client().await?;
                let plugin = client.disable(name).await?;
                changed(context, &plugin)
            }
            Verb::Order { names, reset } => order(context, names, reset).await,
            Verb::Logs(args) => args.run(context).await,
            Verb::Replay(args) => args.run(context).await,
            Verb::Verify { name } => checks::verify(context, name).await,
            Verb::Remove { name, purge } => remove(context, name, purge).await,
        }
    }
}

fn changed(context: &Context, plugin: &PluginInfo) -> Result<u8, CliError> {
    let summary = &plugin.summary;
    context.output.show(plugin, || {
        if context.output.quiet {
            summary.name.clone()
        } else {
            listing::printed(&format!("{} is {}", summary.name, listing::state(&summary.state)))
        }
    })?;
    listing::unless_broken(&summary.state)?;
    Ok(0)
}

async fn order(context: &Context, names: Vec<String>, reset: bool) -> Result<u8, CliError> {
    let client = context.client().await?;
    let order = if names.is_empty() && !reset {
        let all = PluginsClient::list(&client).await?;
        all.into_iter().filter(|plugin| plugin.position.is_some()).map(|plugin| plugin.name).collect()
    } else {
        client.order(names).await?
    };
    context.output.show(&order, || order.iter().map(|name| format!("{name}\n")).collect())?;
    Ok(0)
}

async fn remove(context: &Context, name: String, purge: bool) -> Result<u8, CliError> {
    let client = context.client().await?;
    let plugin = match PluginsClient::get(&client, name.clone()).await {
        Ok(plugin) => Some(plugin),
        // It may be one that was removed before: the daemon finds what that has left.
        Err(_) if purge => None,
        Err(error) => return Err(error.into()),
    };
    client.remove(name.clone(), purge).await?;
    let disks = plugin.as_ref().map(|plugin| plugin.disks.as_slice()).unwrap_or_default();
    let document = json!({"removed": name, "purged": purge, "disks": disks});
    context.output.show(&document, || name.clone())?;
    if !context.output.json {
        match &plugin {
            Some(plugin) => left(plugin, purge).into_iter().for_each(|text| context.output.note(&text)),
            None => context.output.note("it was removed before; what it had left is deleted"),
        }
    }
    Ok(0)
}

/// What became of the disks, where there are any: those of VMs stay with them, the others until a person deletes them.
fn left(plugin: &PluginInfo, purged: bool) -> Vec<String> {
    let (of_vms, kept): (Vec<_>, Vec<_>) = plugin.disks.iter().partition(|disk| disk.vm.is_some());
    let count = |disks: &[&PluginDisk]| match disks.len() {
        1 => "1 disk".to_owned(),
        count => format!("{count} disks"),
    };
    let mut left = Vec::new();
    if !kept.is_empty() {
        let (count, bytes) = (count(&kept), human(kept.iter().map(|disk| disk.used_bytes).sum()));
        let paths: String = kept.iter().map(|disk| format!("\n  {}", disk.path)).collect();
        left.push(match purged {
            true => format!("{count} deleted, {bytes} freed"),
            false => {
                let name = &plugin.summary.name;
                format!("{count} kept, with {bytes}; `vm plugin remove {name} --purge` deletes what is kept:{paths}")
            }
        });
    }
    if !of_vms.is_empty() {
        let vms: BTreeSet<_> =
            of_vms.iter().filter_map(|disk| disk.vm.as_ref()).map(|vm| vm.as_str()).collect();
        let vms: Vec<_> = vms.into_iter().collect();
        left.push(format!("{} until the VM is deleted: {}", count(&of_vms), vms.join(", ")));
    }
    left
}
