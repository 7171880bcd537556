//! What a VM may take of the host's disk.

use vm_tests::{World, fixtures};

/// Seconds that the guest's own clock counts while 4 MiB reach its disk.
const WRITE: &str = "read -r begun _ </proc/uptime; \
                     dd if=/dev/zero of=/root/data bs=64k count=64 conv=fsync 2>/dev/null && \
                     read -r ended _ </proc/uptime && echo $((${ended%.*} - ${begun%.*}))";

#[test]
fn a_disk_is_as_slow_as_it_is_asked_to_be() {
    let world = World::new();
    let limits = ["--disk-bandwidth", "1M", "--disk-iops", "1000"];
    // Small: a filesystem that grows to gigabytes writes a lot of its own.
    let vm = ["create", "--name", "slow", "--image", fixtures::BUSYBOX, "--disk", "256M", "--memory", "256M"];
    world.vm(&[&vm[..], &limits, &["--start"]].concat()).run().exits(0);
    world.vm(&["show", "slow"]).run().exits(0).tells("1M/s, 1000 operations/s");
    let output = world.vm(&["ssh", "slow", WRITE]).run().exits(0);
    let seconds: u64 = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
    // Of four seconds one is what may pass at once, and one what whole seconds cut off. A busy host only adds to it.
    assert!(seconds >= 2, "4 MiB went to a disk of 1 MiB a second in {seconds} s");

    // Other limits come with the next start.
    let changed = world.ask(&["set", "slow", "--disk-bandwidth", "unlimited", "--disk-iops", "2000"]);
    assert_eq!(changed["needs_restart"], serde_json::json!(["disk-bandwidth", "disk-iops"]));
    world.vm(&["restart", "slow"]).run().exits(0);
    let shown = world.ask(&["show", "slow"]);
    assert_eq!(shown["needs_restart"], serde_json::json!([]));
    assert_eq!(shown["disk_bytes_per_second"], serde_json::Value::Null);
    assert_eq!(shown["disk_operations_per_second"], 2000);
    world.vm(&["ssh", "slow", "wc -c </root/data"]).run().exits(0).says("4194304\n");
    world.leaves_nothing();
}

#[test]
fn limits_that_leave_no_disk_are_refused() {
    let world = World::new();
    let refused = |limits: &[&str]| {
        world.vm(&[&["create", "--image", fixtures::BUSYBOX], limits].concat()).run().exits(2)
    };
    refused(&["--disk-bandwidth", "1K"]).complains("less than one block").complains("hint");
    refused(&["--disk-bandwidth", "0"]).complains("unlimited");
    refused(&["--disk-iops", "0"]).complains("unlimited");
    assert!(world.names().is_empty());
    world.leaves_nothing();
}
