//! `vmd`: the daemon, and the modes in which the same binary serves as a VM's shim and as a doctor.

mod config;
mod daemon;
mod dns;
mod doctor;
mod options;
mod plugins;
mod problem;
mod rpc;

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _scenario = fail::FailScenario::setup();
    options::run()
}
