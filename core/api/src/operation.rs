//! What answers about long work hold.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use vm_types::{
    OperationId,
    operation::{OperationKind, OperationProgress},
};

use crate::Problem;

/// A long operation that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Begun {
    /// To watch or cancel it.
    pub operation: OperationId,
}

/// Where an operation stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum OperationStatus {
    /// At work.
    Running {
        /// How far.
        progress: OperationProgress,
    },
    /// Done.
    Succeeded {
        /// What it made: [`crate::VmInfo`], [`crate::VmChanged`], [`crate::Pruned`], [`crate::ImageRecord`], [`crate::MadeImage`],
        /// [`crate::KernelRecord`], [`crate::PreparedWorkspace`], … or null, by kind.
        result: serde_json::Value,
    },
    /// Undone and given up.
    Failed {
        /// Why.
        error: Problem,
    },
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OperationInfo {
    /// Its id, unique in one daemon's life.
    pub id: OperationId,
    /// What it does.
    pub kind: OperationKind,
    /// To what: a VM name or a reference.
    pub subject: String,
    /// When it began, seconds since the Unix epoch.
    pub begun_at: u64,
    /// When it ended, seconds since the Unix epoch; absent while it is at work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<u64>,
    /// Where it stands.
    #[serde(flatten)]
    pub status: OperationStatus,
}

/// A piece of what an operation says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OutputChunk {
    /// The text; what is no UTF-8 in it is replaced.
    pub text: String,
    /// Bytes before it that are no longer kept.
    pub lost: u64,
    /// There will be no more.
    pub end: bool,
}
