//! So is a pair.

use vm_locks::{Ctx, Lock, Unlocked, Vm, Workspace};

async fn wrong(ctx: &mut Ctx<Unlocked>, a: &Lock<Vm, ()>, b: &Lock<Vm, ()>, workspace: &Lock<Workspace, ()>) {
    let _pair = ctx.lock_pair(a, b).await;
    let _workspace = ctx.lock(workspace).await;
}

fn main() {}
