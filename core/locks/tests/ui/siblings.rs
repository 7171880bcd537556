//! The outer context is of no use while a lock is held, even if the guard is never mentioned again.

use vm_locks::{Ctx, Lock, Unlocked, Vm, Workspace};

async fn wrong(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, ()>, workspace: &Lock<Workspace, ()>) {
    let _vm = ctx.lock(vm).await;
    let _workspace = ctx.lock(workspace).await;
}

fn main() {}
