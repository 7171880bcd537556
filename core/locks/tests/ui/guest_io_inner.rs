//! What takes long does not take the inner context.

use vm_locks::{Ctx, Lock, Unlocked, Vm};

async fn guest_io(_: &mut Ctx<Unlocked>) {}

async fn wrong(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, ()>) {
    let mut held = ctx.lock(vm).await;
    guest_io(held.ctx()).await;
}

fn main() {}
