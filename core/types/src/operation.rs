//! Long operations as every crate names them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "kebab-case")]
pub enum OperationKind {
    /// `vm.create`
    VmCreate,
    /// `vm.start`
    VmStart,
    /// `vm.stop`
    VmStop,
    /// `vm.kill`
    VmKill,
    /// `vm.restart`, a reboot from within, or what a restart policy asks for
    VmRestart,
    /// `vm.pause`
    VmPause,
    /// `vm.resume`
    VmResume,
    /// `vm.set`
    VmSet,
    /// `vm.delete`
    VmDelete,
    /// `vm.prune`
    VmPrune,
    /// What follows when a VMM has ended by itself
    VmEnded,
    /// `image.pull`
    ImagePull,
    /// `image.import`
    ImageImport,
    /// `image.commit`
    ImageCommit,
    /// `image.build`
    ImageBuild,
    /// `image.push`
    ImagePush,
    /// `image.export`
    ImageExport,
    /// `image.register`
    ImageRegister,
    /// `image.promote`
    ImagePromote,
    /// `kernel.import`
    KernelImport,
    /// `workspace.plan`
    WorkspacePlan,
    /// `workspace.prepare`
    WorkspacePrepare,
    /// `workspace.status`
    WorkspaceStatus,
    /// `workspace.export`
    WorkspaceExport,
    /// `plugin.configure` and `plugin.remove`, as far as VMs have to do with it
    PluginChange,
    /// Something that only a newer daemon does.
    #[serde(other)]
    Other,
}

/// How far an operation is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OperationProgress {
    /// The step, for people.
    pub stage: String,
    /// Done so far, in the stage's own unit.
    pub done: u64,
    /// Of how many, where known.
    pub total: Option<u64>,
}
