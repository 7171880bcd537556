//! So are the levels.

enum Mine {}

impl vm_locks::Level for Mine {
    const NAME: &'static str = "Mine";
}

fn main() {}
