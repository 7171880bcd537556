//! What only a whole host of one's own can show: device-mapper, KVM, an init with systemd-resolved, a reboot.
//!
//! ```text
//!   test ── World ── vmd ── QEMU, emulated ══ Debian: systemd, cgroup v2, SVM
//!                                               └── this build: vmd, test binaries ── VMs under KVM
//! ```
//!
//! The host is a VM that `vm` boots from an image with this build in it ([`image`]). What runs inside is told by
//! `VM_NESTED_HOST=1` that the host is its own and disposable.

mod disks;
mod host;
mod image;
mod names;
mod reboot;
mod vmms;

/// To stderr itself: what libtest captures of a test that passes nobody sees.
fn say(what: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{what}");
}
