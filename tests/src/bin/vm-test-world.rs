//! PID 1 of a test world. Makes the new namespaces usable, then holds them until its stdin ends.

use std::{
    io::{self, Read, Write},
    path::Path,
    process::{Command, ExitCode},
};

use nix::{
    mount::{MsFlags, mount},
    sys::signal::{SigHandler, Signal, signal},
};

fn main() -> ExitCode {
    match hold() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vm-test-world: {error}");
            ExitCode::FAILURE
        }
    }
}

fn hold() -> io::Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    // Without a bus nobody here can talk to the host's systemd-resolved or logind.
    if Path::new("/run/dbus").is_dir() {
        mount(Some("tmpfs"), "/run/dbus", Some("tmpfs"), MsFlags::empty(), none)?;
    }
    if !Command::new("ip").args(["link", "set", "lo", "up"]).status()?.success() {
        return Err(io::Error::other("cannot bring lo up"));
    }
    reap_by_ignoring()?;
    println!("ready");
    io::stdout().flush()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    // The kernel kills all that is left in the namespace when its first process ends.
    Ok(())
}

#[expect(unsafe_code, reason = "nix cannot know that a disposition is no handler")]
fn reap_by_ignoring() -> io::Result<()> {
    // SAFETY: SIG_IGN runs no code of ours. A parent that ignores SIGCHLD leaves no zombies (sigaction(2)).
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.map(drop).map_err(Into::into)
}
