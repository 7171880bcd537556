//! Trying is no way around the order.

use vm_locks::{Ctx, Lock, Unlocked, Vm, Workspace};

async fn wrong(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, ()>, workspace: &Lock<Workspace, ()>) {
    let mut held = ctx.lock(vm).await;
    let _ = held.ctx().try_lock(workspace);
}

fn main() {}
