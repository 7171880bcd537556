//! An inner context cannot change places with an outer one.

use vm_locks::{Ctx, Lock, Unlocked, Vm};

async fn wrong(ctx: &mut Ctx<Unlocked>, other: &mut Ctx<Unlocked>, vm: &Lock<Vm, ()>) {
    let mut held = ctx.lock(vm).await;
    std::mem::swap(held.ctx(), other);
}

fn main() {}
