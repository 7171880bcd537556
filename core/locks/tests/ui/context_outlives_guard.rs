//! The inner context goes with its guard.

use vm_locks::{CreateVm, Ctx, Lock, Unlocked, Vm};

async fn wrong(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, ()>, create: &Lock<CreateVm, ()>) {
    let mut held = ctx.lock(vm).await;
    let inner = held.ctx();
    drop(held);
    inner.lock(create).await;
}

fn main() {}
