//! The inner context cannot be kept for later.

use vm_locks::{Ctx, Held, Vm};

fn wrong(held: &mut Held<'_, Vm, ()>) -> Ctx<Vm> {
    *held.ctx()
}

fn main() {}
