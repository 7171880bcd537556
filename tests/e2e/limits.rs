//! What a VM may take of the host's disk.

use vm_tests::{World, fixtures, world::BOOT};

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

#[test]
fn a_guest_whose_disk_has_no_room_on_the_host_goes_on_when_there_is_some() {
    let world = World::with_config("version = 1\n[disk]\nbackend = \"copy\"\n[vmm]\ndriver = \"qemu\"\n");
    // Its disks are on a small filesystem of this world's own, and another file leaves them little of it.
    let vms = world.dirs().state.join("vms").to_string_lossy().into_owned();
    let small = format!("mkdir -p {vms} && mount -t tmpfs -o size=512m,mode=711 tmpfs {vms}");
    world.tool("sh", &["-c", &small]).run().exits(0);
    world
        .vm(&["create", "--name", "a", "--image", fixtures::BUSYBOX, "--memory", "256M", "--start"])
        .within(BOOT)
        .run()
        .exits(0);
    let filler = format!("{vms}/filler");
    let fill = format!("dd if=/dev/zero of={filler} bs=1M 2>/dev/null; truncate -s -8M {filler}");
    world.tool("sh", &["-c", &fill]).run().exits(0);
    let script = "dd if=/dev/urandom of=/data bs=1M count=64 2>/dev/null && sync && echo written";
    let writing = world.vm(&["ssh", "a", script]).start();
    let shown = world.wait_for_state("a", "paused");
    assert!(shown["problem"].as_str().unwrap_or_default().contains("no room"), "{shown}");
    world.vm(&["show", "a"]).run().exits(0).tells("free some space");
    world.tool("rm", &[&filler]).run().exits(0);
    let shown = world.wait_for_state("a", "running");
    assert_eq!(shown["problem"], serde_json::Value::Null);
    // The guest knows nothing of it.
    writing.finish(BOOT).exits(0).says("written\n");
    let events = world.vm(&["--json", "events"]).run().exits(0).text();
    assert!(events.contains("disk_failed") && events.contains("vm_resumed"), "{events}");
    world.vm(&["delete", "--force", "a"]).run().exits(0);
    world.vm(&["daemon", "stop"]).run().exits(0);
    world.tool("umount", &[&vms]).run().exits(0);
    world.leaves_nothing();
}
