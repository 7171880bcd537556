//! VMM drivers: Firecracker, QEMU, and a fake VMM with a fake guest.
//!
//! ```text
//!   engine ── plan ──> LaunchPlan ──> shim ── spawns ──> VMM process
//!      └───── wait_up, power button, pause, grow, quit ────┘   (its own control socket)
//! ```
//!
//! A driver turns a machine's shape into a command line and speaks to the VMM's control socket. It
//! starts no VMM, waits for no VMM's end and keeps no state: the shim is the VMM's parent, and what the VMM is
//! doing is asked of the VMM. Every driver passes the suite in `contract` (feature `contract`).

mod checks;
#[cfg(feature = "contract")]
pub mod contract;
mod control;
pub mod driver;
pub mod error;
#[cfg(feature = "fake")]
pub mod fake;
pub mod firecracker;
mod jail;
pub mod kvm;
mod program;
pub mod qemu;
pub mod qmp;
mod vmms;

pub use driver::{Accelerator, Availability, Pause, PowerButton, Resize, Vmm};
pub use error::{ControlError, VmmError};
#[cfg(feature = "fake")]
pub use fake::{FakeBehaviour, FakeDriver};
pub use firecracker::FirecrackerDriver;
pub use jail::{JailUsers, Jailing};
pub use qemu::QemuDriver;
pub use qmp::QmpError;
pub use vmms::Vmms;
