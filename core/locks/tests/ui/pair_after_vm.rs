//! A pair is locked as one, not as a second beside the first.

use vm_locks::{Ctx, Lock, Vm};

async fn wrong(ctx: &mut Ctx<Vm>, first: &Lock<Vm, ()>, second: &Lock<Vm, ()>) {
    let _ = ctx.lock_pair(first, second);
}

fn main() {}
