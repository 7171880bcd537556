//! What passes between the daemon and a plugin's hooks, as plain data: facts in, findings and answers out. What hooks plan is in
//! [`crate::plan`].

use std::{collections::BTreeMap, net::IpAddr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{VmId, VmName};

/// An error as plugins give and get it: the record `error` of `vm:plugin`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct PluginError {
    /// Dotted lower-case words.
    pub code: String,
    /// For people.
    pub message: String,
    /// For people: what to do.
    pub hint: Option<String>,
    /// Whether the same may work later.
    pub retryable: bool,
}

impl PluginError {
    /// One without a hint, final.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into(), hint: None, retryable: false }
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A VM as plugins see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmFacts {
    /// Never used again.
    pub id: VmId,
    /// What people call it.
    pub name: VmName,
    /// The name its image was asked for.
    pub image_reference: String,
    /// `sha256:…`.
    pub image_digest: String,
    /// What the image says of itself.
    pub image_properties: BTreeMap<String, String>,
    /// `uname -r`.
    pub kernel_release: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// Root disk.
    pub disk_bytes: u64,
    /// `nat`, `none`, …
    pub network: String,
    /// On the host's bridge.
    pub addresses: Vec<IpAddr>,
    /// Free-form labels.
    pub labels: BTreeMap<String, String>,
    /// Deleted when its owner ends.
    pub temporary: bool,
}

/// How a finding is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Works, and is not as it should be.
    Warning,
    /// Does not work; in a preflight: must not be started.
    Failure,
}

/// One thing a plugin has to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Finding {
    /// How it is meant.
    pub severity: Severity,
    /// What about.
    pub subject: String,
    /// What.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// What became of a change of configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// In force once planned anew.
    Applied,
    /// In force after the next start.
    NeedsRestart,
    /// Must not be.
    Refused(PluginError),
}
