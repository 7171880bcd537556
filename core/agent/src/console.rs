//! Messages to the console. Each byte there is an exit to the VMM, so only what somebody must see is said.

use std::{fs::OpenOptions, io::Write};

use vm_types::guest::kernel_args;

/// Prints one line through the kernel's log, where it appears on the console however quiet that is set.
pub(crate) fn error(message: impl std::fmt::Display) {
    write(3, &format_args!("vm-agent: {message}"));
}

/// Records one line in the kernel's log, which a quiet console does not show.
pub(crate) fn note(message: impl std::fmt::Display) {
    write(6, &format_args!("vm-agent: {message}"));
}

/// Tells the host that the reset which follows is a power-off.
pub(crate) fn powered_off() {
    write(0, &kernel_args::POWERED_OFF);
}

fn write(level: u8, message: &dyn std::fmt::Display) {
    let line = format!("<{level}>{message}\n");
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg")
        && log.write_all(line.as_bytes()).is_ok()
    {
        return;
    }
    eprint!("{}", &line[3..]);
}
