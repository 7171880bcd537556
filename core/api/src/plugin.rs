//! What requests and answers about plugins hold.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_types::VmName;
pub use vm_types::plugin::{Finding as PluginFinding, Severity as PluginSeverity};

/// Whether a plugin is called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum PluginState {
    /// It is.
    Enabled,
    /// Somebody disabled it.
    Disabled,
    /// It failed too often, and is not called until somebody enables it.
    Failed {
        /// Failures in a row.
        failures: u32,
        /// The last one.
        reason: String,
    },
    /// It is enabled and cannot be loaded.
    Broken {
        /// Why.
        reason: String,
        /// What to do.
        hint: Option<String>,
    },
}

impl PluginState {
    /// The word in `state`.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Enabled => "enabled",
            Self::Disabled => "disabled",
            Self::Failed { .. } => "failed",
            Self::Broken { .. } => "broken",
        }
    }
}

/// An installed plugin, as a list has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PluginSummary {
    /// Unique on the host.
    pub name: String,
    /// The plugin's own version; empty where its manifest cannot be read.
    pub version: String,
    /// For people, one line.
    pub description: String,
    /// `capability`, `dns` or `workspace-importer`; empty where its manifest cannot be read.
    pub world: String,
    /// Of the component, `sha256:…`.
    pub digest: String,
    /// Whether it is called.
    #[serde(flatten)]
    pub state: PluginState,
    /// Whether a start fails when it does.
    pub required: bool,
    /// Its place among those that are called, counted from 1.
    pub position: Option<usize>,
    /// The hooks it has, in the order of a VM's life; empty unless it is loaded.
    pub hooks: Vec<String>,
    /// How many grants it asks for.
    pub requested: usize,
    /// How many of them it has.
    pub granted: usize,
    /// Calls of all hooks since it was loaded.
    pub calls: u64,
    /// Those of them that gave an error.
    pub errors: u64,
}

/// Whether somebody whom the operator trusts has signed a plugin.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum PluginSignature {
    /// The holder of a trusted key has.
    Trusted {
        /// File of the public key on the daemon's host, as the configuration names it.
        key: String,
        /// `sha256:…` of the key itself (its SubjectPublicKeyInfo), whatever file it is in.
        fingerprint: String,
    },
    /// It has signatures, and none of them is good.
    Untrusted {
        /// Why not, for people.
        reason: String,
    },
    /// It has none; only artifacts can have one.
    Unsigned,
    /// Nobody has looked: the configuration names no key.
    #[default]
    Unchecked,
}

/// A grant that a plugin asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PluginGrant {
    /// Its place in the manifest, counted from 0.
    pub index: usize,
    /// Its kind, e.g. `firewall`.
    pub kind: String,
    /// All of it but kind and reason, for people: `chains = ["forward"]`; empty where there is no more.
    pub detail: String,
    /// Why, in its author's words.
    pub reason: String,
    /// Whether the operator has granted it; for a plugin that is not installed yet, whether the installed version has it.
    pub granted: bool,
    /// The same as data, as the manifest has it.
    pub grant: Value,
}

/// Calls of one hook since the plugin was loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HookCalls {
    /// Which.
    pub hook: String,
    /// All.
    pub calls: u64,
    /// Those that gave an error of any kind.
    pub errors: u64,
    /// Those of them that were faults: traps, limits, time-outs.
    pub faults: u64,
    /// Mean duration in microseconds.
    pub mean_us: u64,
    /// The longest in microseconds.
    pub longest_us: u64,
}

/// A disk of a plugin's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PluginDisk {
    /// The plugin's name for it.
    pub name: String,
    /// The VM it goes with, by name; none where a person has to remove it.
    pub vm: Option<VmName>,
    /// Absolute path on the daemon's host.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// What it takes on the host.
    pub used_bytes: u64,
}

/// An installed plugin, with all there is to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PluginInfo {
    /// As a list has it.
    #[serde(flatten)]
    pub summary: PluginSummary,
    /// The version of `vm:plugin` it was made with.
    pub wit: String,
    /// Where it was installed from.
    pub source: String,
    /// Who has signed it, by what was known when it was installed.
    #[serde(default)]
    pub signature: PluginSignature,
    /// When, seconds since the Unix epoch.
    pub installed_at: u64,
    /// Plugins that come after it.
    pub before: Vec<String>,
    /// Plugins that come before it.
    pub after: Vec<String>,
    /// What it asks for.
    pub grants: Vec<PluginGrant>,
    /// Its configuration in force, defaults filled in; as it was given where the plugin cannot be loaded.
    pub config: Value,
    /// What the operator gave of it.
    pub config_given: Value,
    /// JSON Schema of it.
    pub config_schema: Value,
    /// Its calls.
    pub stats: Vec<HookCalls>,
    /// Its disks, also those that outlived their VMs.
    pub disks: Vec<PluginDisk>,
    /// Names of its blobs: files that came with it or that the operator put into its `files` directory.
    pub blobs: Vec<String>,
    /// Absolute path of that directory on the daemon's host.
    pub files_dir: String,
}

/// What an installation would bring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PluginInspection {
    /// Its name.
    pub name: String,
    /// Its own version.
    pub version: String,
    /// For people, one line.
    pub description: String,
    /// `capability`, `dns` or `workspace-importer`.
    pub world: String,
    /// The version of `vm:plugin` it was made with.
    pub wit: String,
    /// Whether a start fails when it does.
    pub required: bool,
    /// Plugins that come after it.
    pub before: Vec<String>,
    /// Plugins that come before it.
    pub after: Vec<String>,
    /// Of the component, `sha256:…`. Handed to the installation, it makes sure that what was shown is what is installed.
    pub digest: String,
    /// Of the manifest, `sha256:…`.
    pub manifest_digest: String,
    /// The component's size.
    pub component_bytes: u64,
    /// What it asks for; `granted` where the installed version has it already, so that only the others need be asked about.
    pub grants: Vec<PluginGrant>,
    /// JSON Schema of its configuration.
    pub config_schema: Value,
    /// The version that is installed, if one is.
    pub installed: Option<InstalledVersion>,
    /// Where it comes from.
    pub source: String,
    /// Who has signed it.
    #[serde(default)]
    pub signature: PluginSignature,
}

