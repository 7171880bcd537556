//! Files on the host: copy-on-write disks ([`Cow`]) and small files and directories ([`Files`]).
//!
//! ```text
//!   Effect::CowDisk ──> Cow:  HostCow (reflink, else sparse copy) │ FakeCow
//!   Effect::{Directory, File, AppendedFile} ──> Files, inside its roots only
//! ```
//!
//! Whatever is made is whole or absent under its name: it is made under another name beside it and
//! renamed. All work runs on blocking threads; dropping a future stops a copy and removes what it made.
//! This crate does not journal and does not know VMs.

pub mod copy;
pub mod cow;
pub mod error;
pub mod fake;
pub mod files;
pub mod host;
mod root;
pub mod space;

pub use cow::{Backend, Cow};
pub use error::DiskError;
pub use fake::FakeCow;
pub use files::Files;
pub use host::{BackendChoice, HostCow};
pub use space::free_bytes;
