//! The fake VMM's process; see `vm_vmm::fake`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    vm_vmm::fake::run(&args)
}
