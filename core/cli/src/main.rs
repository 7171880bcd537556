//! The command line client `vm`.

fn main() {}
