//! Guest agent: init of the initramfs, configuration, control service and SSH server of a VM.
//!
//! One static binary in five roles:
//!
//! ```text
//!  /init (PID 1) ── boot: modules, root, switch root
//!     │ spawns
//!     ├──────────── @vm-agent-rehearsal: one login with itself, so that the first true one finds warm code
//!     ├──────────── @vm-agent: applies the configuration, serves the guest channel (never returns)
//!     │ "go"
//!     ├── image has an init ──── exec /sbin/init: the agent lives on as its child
//!     └── image has none ─────── pid1: reaps orphans, takes the machine down when asked
//!  /run/vmd-agent/modprobe ───── the kernel's module helper for modules packed in the initramfs
//! ```
//!
//! It lives in the initramfs for good (bound at `/run/vmd-agent`), so it holds nothing on the root filesystem.

mod agent;
mod apply;
mod boot;
mod cmdline;
mod console;
mod control;
mod init;
mod kmod;
mod link;
mod machine;
mod pid1;
mod port;
mod ssh;
mod vsock;

use std::{os::unix::ffi::OsStrExt, process::ExitCode};

/// musl's own allocator gives every larger buffer back to the kernel at once: each packet would cost page faults, and those are
/// most of what a transfer takes where the guest is emulated.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    #[expect(unsafe_code, reason = "dlmalloc registers its lock with fork only when told")]
    // SAFETY: there is one thread, and nothing is being allocated.
    unsafe {
        dlmalloc::enable_alloc_after_fork();
    }
    let arguments: Vec<_> = std::env::args_os().collect();
    let name =
        arguments.first().map(|name| name.as_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default());
    match name {
        Some(b"modprobe") => kmod::modprobe(&arguments[1..]),
        Some(name) if name == agent::ARGV0.as_bytes() => agent::main(&arguments[1..]),
        Some(name) if name == ssh::warm::ARGV0.as_bytes() => ssh::warm::main(),
        _ if std::process::id() == 1 => pid1::main(),
        _ => {
            eprintln!("vm-agent {} runs as init of a VM's initramfs", env!("CARGO_PKG_VERSION"));
            ExitCode::from(2)
        }
    }
}
