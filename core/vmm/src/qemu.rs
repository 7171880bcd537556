//! QEMU: `q35` under software emulation (TCG), `microvm` under KVM.
//!
//! [`command_line`] is pure; [`driver`] looks at the host for it. In a `jail` QEMU is another user and sees its own files only.

pub mod command_line;
mod driver;
mod jail;

pub use driver::QemuDriver;

/// The kernel's own network devices for guests.
const VHOST_NET: &str = "/dev/vhost-net";

/// The Debian package of the emulator for this host's architecture.
#[cfg(target_arch = "aarch64")]
pub const PACKAGE: &str = "qemu-system-arm";
/// The Debian package of the emulator for this host's architecture.
#[cfg(not(target_arch = "aarch64"))]
pub const PACKAGE: &str = "qemu-system-x86";
