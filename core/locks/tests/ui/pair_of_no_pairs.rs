//! Only levels that say so come in pairs.

use vm_locks::{CreateVm, Ctx, Lock, Unlocked};

async fn wrong(ctx: &mut Ctx<Unlocked>, first: &Lock<CreateVm, ()>, second: &Lock<CreateVm, ()>) {
    let _ = ctx.lock_pair(first, second);
}

fn main() {}
