//! Guest agent: init, SSH server, control service.

fn main() {}
