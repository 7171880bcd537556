//! Plugins that fail or do harm: their VM does not start, the error names them, nothing is left, and nobody else notices.

use vm_tests::{FakeWorld, Snapshot, programs, wait_until, world::SHORT};

/// What a hostile plugin does, and where.
const HARMS: &[(&str, &str)] = &[
    ("preflight", "spin"),
    ("preflight", "recurse"),
    ("preflight", "memory"),
    ("preflight", "panic"),
    ("preflight", "report-flood"),
    ("preflight", "refuse"),
    ("contribute-guest", "effects"),
    ("contribute-guest", "gigabyte"),
    ("contribute-guest", "path"),
    ("contribute-guest", "outside-grant"),
    ("contribute-guest", "panic"),
    ("prepare-host", "nft"),
    ("prepare-host", "escape"),
    ("prepare-host", "tool"),
    ("prepare-host", "panic"),
    ("post-start", "panic"),
    ("post-start", "error"),
];

/// A world with a hostile plugin that is friendly for now.
fn world() -> FakeWorld {
    let mut host = FakeWorld::new("");
    host.install(&programs::test_plugin("hostile"), &["vm=victim"]);
    host
}

fn turn(host: &FakeWorld, hook: &str, harm: &str) {
    let (hook, harm) = (format!("hook={hook}"), format!("harm={harm}"));
    host.world().vm(&["plugin", "configure", "hostile", &hook, &harm]).run().exits(0);
}

#[test]
fn a_hostile_plugin_fails_its_own_vm_and_nobody_elses() {
    let mut host = world();
    host.start("");
    host.world().vm(&["create", "--name", "victim"]).run().exits(0);
    for (hook, harm) in HARMS {
        turn(&host, hook, harm);
        // Five traps in a row disable it, which is another test.
        host.world().vm(&["plugin", "enable", "hostile"]).run().exits(0);
        let victim = host.world().vm(&["start", "victim"]).within(SHORT).start();
        // Meanwhile others come and go.
        host.world().vm(&["create", "--name", "other", "--start"]).within(SHORT).run().exits(0);
        host.world().vm(&["delete", "--force", "other"]).within(SHORT).run().exits(0);
        let refused = victim.finish(SHORT);
        let refused = refused.must("is refused", |output| !output.status.success());
        refused.complains("hostile");
        if *harm != "refuse" {
            let state = host.world().state("victim");
            assert_ne!(state, "running", "{hook} {harm}");
        }
    }
    // Friendly again, all is well.
    turn(&host, "none", "none");
    host.world().vm(&["plugin", "enable", "hostile"]).run().exits(0);
    host.world().vm(&["start", "victim"]).within(SHORT).run().exits(0);
    host.world().vm(&["delete", "--force", "victim"]).run().exits(0);
    host.terminate();
    host.leaves_nothing();
}

#[test]
fn a_plugin_that_traps_again_and_again_is_disabled_visibly() {
    let mut host = world();
    host.start("");
    host.world().vm(&["create", "--name", "victim"]).run().exits(0);
    turn(&host, "preflight", "panic");
    for _ in 0..5 {
        let failed = host.world().vm(&["start", "victim"]).run();
        failed.must("fails", |output| !output.status.success()).complains("on purpose");
    }
    host.world().vm(&["plugin", "show", "hostile"]).run().exits(0).tells("on purpose");
    let doctor = host.world().vm(&["doctor"]).run();
    doctor.must("finds something", |output| !output.status.success()).tells("hostile");
    // It is required, so a VM does not start without it, and is told how it could.
    let failed = host.world().vm(&["start", "victim"]).run();
    failed.must("fails", |output| !output.status.success()).complains("vm plugin enable hostile");
    turn(&host, "none", "none");
    host.world().vm(&["plugin", "enable", "hostile"]).run().exits(0);
    host.world().vm(&["start", "victim"]).run().exits(0);
    host.world().vm(&["delete", "--force", "victim"]).run().exits(0);
    host.terminate();
    host.leaves_nothing();
}

#[test]
fn the_start_that_the_last_plugin_fails_leaves_nothing_of_the_others() {
    let mut host = world();
    host.install(&programs::test_plugin("effects"), &[]);
    host.start("");
    host.world().vm(&["create", "--name", "victim"]).run().exits(0);
    // Once, so that the bridge and what lives as long as the VM are there.
    host.world().vm(&["start", "victim"]).run().exits(0);
    host.world().vm(&["stop", "victim"]).run().exits(0);
    let before = Snapshot::take(host.world());
    turn(&host, "post-start", "error");
    let failed = host.world().vm(&["start", "victim"]).run();
    failed
        .must("fails", |output| !output.status.success())
        .complains("no, on purpose")
        .complains("be friendly");
    Snapshot::take(host.world()).must_equal(&before, "after a start that failed in the last plugin");
    host.world().vm(&["delete", "--force", "victim"]).run().exits(0);
    host.terminate();
    host.leaves_nothing();
}

