//! Brings a guest's work back to the host: as a patch, a branch, files, or applied to the files that it was made from.
//!
//! The guest is not trusted. What it says it has is checked to be a tree at all; what it sends is what was asked for, into files
//! named by numbers; its objects go into a repository of their own, and from there to the host's by `git fetch`, which looks
//! through each of them; nothing of its configuration, its hooks or its attributes outside of the tree is even fetched.
//!
//! The host goes on working meanwhile. Nothing is written that is not, at that moment, as it was when it was sent.

mod apply;
pub mod beforehand;
mod branch;
mod compare;
mod error;
mod fetch;
mod guest;
mod names;
mod patch;
mod place;
mod quarantine;
mod refs;
mod report;
mod session;
mod submodules;
mod tree;
mod view;

pub use error::ExportError;
pub use report::{ApplyReport, BranchReport, Change, ChangeKind, PatchReport, SubmoduleReport, Wish};
pub use session::Export;
