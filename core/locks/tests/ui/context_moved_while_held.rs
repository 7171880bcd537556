//! Nor can the outer one go to another task while a lock is held.

use vm_locks::{Ctx, Lock, Unlocked, Vm};

async fn wrong(mut ctx: Ctx<Unlocked>, vm: Lock<Vm, ()>) {
    let _held = ctx.lock(&vm).await;
    tokio::spawn(async move { drop(ctx) });
}

fn main() {}
