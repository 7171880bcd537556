//! A context is one.

use vm_locks::{Ctx, Unlocked};

fn wrong(ctx: Ctx<Unlocked>) -> (Ctx<Unlocked>, Ctx<Unlocked>) {
    (ctx, ctx)
}

fn main() {}
