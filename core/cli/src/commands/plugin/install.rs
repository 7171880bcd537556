//! `vm plugin install`

use std::collections::BTreeSet;

use clap::Args;
use jsonrpsee::core::client::Client;
use serde_json::Value;
use vm_api::{
    ErrorKind, GrantChoice, InstallPlugin, PluginInfo, PluginInspection, PluginState, Problem,
    rpc::PluginsClient,
};

use super::{consent, source, values};
use crate::{
    confirm, context::Context, errors::CliError, interrupts::Interrupts, output::printable, progress::waiting,
};

/// Install a plugin, or another version of it
///
/// Shows what it is, what it cannot do, and what it asks for with the reasons, and asks. An upgrade asks only about what is new.
/// VMs that are up keep what they have.
#[derive(Debug, Args)]
pub(super) struct InstallArgs {
    /// Its directory, a project of `vm plugin new` that was built, its plugin.toml, bundled:NAME for one that came with the
    /// daemon, oci://HOST/NAME:TAG, or oci-layout:DIR[:TAG]
    #[arg(value_name = "SOURCE")]
    source: String,
    /// What to grant, without being asked: all, none, or kinds like firewall,forwarding
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    grant: Option<Vec<String>>,
    /// Its configuration: a JSON file or one value; may be given several times
    #[arg(long, value_name = "FILE|KEY=VALUE")]
    config: Vec<String>,
    /// Do not call it until it is enabled
    #[arg(long)]
    disabled: bool,
    /// Do not ask; grants nothing
    #[arg(short, long)]
    yes: bool,
}

impl InstallArgs {
    pub(super) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let output = context.output;
        let source = source::resolve(&self.source, output)?;
        let client = context.client().await?;
        let plugin = waiting(output, "looking at the plugin", client.inspect(source.clone())).await?;
        let config = self.config(&client, &plugin).await?;
        let choice = self.grant.as_deref().map(|words| choice(&plugin, words)).transpose()?;
        if !output.json {
            output.note_plain(&consent::text(&plugin));
        }
        let mut interrupts = Interrupts::new()?;
        let grants = match choice {
            Some(choice) => choice,
            None => match self.ask(context, &plugin, &mut interrupts).await? {
                Some(choice) => choice,
                None => {
                    output.note("nothing was installed");
                    return Ok(0);
                }
            },
        };
        // An artifact's has its digest: what was shown is what is installed, whatever its tag is moved to meanwhile.
        let source = if plugin.source.starts_with("oci") { plugin.source.clone() } else { source };
        let params = InstallPlugin {
            source,
            grants,
            config,
            upgrade: plugin.installed.is_some(),
            disabled: self.disabled,
            digest: Some(plugin.digest.clone()),
            manifest_digest: Some(plugin.manifest_digest.clone()),
        };
        let stage = format!("compiling {}", plugin.name);
        let install = waiting(output, &stage, PluginsClient::install(&client, params));
        // Cancel-safe: a signal ends the verb; the daemon installs all of it or nothing.
        let installed = tokio::select! {
            installed = install => installed?,
            signal = interrupts.next() => {
                let what = "interrupted; the daemon may install it all the same: see `vm plugin ls`".to_owned();
                return Err(CliError::Interrupted { signal, what });
            }
        };
        output.show(&installed, || if output.quiet { plugin.name.clone() } else { text(&installed) })?;
        match installed.summary.state {
            PluginState::Broken { reason, hint } => {
                Err(Problem { kind: ErrorKind::PluginFailed, message: reason, hint }.into())
            }
            _ => Ok(0),
        }
    }

    /// The configuration, if one is given: over that of the version that is installed.
    async fn config(&self, client: &Client, plugin: &PluginInspection) -> Result<Option<Value>, CliError> {
        if self.config.is_empty() {
            return Ok(None);
        }
        let mut config = values::Config::new();
        if plugin.installed.is_some()
            && let Value::Object(given) = PluginsClient::get(client, plugin.name.clone()).await?.config_given
        {
            config = given;
        }
        values::add(&mut config, &plugin.config_schema, &self.config)?;
        Ok(Some(Value::Object(config)))
    }

    /// The grants that the operator agrees to; none at all where they do not agree.
    async fn ask(
        &self,
        context: &Context,
        plugin: &PluginInspection,
        interrupts: &mut Interrupts,
    ) -> Result<Option<Option<GrantChoice>>, CliError> {
        let name = &plugin.name;
        let new: BTreeSet<&str> = wanted(plugin).collect();
        let everything = (!new.is_empty()).then_some(GrantChoice::All);
        if new.is_empty() && (self.yes || plugin.installed.is_some()) {
            return Ok(Some(None));
        }
        let kinds = new.iter().copied().collect::<Vec<_>>().join(",");
        if self.yes {
            return Err(CliError::Usage {
                message: format!("{name} asks for {kinds}, and --yes grants nothing"),
                hint: format!("say --grant all, or which, e.g. --grant {kinds}; or --grant none"),
            });
        }
        if !confirm::can_ask(context.output) {
            let why = "there is no terminal, or --json is given";
            return Err(if new.is_empty() {
                CliError::Usage {
                    message: format!("cannot ask whether {name} may be installed: {why}"),
                    hint: "say --yes, or --grant none".to_owned(),
                }
            } else {
                CliError::Usage {
                    message: format!("cannot ask whether {name} is granted {kinds}: {why}"),
                    hint: format!("say --grant all, or which, e.g. --grant {kinds}"),
                }
            });
        }
        let verb = if plugin.installed.is_some() { "Upgrade" } else { "Install" };
        let question = match new.len() {
            0 => format!("{verb} {name}?"),
            _ if plugin.installed.is_some() => format!("{verb} {name} and grant what is new?"),
            _ => format!("{verb} {name} and grant all of this?"),
        };
        let agreed = confirm::ask(&printable(&question), "nothing was installed", interrupts).await?;
        Ok(agreed.then_some(everything))
    }
}

