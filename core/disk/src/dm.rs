//! Disks of differences: device-mapper's snapshot target over loop devices.
//!
//! ```text
//!   disk.dev  (our own node)
//!      │
//!   vmd-INSTANCE-VM          snapshot, persistent: chunks that were written are in the delta
//!      ├── loop, read-write ── disk.delta        sparse, one for each VM
//!      └── vmd-INSTANCE-VM-origin                linear, then zeros to the disk's size; read-only
//!             └── loop, read-only ── IMAGE.ext4  one for all VMs of an image
//! ```
//!
//! Loops detach themselves when their last user is gone, so a killed daemon leaves none. The devices have deterministic names
//! and a UUID that says that they are ours; each half-made state of them is one that [`snapshot`] completes or removes.
//!
//! The ioctls are spoken here and not through the crate `devicemapper`: that one waits, without a limit, for udev's rules
//! of the package `dmsetup` wherever udev runs, whether or not they are installed; it needs libclang and libdevmapper's
//! headers to build; and its retries block for a second that we want to bound ourselves.
//! No udev is needed: device nodes are made and removed here.

pub(crate) mod control;
pub(crate) mod format;
pub(crate) mod loops;
pub(crate) mod names;
pub(crate) mod node;
pub(crate) mod probe;
pub(crate) mod snapshot;

pub use names::{device_name, device_prefix, vm_of_device};
