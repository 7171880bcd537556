//! The command line client `vm`: parses, asks the daemon, shows the answer. It keeps no state of its own.

mod cli;
mod commands;
mod confirm;
mod context;
mod daemon;
mod duration;
mod errors;
mod interrupts;
mod operations;
mod output;
mod progress;
mod size;
mod ssh;
mod stdio;

fn main() -> std::process::ExitCode {
    let invocation = cli::Cli::from_command_line();
    let code = invocation.run();
    std::process::ExitCode::from(code)
}
