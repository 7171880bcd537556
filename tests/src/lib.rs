//! The harness of the end-to-end tests: it runs the real programs and shows all that they said when a test fails.
//!
//! ```text
//!   test process ── World ── vm-test-world  PID 1 of its own network, mount and process namespaces
//!                     │          └── vmd, shims, VMMs, vm   all die with it, whatever becomes of the test
//!                     └── run, state and config directories of its own, images and kernel linked from a seed
//! ```
//!
//! Nothing in a world reaches the host's network, its D-Bus or other processes, and whatever a world leaves behind in
//! links, addresses, routes, firewall rules, mounts, loop devices, processes and files shows in a [`Snapshot`]. Waiting
//! is for a condition, with a time limit; there are no fixed pauses.

pub mod command;
pub mod debian;
pub mod disks;
pub mod fakes;
pub mod fixtures;
pub mod namespaces;
pub mod programs;
pub mod repository;
pub mod rpc;
pub mod snapshot;
pub mod world;

pub use command::{Output, Running, wait_until};
pub use fakes::FakeWorld;
pub use snapshot::Snapshot;
pub use world::World;
