//! VMs that outlive commands, and what `vm` says of them.

use vm_tests::{World, fixtures, world::SHORT};

#[test]
fn what_is_shown_is_json_where_asked_for() {
    let world = World::new();
    assert_eq!(world.ask(&["ls"]), serde_json::json!([]));
    world.vm(&["create", "--name", "a", "--image", fixtures::BUSYBOX, "--label", "team=x"]).run().exits(0);
    let listed = world.ask(&["ls"]);
    assert_eq!(listed[0]["name"], "a");
    assert_eq!(listed[0]["labels"]["team"], "x");
    assert_eq!(world.ask(&["show", "a"])["state"], "stopped");
    world.vm(&["ls"]).run().exits(0).tells("stopped");
    world.vm(&["show", "a"]).run().exits(0).tells("team=x");
    let version = world.ask(&["version"]);
    assert_eq!(version["version"], version["daemon"]["version"]);
    let error = world.vm(&["show", "b", "--json"]).run().exits(3);
    let problem: serde_json::Value = serde_json::from_slice(&error.stderr).unwrap();
    assert!(problem.to_string().contains("not_found"), "{problem}");
    world.leaves_nothing();
}

#[test]
fn a_running_vm_is_guarded_and_powers_off_from_within() {
    let world = World::new();
    world
        .vm(&["create", "--name", "b", "--image", fixtures::BUSYBOX, "--memory", "256M", "--start"])
        .run()
        .exits(0);
    world.vm(&["start", "b"]).run().exits(4).complains("b is running");
    world.vm(&["delete", "b"]).run().exits(4).complains("--force");
    world.vm(&["logs", "b"]).run().exits(0);
    // Whatever the session says when the VM goes: it ends, and the VM is off and not failed.
    world.vm(&["ssh", "b", "poweroff"]).within(SHORT).run();
    let shown = world.wait_for_state("b", "stopped");
    assert_eq!(shown["last_exit"]["code"], 0, "{shown}");
    world.vm(&["start", "b"]).run().exits(0);
    world.vm(&["kill", "b"]).run().exits(0);
    assert_eq!(world.state("b"), "stopped");
    world.vm(&["stop", "b"]).run().exits(0);
    world.vm(&["ssh", "b", "true"]).run().exits(125).complains("hint");
    world.leaves_nothing();
}

#[test]
#[ignore = "takes minutes"]
fn up_and_down_many_times() {
    let world = World::new();
    world.vm(&["create", "--name", "b", "--image", fixtures::SYSTEMD]).run().exits(0);
    for round in 0..10 {
        world.vm(&["start", "b"]).run().exits(0);
        world
            .vm(&["ssh", "b", &format!("echo {round} >> /root/rounds; wc -l < /root/rounds")])
            .run()
            .exits(0)
            .says(&format!("{}\n", round + 1));
        match round % 3 {
            0 => world.vm(&["stop", "b"]).run().exits(0),
            1 => world.vm(&["ssh", "b", "sync"]).run().exits(0),
            // An operation of the guest's own.
            _ => world.vm(&["ssh", "b", "systemctl poweroff"]).within(SHORT).run(),
        };
        if round % 3 == 1 {
            world.vm(&["kill", "b"]).run().exits(0);
        }
        world.wait_for_state("b", "stopped");
    }
    world.leaves_nothing();
}
