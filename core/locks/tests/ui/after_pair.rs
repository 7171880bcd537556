//! No third VM, and no workspace, while two VMs are held.

use vm_locks::{Ctx, Lock, Unlocked, Vm, Workspace};

async fn wrong(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, ()>, workspace: &Lock<Workspace, ()>) {
    let mut pair = ctx.lock_pair(vm, vm).await.unwrap();
    let _ = pair.ctx().lock(vm);
    let _ = pair.ctx().lock(workspace);
}

fn main() {}
