//! Only a root makes contexts.

use std::marker::PhantomData;

use vm_locks::{Ctx, Unlocked};

fn wrong() -> Ctx<Unlocked> {
    Ctx { depth: 0, level: PhantomData }
}

fn main() {}
