//! What is not locked while a lock of level Workspace is held.

use vm_locks::{Ctx, Lock, Vm, Workspace};

async fn wrong(
    ctx: &mut Ctx<Workspace>,
    vm: &Lock<Vm, ()>,
    workspace: &Lock<Workspace, ()>,
) {
    let _ = ctx.lock(vm);
    let _ = ctx.lock(workspace);
}

fn main() {}
