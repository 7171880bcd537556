//! The order is in one file.

use vm_locks::{LockAfter, Vm, Workspace};

impl LockAfter<Vm> for Workspace {}

fn main() {}
