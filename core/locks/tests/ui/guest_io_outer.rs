//! What takes long cannot have the outer context while a lock is held.

use vm_locks::{Ctx, Lock, Unlocked, Vm};

async fn guest_io(_: &mut Ctx<Unlocked>) {}

async fn wrong(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, ()>) {
    let _held = ctx.lock(vm).await;
    guest_io(ctx).await;
}

fn main() {}
