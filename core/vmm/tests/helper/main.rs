//! A shim, and the jail that it puts around its VMM, for the contract's tests: what the daemon's program is otherwise.

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["shim", "--spec", spec, "--run-dir", _] => vm_shim::main(Path::new(spec)),
        ["jail", "--spec", spec] => vm_shim::jail::main(Path::new(spec)),
        other => {
            eprintln!("no such part: {other:?}");
            ExitCode::FAILURE
        }
    }
}
