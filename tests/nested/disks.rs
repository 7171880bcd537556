//! Disks in a host that has device-mapper, and filesystems of all sorts.

use crate::{
    host::{BUSYBOX, Host},
    image, say,
};

/// Devices of disks that are in use now.
const DEVICES: &str = "dmsetup ls | grep -c '^vmd-'";

/// The part of `make test`.
#[test]
fn disks_of_differences_in_a_host_with_device_mapper() {
    let host = Host::boot();
    let before = host.traces();
    host.suite("vm-disk.contract", "VM_TEST_REQUIRE_DM=1", "snapshots");
    assert_eq!(host.traces(), before, "the suite left something");
    // What is chosen by itself where files share no blocks.
    host.attempt(&format!("vm run --rm {BUSYBOX} -- sh -c 'exit 7'")).exits(7);
    host.run(&format!(
        "vm create --name kept {BUSYBOX} --start && vm ssh kept 'echo of before > /root/file; sync'"
    ));
    // The disk, and the image it differs from.
    host.run(DEVICES).says("2\n");
    host.run("kill -9 $(pgrep -x vmd) && vm ssh kept cat /root/file").says("of before\n");
    host.run("vm stop kept");
    host.attempt(DEVICES).says("0\n");
    host.run("vm start kept >/dev/null && vm ssh kept cat /root/file").says("of before\n");
    host.leaves_nothing(&before);
    host.end();
}

#[test]
#[ignore = "takes minutes"]
fn disks_of_all_kinds() {
    let host = Host::boot();
    let before = host.traces();
    for suite in host.suites("vm-disk") {
        host.suite(&suite, "VM_TEST_REQUIRE_DM=1", "");
    }
    assert_eq!(host.traces(), before, "the suites left something");
    host.end();
}

/// What a disk by each backend costs in a host that has them all; for `make bench`. The host is emulated, so only the order of sizes
/// says something: a backend that is flat is flat here too.
#[test]
#[ignore = "a measurement"]
fn costs() {
    let host = Host::boot();
    let measured = host.run(&format!(
        "cd /root && VM_NESTED_HOST=1 VM_TEST_REQUIRE_DM=1 {}/vm-disk.contract --ignored --nocapture --test-threads 1 costs",
        image::SUITES
    ));
    let text = measured.text();
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("disk by ")).collect();
    assert!(lines.iter().any(|line| line.starts_with("disk by Dm")), "nothing was measured: {text}");
    for line in lines {
        say(&format!("nested, emulated: {line}"));
    }
    host.end();
}
