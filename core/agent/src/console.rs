//! Messages to the console. Each byte there is an exit to the VMM, so only what somebody must see is said.

use std::{fs::OpenOptions, io::Write};

/// Prints one line through the kernel's log, where it appears on the console however quiet that is set.
pub(crate) fn error(message: impl std::fmt::Display) {
    write(3, &message);
}

/// Records one line in the kernel's log, which a quiet console does not show.
pub(crate) fn note(message: impl std::fmt::Display) {
    write(6, &message);
}

fn write(level: u8, message: &dyn std::fmt::Display) {
    let line = format!("<{level}>vm-agent: {message}\n");
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg")
        && log.write_all(line.as_bytes()).is_ok()
    {
        return;
    }
    eprint!("{}", &line[3..]);
}
