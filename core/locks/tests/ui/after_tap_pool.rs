//! What is not locked while a lock of level TapPool is held.

use vm_locks::{Ctx, Lock, CreateVm, ImageOps, Initramfs, Network, TapPool, Vm, Workspace};

async fn wrong(
    ctx: &mut Ctx<TapPool>,
    vm: &Lock<Vm, ()>,
    workspace: &Lock<Workspace, ()>,
    create_vm: &Lock<CreateVm, ()>,
    image_ops: &Lock<ImageOps, ()>,
    network: &Lock<Network, ()>,
    tap_pool: &Lock<TapPool, ()>,
    initramfs: &Lock<Initramfs, ()>,
) {
    let _ = ctx.lock(vm);
    let _ = ctx.lock(workspace);
    let _ = ctx.lock(create_vm);
    let _ = ctx.lock(image_ops);
    let _ = ctx.lock(network);
    let _ = ctx.lock(tap_pool);
    let _ = ctx.lock(initramfs);
}

fn main() {}
