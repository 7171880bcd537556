//! What goes into a call and what comes out of it, as plain data.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
pub use vm_types::plugin::{Change, Finding, Severity, VmFacts};

use crate::{
    plan::{Plan, RefName},
    ports::{Blob, Progress, Repository, Sandbox, StateChange},
};

/// What an importer is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Of those offered.
    pub strategy: String,
    /// Absolute path in the guest.
    pub destination: String,
    /// The guest's user.
    pub user: String,
    /// That user's number.
    #[serde(default)]
    pub uid: u32,
    /// That user's group.
    #[serde(default)]
    pub gid: u32,
    /// What is at the destination may be thrown away.
    #[serde(default)]
    pub replace: bool,
}

/// All that a component can learn in one call. The same input gives the same outcome.
#[derive(Clone, Default)]
pub struct Input {
    /// Why: `create`, `start`, `stopped`, `deleted`, `start-failed`, `plugin-removed`, …
    pub reason: String,
    /// The VM, for all hooks but doctor.
    pub vm: Option<VmFacts>,
    /// Facts of the host.
    pub facts: Arc<BTreeMap<String, String>>,
    /// Values of what was applied before.
    pub references: BTreeMap<RefName, String>,
    /// Files that came with the plugin or that its configuration names.
    pub blobs: BTreeMap<String, Arc<dyn Blob>>,
    /// A configuration in place of the plugin's own: the new one of a change. Checked by [`crate::Plugin::check_config`].
    pub config: Option<serde_json::Value>,
    /// The configuration before a change.
    pub former_config: Option<serde_json::Value>,
    /// The running guest.
    pub sandbox: Option<Arc<dyn Sandbox>>,
    /// The repository of a workspace.
    pub repository: Option<Arc<dyn Repository>>,
    /// What an importer is to do.
    pub job: Option<Job>,
    /// Who waits for what an importer does.
    pub progress: Option<Arc<dyn Progress>>,
    /// How long the call may take in all, in place of what [`crate::Limits`] say.
    pub time_limit: Option<Duration>,
    /// The time of the call, for those with the grant.
    pub now_unix_ms: u64,
    /// The seed of random bytes, for those with the grant.
    pub seed: [u8; 32],
    /// Whether changes of the plugin's state are thrown away: a plan only, or a replay.
    pub dry_run: bool,
}

/// A way in which an importer could do it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Its name.
    pub strategy: String,
    /// 0 to 100.
    pub score: u32,
    /// For people.
    pub description: String,
    /// What people should know before they choose it.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// How much a message matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// For the author.
    Debug,
    /// For whoever looks.
    Info,
    /// Should be looked at.
    Warn,
    /// Went wrong.
    Error,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// How much it matters.
    pub level: LogLevel,
    /// What.
    pub message: String,
}

/// What a call gave.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Effects, all of them granted.
    pub plan: Plan,
    /// What it has to say.
    pub findings: Vec<Finding>,
    /// What an importer offers.
    pub offers: Vec<Offer>,
    /// What became of a change.
    pub change: Option<Change>,
    /// Changes of its state; kept already, unless it was a dry run.
    pub state: Vec<StateChange>,
    /// Its messages.
    pub log: Vec<LogLine>,
    /// How many more there were.
    pub log_dropped: u64,
    /// How long it took.
    pub took: Duration,
}

impl Outcome {
    /// Whether a preflight says no: the findings that do.
    pub fn refusals(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.severity == Severity::Failure)
    }
}
