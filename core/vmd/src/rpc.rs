//! The JSON-RPC side: one file per namespace.

mod daemon;
mod event;
mod image;
mod kernel;
mod listing;
mod operation;
mod planning;
mod plugin;
pub(crate) mod server;
mod vm;
mod workspace;