/// The kinds that are asked for and not granted yet.
fn wanted(plugin: &PluginInspection) -> impl Iterator<Item = &str> {
    plugin.grants.iter().filter(|grant| !grant.granted).map(|grant| grant.kind.as_str())
}

/// What `--grant` says.
fn choice(plugin: &PluginInspection, words: &[String]) -> Result<Option<GrantChoice>, CliError> {
    let kinds: BTreeSet<_> = plugin.grants.iter().map(|grant| grant.kind.as_str()).collect();
    match words {
        [all] if all == "all" => return Ok(Some(GrantChoice::All)),
        [none] if none == "none" => return Ok(None),
        _ => {}
    }
    match words.iter().find(|word| !kinds.contains(word.as_str())) {
        None => Ok(Some(GrantChoice::Kinds(words.to_vec()))),
        Some(word) if word == "all" || word == "none" => Err(CliError::Usage {
            message: format!("--grant {word} stands alone"),
            hint: "say --grant all, or the kinds".to_owned(),
        }),
        Some(word) => Err(CliError::Usage {
            message: format!("{} does not ask for {word:?}", plugin.name),
            hint: match kinds.len() {
                0 => "it asks for nothing: leave --grant out, or say --grant none".to_owned(),
                _ => format!("it asks for {}", kinds.into_iter().collect::<Vec<_>>().join(", ")),
            },
        }),
    }
}

fn text(plugin: &PluginInfo) -> String {
    let summary = &plugin.summary;
    let mut text = format!(
        "{} {} is installed and {}, {} of {} grants given\n",
        summary.name,
        summary.version,
        summary.state.word(),
        summary.granted,
        summary.requested
    );
    let refused: Vec<_> =
        plugin.grants.iter().filter(|grant| !grant.granted).map(|grant| grant.kind.as_str()).collect();
    if !refused.is_empty() {
        text.push_str(&format!("not granted: {}; what needs it fails\n", refused.join(", ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugin(kinds: &[&str]) -> PluginInspection {
        let grants = kinds.iter().enumerate().map(|(index, kind)| {
            serde_json::json!({
                "index": index, "kind": kind, "detail": "", "reason": "r", "granted": false, "grant": {"kind": kind},
            })
        });
        serde_json::from_value(serde_json::json!({
            "name": "p", "version": "1.0.0", "description": "", "world": "capability", "wit": "0.1.0",
            "required": false, "before": [], "after": [], "digest": "sha256:1", "manifest_digest": "sha256:2",
            "component_bytes": 1, "grants": grants.collect::<Vec<_>>(), "config_schema": {}, "installed": null,
            "source": "/p",
        }))
        .unwrap()
    }

    #[test]
    fn a_choice_is_all_none_or_of_what_is_asked_for() {
        let words = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        let of = |text| choice(&plugin(&["disk", "drive"]), &words(text));
        assert_eq!(of("all").unwrap(), Some(GrantChoice::All));
        assert_eq!(of("none").unwrap(), None);
        assert_eq!(of("drive").unwrap(), Some(GrantChoice::Kinds(vec!["drive".to_owned()])));
        assert!(of("all,drive").unwrap_err().to_string().contains("stands alone"));
        let error = of("firewall").unwrap_err();
        assert!(error.to_string().contains("firewall") && error.hint().unwrap().contains("disk, drive"));
        let error = choice(&plugin(&[]), &words("disk")).unwrap_err();
        assert!(error.hint().unwrap().contains("asks for nothing"));
    }
}
