//! The hooks, in the order in which a VM's life comes to them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One hook of world `capability`, or one function of another world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hook {
    /// May the VM start?
    Preflight,
    /// What the guest shall find.
    ContributeGuest,
    /// What the machine shall have.
    ContributeMachine,
    /// What the host shall have.
    PrepareHost,
    /// The guest runs.
    PostStart,
    /// The configuration changes.
    ConfigChange,
    /// The VM's run is over.
    Cleanup,
    /// How is the plugin?
    Doctor,
    /// World `dns`: which zones?
    Zones,
    /// World `dns`: one question.
    Resolve,
    /// World `workspace-importer`: what could be done?
    Probe,
    /// World `workspace-importer`: do it.
    Import,
}

impl Hook {
    /// Those of world `capability`.
    pub const CAPABILITY: [Self; 8] = [
        Self::Preflight,
        Self::ContributeGuest,
        Self::ContributeMachine,
        Self::PrepareHost,
        Self::PostStart,
        Self::ConfigChange,
        Self::Cleanup,
        Self::Doctor,
    ];
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Preflight => "preflight",
            Self::ContributeGuest => "contribute-guest",
            Self::ContributeMachine => "contribute-machine",
            Self::PrepareHost => "prepare-host",
            Self::PostStart => "post-start",
            Self::ConfigChange => "config-change",
            Self::Cleanup => "cleanup",
            Self::Doctor => "doctor",
            Self::Zones => "zones",
            Self::Resolve => "resolve",
            Self::Probe => "probe",
            Self::Import => "import",
        })
    }
}
