//! A lock that was merely tried is held like any other.

use vm_locks::{Ctx, Lock, Unlocked, Vm, Workspace};

fn wrong(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, ()>, workspace: &Lock<Workspace, ()>) {
    let _vm = ctx.try_lock(vm);
    let _workspace = ctx.try_lock(workspace);
}

fn main() {}
