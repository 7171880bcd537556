//! The plugins of a daemon: which are installed, what they may do, and the calls of their hooks.
//!
//! ```text
//!   directory, oci://…  ──package──> state/plugins/NAME/CONTENT/   (whole or not there)
//!                                          │ load: granted, configured, compiled beforehand
//!   store: plugins, plugin_state           ▼
//!        │                         Entry ── Entry ── Entry        one Set, in order
//!        └──────── manager ──────>   │  swapped as a whole; whoever holds the old one goes on with it
//!                                    ▼
//!   engine ── Hooks::enabled ──> Plugin::call ──> vm_plugin, a fresh instance
//!                                    └─> calls: the last ones, to be made again
//!          Importers::import ──> imports: a workspace of the host, streamed into a guest
//! ```
//!
//! What hooks plan is carried out by the engine; nothing here changes the host beyond the plugins' own directory. No plugin is known
//! here by name: which ones come with a daemon is a file beside them, see [`bundled`].

pub(crate) mod bundled;
mod calls;
mod change;
pub(crate) mod describe;
mod doctor;
mod entry;
mod error;
mod facts;
mod imports;
mod manager;
mod oci;
mod package;
mod replay;
mod sandbox;
mod show;
mod source;
mod state;
mod suite;
#[cfg(test)]
mod tests;

pub(crate) use self::{
    entry::parsed,
    error::PluginsError,
    facts::Facts,
    manager::{Manager, Setup},
    oci::{OciError, Trust},
    show::line,
};
