//! What is not locked while a lock of level CreateVm is held.

use vm_locks::{Ctx, Lock, CreateVm, ImageOps, Vm, Workspace};

async fn wrong(
    ctx: &mut Ctx<CreateVm>,
    vm: &Lock<Vm, ()>,
    workspace: &Lock<Workspace, ()>,
    create_vm: &Lock<CreateVm, ()>,
    image_ops: &Lock<ImageOps, ()>,
) {
    let _ = ctx.lock(vm);
    let _ = ctx.lock(workspace);
    let _ = ctx.lock(create_vm);
    let _ = ctx.lock(image_ops);
}

fn main() {}
