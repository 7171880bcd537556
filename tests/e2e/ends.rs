//! How a guest ends, and what follows from that.

use std::time::Duration;

use vm_tests::{
    World, fixtures, wait_until,
    world::{BOOT, SHORT},
};

const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

/// A world with a small VM that is up.
fn up(options: &[&str]) -> World {
    let world = World::new();
    let mut create =
        vec!["create", "--name", "a", "--image", fixtures::BUSYBOX, "--memory", "256M", "--start"];
    create.extend(options);
    world.vm(&create).run().exits(0);
    world
}

fn boot_id(world: &World) -> String {
    world.vm(&["ssh", "a", BOOT_ID]).run().exits(0).text()
}

/// Waits until the guest is up in another boot than `before`.
#[track_caller]
fn boots_again(world: &World, before: &str) {
    wait_until("another boot", BOOT, || {
        let asked = world.vm(&["ssh", "a", BOOT_ID]).run();
        asked.status.success() && asked.text() != before
    });
    assert_eq!(world.state("a"), "running");
}

#[test]
fn a_reboot_from_within_brings_it_up_again_and_a_panic_is_told() {
    let world = up(&[]);
    world.vm(&["ssh", "a", "echo kept > /root/file; sync"]).run().exits(0);
    let before = boot_id(&world);
    // The session ends somehow; what counts is the VM.
    world.vm(&["ssh", "a", "reboot"]).within(SHORT).run();
    boots_again(&world, &before);
    world.vm(&["ssh", "a", "cat /root/file"]).run().exits(0).says("kept\n");

    let before = boot_id(&world);
    let reset = "echo 1 > /proc/sys/kernel/sysrq; echo b > /proc/sysrq-trigger; sleep 1000";
    let session = world.vm(&["ssh", "a", reset]).within(SHORT).run();
    session.exits(125).complains("VM a rebooted before the command ended");
    boots_again(&world, &before);

    let panic = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger";
    world.vm(&["ssh", "a", panic]).within(SHORT).run();
    let shown = world.wait_for_state("a", "failed");
    assert!(shown["cause"].as_str().unwrap_or_default().contains("panic"), "{shown}");
    world.vm(&["start", "a"]).run().exits(0);
    world.vm(&["ssh", "a", "cat /root/file"]).run().exits(0).says("kept\n");
    world.vm(&["stop", "a"]).run().exits(0);
    world.disk_is_clean("a");
    world.leaves_nothing();
}

#[test]
fn a_policy_starts_it_again_and_so_does_a_restart() {
    let world = up(&["--restart", "on-failure"]);
    let before = boot_id(&world);
    world.kill(world.vmm_pid("a"));
    boots_again(&world, &before);
    let happened = world.vm(&["events", "--json"]).run().exits(0);
    happened.tells(r#""kind":"vm_failed""#).tells(r#""kind":"vm_restarting""#);

    let before = boot_id(&world);
    world.vm(&["restart", "a"]).run().exits(0);
    assert_ne!(boot_id(&world), before, "it is another boot");
    // That is no failure, so the policy leaves it off.
    world.vm(&["ssh", "a", "poweroff"]).within(SHORT).run();
    world.wait_for_state("a", "stopped");
    world.disk_is_clean("a");
    assert_eq!(world.state("a"), "stopped");
    world.leaves_nothing();
}

#[test]
fn disks_grow_and_processors_halt() {
    let world = up(&["--disk", "192M"]);
    let mebibytes = || {
        let said = world.vm(&["ssh", "a", "df -m / | tail -n 1"]).run().exits(0).text();
        let size = said.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
        size.unwrap_or_else(|| panic!("df says {said:?}"))
    };
    let small = mebibytes();
    assert!(small < 192, "{small} MiB");
    world.vm(&["set", "a", "--disk", "384M"]).run().exits(0);
    let grown = mebibytes();
    assert!(grown > small && (300..384).contains(&grown), "{grown} MiB at once");
    world.vm(&["set", "a", "--disk", "192M"]).run().exits(2).complains("hint");

    world.vm(&["pause", "a"]).run().exits(0);
    assert_eq!(world.state("a"), "paused");
    world.vm(&["ssh", "a", "true"]).run().exits(125).complains("resume");
    world.vm(&["resume", "a"]).run().exits(0);
    world.vm(&["ssh", "a", "echo goes on"]).run().exits(0).says("goes on\n");

    world.vm(&["set", "a", "--memory", "192M"]).run().exits(0).tells("restart");
    world.vm(&["stop", "a"]).run().exits(0);
    world.vm(&["set", "a", "--disk", "640M"]).run().exits(0);
    world.vm(&["start", "a"]).run().exits(0);
    wait_until("the filesystem fills the disk", BOOT, || (500..640).contains(&mebibytes()));
    let memory = world.vm(&["ssh", "a", "grep MemTotal /proc/meminfo"]).run().exits(0).text();
    let kib = memory.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    assert!(kib.is_some_and(|kib| kib < 192 << 10), "{memory}");
    // A paused guest cannot shut down; it ends all the same.
    world.vm(&["pause", "a"]).run().exits(0);
    world.vm(&["stop", "--grace", "1", "a"]).within(Duration::from_secs(120)).run().exits(0);
    assert_eq!(world.state("a"), "stopped");
    world.leaves_nothing();
}
