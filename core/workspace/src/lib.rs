//! Workspaces: a repository or directory of the host, as it goes into a guest, and the guest's work, as it comes back.
//!
//! ```text
//!   Workspace::open ── facts, files ──┬─ archive ───────── tar ──▶ guest        what was sent: Sent
//!        (git, once)                  └─ git_directory ─── tar ──▶ guest        what it has of git: History
//!                                                                   │
//!   Baseline (what was sent, and how the guest had it right then)   │ survey
//!        ├─ Baseline::difference ◀──────────────────────────────────┤  what the host has changed since
//!        └─ export ◀────────────────────────────────────────────────┘  what the guest has changed since
//! ```
//!
//! All of it acts as the person who asked ([`Identity`]): git runs as that user, and files are opened on threads that have
//! that user's rights, relative to open directories, through no link. So a daemon that is root neither reads what its caller
//! may not read, nor runs as root what a repository's configuration names.
//!
//! It blocks: callers have threads for it, and a [`Cancel`]. It speaks with no guest; what a guest must say, its caller asks.

mod archive;
mod baseline;
mod cancel;
mod error;
pub mod export;
mod facts;
mod files;
mod git;
mod history;
mod identity;
mod listing;
mod pax;
mod text;
mod tree;

pub use archive::{HostStat, Selection, Sent, SentEntry};
pub use baseline::{Baseline, Difference, GuestDigests, is_of_git};
pub use cancel::{Cancel, CancelOnDrop};
pub use error::WorkspaceError;
pub use facts::Workspace;
pub use files::{Entry, EntryKind};
pub use git::{Git, GitCommand, GitError};
pub use history::{History, Line};
pub use identity::Identity;
pub use tree::Tree;
pub use vm_types::workspace::WorkspaceFacts;
