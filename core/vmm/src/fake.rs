//! A fake VMM: a real process that plays VMM and guest, for fault injection and tests at scale.
//!
//! Towards its parent it looks like QEMU with a booted guest: console on stdin and stdout, guest channel on a
//! listening socket that serves one client at a time, QMP on another. Called with Firecracker's arguments it is that one, so that
//! [`crate::FirecrackerDriver`] can drive it. It needs no kernel, disk or privilege, and
//! does on demand what real ones do rarely ([`FakeBehaviour`]).

mod behaviour;
mod driver;
mod firecracker;
mod guest;
mod monitor;
mod process;

pub use behaviour::{Boot, Crash, CrashAt, End, FakeBehaviour};
pub use driver::FakeDriver;
pub use process::run;
