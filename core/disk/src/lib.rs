//! Files on the host: copy-on-write disks ([`Cow`]), plugins' disks ([`Disks`]), small files and directories ([`Files`]).
//!
//! ```text
//!   Effect::{CowDisk, DmSnapshot} ──> Cow:  HostCow (reflink, else dm-snapshot, else sparse copy) │ FakeCow
//!   Effect::Disk ──> Disks, inside its roots only
//!   Effect::{Directory, File, AppendedFile} ──> Files, inside its roots only
//! ```
//!
//! Whatever is made is whole or absent under its name: it is made under another name beside it and
//! renamed. All work runs on blocking threads; dropping a future stops a copy and removes what it made.
//! This crate does not journal and does not know VMs.

pub mod copy;
pub mod cow;
pub mod disks;
pub mod dm;
pub mod error;
pub mod fake;
pub mod files;
pub mod host;
mod root;
pub mod space;

pub use cow::{Backend, Cow, Fill};
pub use disks::Disks;
pub use error::DiskError;
pub use fake::FakeCow;
pub use files::Files;
pub use host::{BackendChoice, HostCow};
pub use space::free_bytes;
