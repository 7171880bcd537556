//! Not even by a shared reference.

use vm_locks::{Ctx, Lock, Unlocked, Vm};

async fn guest_io(_: &Ctx<Unlocked>) {}

async fn wrong(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, ()>) {
    let _held = ctx.lock(vm).await;
    guest_io(ctx).await;
}

fn main() {}
