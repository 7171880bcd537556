//! Disks in a host that has device-mapper and filesystems of all sorts. The part of `make test`.

use crate::host::{BUSYBOX, Host};

#[test]
fn disks_in_a_host_with_device_mapper() {
    let host = Host::boot();
    let before = host.traces();
    for suite in host.suites("vm-disk") {
        host.suite(&suite, "VM_TEST_REQUIRE_DM=1", "");
    }
    assert_eq!(host.traces(), before, "the suites left something");
    host.attempt(&format!("vm run --rm {BUSYBOX} -- sh -c 'exit 7'")).exits(7);
    host.leaves_nothing(&before);
    host.end();
}
