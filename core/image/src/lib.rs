//! Root filesystems and kernels: acquiring, checking, packing.
//!
//! ```text
//!   reference ──> debian::pull ──┐
//!                 a tar archive ─┴─> rootfs::build ───┬─> one read-only ext4 file per digest
//!   layers of an OCI image ────────> rootfs::flatten ─┤
//!   a bundle ──────────────────────> bundle::unpack ──┘
//!                                          │
//!   kernel::import_debian ────┬────────────┘
//!   kernel::import_files ─────┼─> kernel::install ──> <id>/{vmlinuz, modules.cpio, config}
//!   kernel::import_archived ──┘   kernel::segment ──> the per-VM part of the initramfs
//! ```
//!
//! One module per source. Nothing here keeps state or knows the store: a caller says where results go and records them.
//! Every host command goes through [`vm_host::Runner`]. Long work reports [`Progress`] and is cancelled by dropping its
//! future; what it had below the scratch directory it was given vanishes either way.

pub mod bundle;
pub mod debian;
mod error;
mod ext4;
pub mod kernel;
mod progress;
pub mod reference;
pub mod registered;
pub mod rootfs;
mod scratch;

pub use error::ImageError;
pub use progress::{Progress, ProgressSink};
pub use reference::Reference;
