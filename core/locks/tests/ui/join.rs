//! Two futures cannot lock through one context.

use vm_locks::{Ctx, Lock, Unlocked, Vm, Workspace};

async fn wrong(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, ()>, workspace: &Lock<Workspace, ()>) {
    tokio::join!(ctx.lock(vm), ctx.lock(workspace));
}

fn main() {}