/// A version that is installed already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InstalledVersion {
    /// Which.
    pub version: String,
    /// Of its component.
    pub digest: String,
}

/// Which of the requested grants to give.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GrantChoice {
    /// All that the manifest asks for.
    All,
    /// Those at these places, see [`PluginGrant::index`].
    Indices(Vec<usize>),
    /// Those of these kinds, see [`PluginGrant::kind`].
    Kinds(Vec<String>),
}

/// A plugin to install.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InstallPlugin {
    /// Absolute path of its directory or of its `plugin.toml` on the daemon's host, or `bundled:NAME` of one that came with the
    /// daemon.
    pub source: String,
    /// What to grant, beside what an installed version has already; nothing if absent.
    pub grants: Option<GrantChoice>,
    /// Its configuration; if absent the installed version's, or none.
    pub config: Option<Value>,
    /// Whether it may take the place of an installed version.
    pub upgrade: bool,
    /// Do not call it until it is enabled.
    pub disabled: bool,
    /// Refuse it unless its component has this digest.
    pub digest: Option<String>,
    /// Refuse it unless its manifest has this digest.
    pub manifest_digest: Option<String>,
}

/// What became of a configuration, for one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ConfigOutcome {
    /// In force.
    Applied,
    /// In force after the VM's next start.
    NeedsRestart,
    /// The plugin says that it must not be.
    Refused {
        /// Why.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The plugin could not tell, or what it planned could not be done; in force after the VM's next start.
    Failed {
        /// Why.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
}

/// The result of a change of a plugin's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PluginConfigured {
    /// Whether the new configuration is the plugin's now. It is not if it was refused for any VM.
    pub changed: bool,
    /// The configuration that is now in force, defaults filled in.
    pub config: Value,
    /// For each VM that is up.
    pub vms: BTreeMap<VmName, ConfigOutcome>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PluginCheck {
    /// What.
    pub check: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found.
    pub detail: String,
}

/// A message of a plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PluginLogLine {
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// In which hook.
    pub hook: String,
    /// `debug`, `info`, `warn` or `error`.
    pub level: String,
    /// What. The plugin's own words; control characters are replaced.
    pub message: String,
}

/// A call that was recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PluginCall {
    /// To replay it. Unique to the plugin.
    pub id: u64,
    /// Which hook.
    pub hook: String,
    /// Why it was called, e.g. `start`.
    pub reason: String,
    /// For which VM.
    pub vm: Option<String>,
    /// When, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
    /// How many effects it planned.
    pub effects: usize,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// Why it cannot be replayed, if it cannot.
    pub not_replayable: Option<String>,
    /// The digest of the component that was called.
    pub digest: String,
}

/// What came of a replay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PluginReplay {
    /// What was replayed.
    pub call: PluginCall,
    /// Whether the outcome is the same.
    pub same: bool,
    /// Whether it was the same component.
    pub same_component: bool,
    /// The outcome then: plan, findings, change, changes of state; or the error.
    pub recorded: Value,
    /// The outcome now.
    pub replayed: Value,
}

/// Effects that one hook of one plugin planned for a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HookPlan {
    /// The plugin.
    pub plugin: String,
    /// The hook.
    pub hook: String,
    /// What it planned, in order.
    pub effects: Vec<PlannedEffect>,
    /// What it had to say.
    pub findings: Vec<PluginFinding>,
}

/// One effect that was planned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedEffect {
    /// What sort, e.g. `firewall-rule`.
    pub kind: String,
    /// For people, one line.
    pub summary: String,
    /// All of it; content is given by length and digest.
    pub detail: Value,
}

/// A hook that gave nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HookFailed {
    /// The plugin.
    pub plugin: String,
    /// The hook.
    pub hook: String,
    /// Whether a start would fail by it.
    pub required: bool,
    /// Why.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// What a start of a VM would do by its plugins. Nothing of it has happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmPlan {
    /// The VM.
    pub vm: VmName,
    /// By hook and then by plugin, in the order they are called.
    pub plugins: Vec<HookPlan>,
    /// Hooks that failed.
    pub failures: Vec<HookFailed>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_choice_of_grants_reads_as_a_person_would_write_it() {
        let read = |value| serde_json::from_value::<GrantChoice>(value).unwrap();
        assert_eq!(read(json!("all")), GrantChoice::All);
        assert_eq!(read(json!({ "indices": [0, 2] })), GrantChoice::Indices(vec![0, 2]));
        assert_eq!(read(json!({ "kinds": ["disk"] })), GrantChoice::Kinds(vec!["disk".into()]));
    }

    #[test]
    fn a_state_is_a_word_with_its_reason_beside_it() {
        for state in [
            PluginState::Enabled,
            PluginState::Disabled,
            PluginState::Failed { failures: 5, reason: "trap".into() },
            PluginState::Broken { reason: "gone".into(), hint: None },
        ] {
            let value = serde_json::to_value(&state).unwrap();
            assert_eq!(value["state"], state.word());
            assert_eq!(serde_json::from_value::<PluginState>(value).unwrap(), state);
        }
    }
}
