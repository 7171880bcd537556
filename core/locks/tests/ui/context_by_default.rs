//! Only a root makes contexts.

use vm_locks::{Ctx, Unlocked};

fn wrong() -> Ctx<Unlocked> {
    Ctx::default()
}

fn main() {}
