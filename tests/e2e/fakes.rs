//! Failures on demand: the daemon, its journal and its shims are real, the VMM and its guest play a part.

use std::{fs, process::Command};

use vm_tests::{World, fixtures, wait_until, world::SHORT};

/// A world whose VMM behaves so (see `FakeBehaviour` in `core/vmm`).
fn world(behaviour: &str, config: &str) -> World {
    let world = World::new();
    let program = world.directory().join("vmm");
    let fake = world.program("vm-fake-vmm");
    // Of two equal options the first holds.
    let script = format!("#!/bin/sh\nexec {} --behaviour '{behaviour}' \"$@\"\n", fake.display());
    let text = world.directory().join("vmm.sh");
    fs::write(&text, script).expect("a script can be written");
    // By another process: a child forked meanwhile would keep the program open for writing, thus not to be run.
    let install = Command::new("install").arg(text).arg(&program).status().expect("install can be run");
    assert!(install.success());
    world.configure(&format!("version = 1\n{config}\n[vmm]\nfake = \"{}\"\n", program.display()));
    world
}

fn create(name: &str) -> [&str; 6] {
    ["create", "--name", name, "--image", fixtures::BUSYBOX, "--start"]
}

#[test]
fn a_guest_that_never_answers() {
    let world = world(r#"{"boot":"silent"}"#, "[vm]\nstart_timeout_seconds = 1");
    let failed = world.vm(&create("a")).within(SHORT).run();
    failed.exits(6).complains("did not answer within 1 s").complains("booting").complains("hint");
    // Complete, but not started: it is there to be looked at, tried again and deleted.
    assert_eq!(world.state("a"), "failed");
    world.vm(&["logs", "a"]).run().exits(0).tells("booting");
    world.vm(&["start", "a"]).within(SHORT).run().exits(6);
    world.vm(&["delete", "a"]).run().exits(0);
    world.vm(&["run", "--image", fixtures::BUSYBOX, "--", "true"]).within(SHORT).run().exits(125);
    assert!(world.names().is_empty(), "what `vm run` made for itself is gone");
    world.leaves_nothing();
}

#[test]
fn a_guest_that_says_why_it_cannot() {
    let behaviour = r#"{"boot":{"fails":{"code":"root.mount","message":"no disk is called root"}}}"#;
    let world = world(behaviour, "");
    world
        .vm(&create("a"))
        .within(SHORT)
        .run()
        .must("fails", |output| !output.status.success())
        .complains("no disk is called root");
    world.leaves_nothing();
}

#[test]
fn a_vmm_that_crashes() {
    let world = world(r#"{"crash":{"at":"launch","end":{"code":3}}}"#, "");
    world
        .vm(&create("a"))
        .within(SHORT)
        .run()
        .exits(6)
        .complains("exit code 3")
        .complains("crashing as told");
    world.leaves_nothing();

    let world = self::world(r#"{"crash":{"at":"ready","end":{"signal":11}}}"#, "");
    world.vm(&["create", "--name", "a", "--image", fixtures::BUSYBOX]).run().exits(0);
    world.vm(&["start", "a"]).within(SHORT).run();
    let shown = world.wait_for_state("a", "failed");
    assert!(shown["cause"].as_str().unwrap_or_default().contains("signal 11"), "{shown}");
    world.leaves_nothing();
}

#[test]
fn a_guest_that_will_not_go_is_killed_after_its_grace() {
    let world = world(r#"{"ignore_shutdown":true,"ignore_power_button":true}"#, "");
    world.vm(&create("a")).within(SHORT).run().exits(0);
    let stopped = world.vm(&["stop", "--grace", "1", "a"]).within(SHORT).run().exits(0);
    assert!(stopped.took >= std::time::Duration::from_secs(1), "it got {:?}", stopped.took);
    assert_eq!(world.state("a"), "stopped");
    world.leaves_nothing();
}

#[test]
fn a_daemon_killed_at_any_moment_of_a_creation_leaves_nothing_behind() {
    // Long enough for the kill to come before the guest is ready, however late the look at the journal is.
    let world = world(r#"{"boot":{"ready_after":{"millis":3000}}}"#, "");
    for round in 0..8 {
        let running = world.vm(&create("a")).start();
        // Each round a little further: by how much of the journal there is.
        let steps = || {
            let journals = fs::read_dir(world.dirs().journals()).into_iter().flatten().flatten();
            let lines = journals.filter(|file| !file.file_name().to_string_lossy().starts_with("host"));
            lines
                .filter_map(|file| fs::read_to_string(file.path()).ok())
                .map(|text| text.lines().count())
                .sum::<usize>()
        };
        wait_until("the creation gets on", SHORT, || steps() > round * 2);
        world.kill(world.daemon_process());
        running.finish(SHORT).must("the client does not claim success", |output| !output.status.success());
        // The next daemon undoes what was half made, or finds it complete; either way it can be deleted.
        if world.names().iter().any(|name| name == "a") {
            world.vm(&["delete", "--force", "a"]).within(SHORT).run().exits(0);
        }
        assert!(world.names().is_empty());
    }
    world.leaves_nothing();
}

#[test]
fn many_vms_come_and_go() {
    let world = world("{}", "");
    let names: Vec<_> = (0..12).map(|number| format!("vm{number}")).collect();
    let running: Vec<_> = names.iter().map(|name| world.vm(&create(name)).start()).collect();
    for running in running {
        running.finish(SHORT).exits(0);
    }
    let shown = world.ask(&["ls"]);
    let mut addresses: Vec<_> =
        shown.as_array().unwrap().iter().map(|vm| vm["address"].to_string()).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), names.len(), "each has an address of its own: {shown}");
    world.leaves_nothing();
}
