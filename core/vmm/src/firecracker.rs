//! Firecracker, under KVM (<https://github.com/firecracker-microvm/firecracker>).
//!
//! It takes no machine on its command line: [`requests`] makes the list of HTTP requests that the shim sends to its API socket, the last
//! of which starts the guest. [`driver`] looks at the host, [`controls`] speaks to a Firecracker that runs.
//!
//! What differs from QEMU for the guest: drives have no serial of ours, so that the kernel's command line says which is
//! which; the machine cannot switch itself off, so that the agent resets it instead, and a kernel that halts is noticed by
//! the shim; the guest channel is vsock.

mod controls;
mod driver;
mod jail;
pub mod requests;
mod version;

pub use driver::FirecrackerDriver;
pub use version::Version;