#[test]
fn what_a_plugin_plans_lives_as_long_as_it_said() {
    let mut host = FakeWorld::new("");
    host.install(&programs::test_plugin("effects"), &[]);
    host.start("");
    let world = host.world();
    let nft = || world.tool("nft", &["list", "ruleset"]).run().exits(0).text();
    let route = || world.tool("ip", &["route", "show"]).run().exits(0).text();
    let files = || world.tool("find", &[&format!("{}/plugins/effects", world.dirs().state.display())]).run();
    world.vm(&["create", "--name", "a"]).run().exits(0);
    assert!(!nft().contains("192.0.2.0/24"));
    world.vm(&["start", "a"]).run().exits(0);
    assert!(nft().contains("192.0.2.0/24") && nft().contains("effects"), "{}", nft());
    assert!(route().contains("198.51.100.7"), "{}", route());
    files().exits(0).tells("/scratch.img").tells("/data.img").tells("/notes/run.txt").tells("/vm.txt");
    world.vm(&["stop", "a"]).run().exits(0);
    assert!(!nft().contains("192.0.2.0/24") && !route().contains("198.51.100.7"));
    let left = files().exits(0);
    left.tells("/data.img").tells("/vm.txt").must("what the run had is gone", |output| {
        let text = String::from_utf8_lossy(&output.stdout);
        !text.contains("scratch.img") && !text.contains("run.txt")
    });
    world.vm(&["delete", "a"]).run().exits(0);
    files()
        .exits(0)
        .must("the VM's are gone", |output| !String::from_utf8_lossy(&output.stdout).contains("data.img"));
    host.terminate();
    host.leaves_nothing();
}

#[test]
fn a_plan_is_shown_and_nothing_is_changed() {
    let mut host = FakeWorld::new("");
    host.install(&programs::test_plugin("effects"), &[]);
    host.start("");
    let before = Snapshot::take(host.world());
    let plan = host.world().vm(&["plan", "create", "a"]).run().exits(0);
    plan.tells("effects").tells("192.0.2.0/24").tells("scratch").tells("EFFECTS");
    Snapshot::take(host.world()).must_equal(&before, "after a plan");
    assert!(host.world().names().is_empty());
    host.terminate();
    host.leaves_nothing();
}

#[test]
fn without_plugins_a_vm_starts_and_reaches_nothing() {
    let mut host = FakeWorld::new("[plugins]\nbundled = \"/nonexistent\"\n");
    host.start("");
    let world = host.world();
    assert_eq!(world.ask(&["plugin", "ls"]), serde_json::json!([]));
    world.vm(&["create", "--name", "a", "--start"]).run().exits(0);
    let rules = world.tool("nft", &["list", "ruleset"]).run().exits(0).text();
    assert!(!rules.contains("masquerade"), "{rules}");
    let forward = world.tool("cat", &["/proc/sys/net/ipv4/ip_forward"]).run().exits(0).text();
    assert_eq!(forward.trim(), "0");
    world.vm(&["delete", "--force", "a"]).run().exits(0);
    host.terminate();
    host.leaves_nothing();
}

#[test]
fn a_changed_configuration_is_in_force_at_once() {
    let mut host = FakeWorld::new("");
    host.install(&programs::test_plugin("effects"), &["guest-port=80"]);
    host.start("");
    let world = host.world();
    let nft = || world.tool("nft", &["list", "ruleset"]).run().exits(0).text();
    world.vm(&["create", "--name", "a", "--start"]).run().exits(0);
    assert!(nft().contains(":80 ") || nft().contains(":80\n"), "{}", nft());
    world.vm(&["plugin", "configure", "effects", "guest-port=8080"]).run().exits(0).tells("a");
    wait_until("the port leads elsewhere", SHORT, || nft().contains(":8080"));
    // Removing a plugin takes its effects along, but not a disk from under a VM that is up.
    let refused = world.vm(&["plugin", "remove", "effects"]).run();
    refused.must("is refused", |output| !output.status.success()).complains("vm stop a");
    world.vm(&["stop", "a"]).run().exits(0);
    world.vm(&["plugin", "remove", "effects"]).run().exits(0);
    world.vm(&["start", "a"]).run().exits(0);
    assert!(!nft().contains("effects"), "{}", nft());
    world.vm(&["delete", "--force", "a"]).run().exits(0);
}

#[test]
fn messages_are_followed_until_the_plugin_is_gone() {
    let mut host = FakeWorld::new("");
    host.install(&programs::test_plugin("effects"), &[]);
    host.start("");
    let world = host.world();
    world.vm(&["create", "--name", "a", "--start"]).run().exits(0);
    let follow = || world.vm(&["plugin", "logs", "effects", "-f"]).start();
    let first = follow();
    world.vm(&["stop", "a"]).run().exits(0);
    first.expect("cleanup of a: stopped", SHORT);
    // Another one sees what was there before it came, and ends when it is told to.
    let mut second = follow();
    second.expect("cleanup of a: stopped", SHORT);
    second.signal(nix::sys::signal::Signal::SIGINT);
    second.finish(SHORT).exits(130);
    world.vm(&["delete", "a"]).run().exits(0);
    first.expect("cleanup of a: deleted", SHORT);
    world.vm(&["plugin", "remove", "effects"]).run().exits(0);
    first.finish(SHORT).exits(0);
    world.vm(&["plugin", "logs", "effects", "-f"]).run().exits(3).complains("effects");
    host.terminate();
}
