//! What a lock guards is used only while it is held.

use vm_locks::{Ctx, Lock, Unlocked, Vm};

async fn wrong(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, String>) {
    let mut held = ctx.lock(vm).await;
    let (name, _) = held.split();
    drop(held);
    name.clear();
}

fn main() {}
