//! The daemon may die at any instant; VMs, their logs and their fate outlive it.

use std::fs;

use nix::sys::signal::Signal;
use vm_tests::{
    World, fixtures, wait_until,
    world::{BOOT, SHORT},
};

#[test]
fn killed_during_a_console_flood() {
    let world = World::with_config("version = 1\n[vm]\nconsole_log_kib = 64\n");
    world
        .vm(&["create", "--name", "a", "--image", fixtures::BUSYBOX, "--memory", "256M", "--start"])
        .run()
        .exits(0);
    let paths = world.paths("a");
    let flood = "n=0; while :; do n=$((n+1)); echo flood-$n > /dev/ttyS0; done";
    world.vm(&["ssh", "a", &format!("setsid sh -c '{flood}' >/dev/null 2>&1 </dev/null &")]).run().exits(0);
    let log = || fs::read_to_string(paths.console_log()).unwrap_or_default();
    let newest = || {
        log().lines().rev().skip(1).find_map(|line| line.trim().strip_prefix("flood-")?.parse::<u64>().ok())
    };
    wait_until("the flood reaches the log", SHORT, || newest().is_some());
    world.kill(world.daemon_pid());

    // Without a daemon the log goes on, rotates, and keeps its bound.
    let bound = || {
        let size = |path: &std::path::Path| fs::metadata(path).map_or(0, |about| about.len());
        let older = paths.console_log().with_extension("log.1");
        let total = size(&paths.console_log()) + size(&older);
        assert!(total <= 64 << 10, "the log has {total} bytes");
        older.exists()
    };
    let before = newest().unwrap_or_default();
    wait_until("the log goes on", BOOT, || bound() && newest().is_some_and(|now| now > before + 100));

    // A new daemon finds the VM.
    assert_eq!(world.state("a"), "running");
    world.vm(&["ssh", "a", "echo adopted"]).run().exits(0).says("adopted\n");
    world.vm(&["logs", "a"]).run().exits(0).tells("flood-");
    bound();
    world.leaves_nothing();
}

#[test]
fn a_vmm_that_dies_without_or_with_a_daemon_is_reported() {
    let world = World::new();
    world
        .vm(&["create", "--name", "a", "--image", fixtures::BUSYBOX, "--memory", "256M", "--start"])
        .run()
        .exits(0);
    let vmm = world.vmm_pid("a");
    world.kill(world.daemon_pid());
    world.kill(vmm);
    let shown = world.wait_for_state("a", "failed");
    assert!(shown["cause"].as_str().unwrap_or_default().contains("signal 9"), "{shown}");

    world.vm(&["start", "a"]).run().exits(0);
    world.kill(world.vmm_pid("a"));
    let shown = world.wait_for_state("a", "failed");
    assert!(shown["cause"].as_str().unwrap_or_default().contains("signal 9"), "{shown}");
    world.vm(&["delete", "a"]).run().exits(0);
    world.leaves_nothing();
}

#[test]
fn told_to_end_it_leaves_vms_alone() {
    let world = World::new();
    world
        .vm(&["create", "--name", "a", "--image", fixtures::BUSYBOX, "--memory", "256M", "--start"])
        .run()
        .exits(0);
    let vmm = world.vmm_pid("a");
    world.vm(&["daemon", "stop"]).run().exits(0);
    world.vm(&["--no-start", "ls"]).run().exits(9).complains("daemon start");
    assert!(world.namespaces().processes().iter().any(|process| process.outside == vmm), "the VM runs on");
    assert_eq!(world.vmm_pid("a"), vmm, "and is the same for the next daemon");
    world.vm(&["ssh", "a", "echo there"]).run().exits(0).says("there\n");
    world.leaves_nothing();
}

#[test]
fn a_client_killed_while_no_daemon_runs_takes_its_vm_along() {
    let world = World::new();
    let script =
        ["run", "--image", fixtures::BUSYBOX, "--memory", "256M", "--", "sh", "-c", "echo ready; sleep 1000"];
    let mut running = world.vm(&script).start();
    running.expect("ready\n", BOOT);
    world.kill(world.daemon_pid());
    running.signal(Signal::SIGKILL);
    running.finish(SHORT).dies_of(Signal::SIGKILL);
    wait_until("the next daemon deletes the VM", SHORT, || world.names().is_empty());
    world.leaves_nothing();
}

#[test]
fn a_run_whose_daemon_was_killed_deletes_its_vm_and_keeps_its_exit_code() {
    let world = World::new();
    let script = "echo ready; read go; exit 7";
    let mut running = world
        .vm(&["run", "--image", fixtures::BUSYBOX, "--memory", "256M", "--", "sh", "-c", script])
        .open_stdin()
        .start();
    running.expect("ready\n", BOOT);
    world.kill(world.daemon_pid());
    running.type_in("\n");
    running.finish(SHORT).exits(7);
    // At once, and by the run itself: whoever asks for the names starts no daemon that does it.
    world.vm(&["--no-start", "ls", "-q"]).run().exits(0).says("");
    world.leaves_nothing();
}

#[test]
fn a_second_daemon_on_the_same_directories_is_refused() {
    let world = World::new();
    world.vm(&["daemon", "start"]).run().exits(0);
    let pid = world.ask(&["daemon", "status"])["pid"].to_string();
    world.vmd(&["serve"]).run().exits(1).complains(&format!("pid {pid}")).complains("hint");
    let other = world.second_dirs();
    let run = other.run.to_string_lossy().into_owned();
    world.vmd(&["serve", "--run-dir", &run]).run().exits(1).complains("already serves");
    world.vm(&["ls"]).run().exits(0);
    world.leaves_nothing();
}

#[test]
fn two_daemons_side_by_side_do_not_see_each_other() {
    let world = World::new();
    let other = world.second_dirs();
    let create = ["create", "--name", "same", "--image", fixtures::BUSYBOX, "--memory", "256M", "--start"];
    world.vm(&create).run().exits(0);
    world.vm_at(&other, &create).run().exits(0);
    let address =
        |dirs| world.vm_at(dirs, &["show", "same", "--json"]).run().exits(0).json()["address"].clone();
    assert_ne!(address(world.dirs()), address(&other), "each has a subnet of its own");
    world.vm(&["delete", "--force", "same"]).run().exits(0);
    world.vm_at(&other, &["ssh", "same", "echo untouched"]).run().exits(0).says("untouched\n");
    world.vm_at(&other, &["delete", "--force", "same"]).run().exits(0);
    world.vm_at(&other, &["daemon", "stop"]).run().exits(0);
    world.leaves_nothing();
}

#[test]
fn the_doctor_works_with_and_without_a_daemon() {
    let world = World::new();
    let checks = |findings: serde_json::Value| -> Vec<String> {
        let names =
            findings.as_array().unwrap().iter().map(|finding| finding["check"].as_str().unwrap().to_owned());
        names.collect()
    };
    let without = checks(world.ask(&["doctor"]));
    assert_eq!(world.vm(&["daemon", "status"]).run().status.code(), Some(3), "it started none");
    world.vm(&["daemon", "start"]).run().exits(0);
    // What only the daemon knows comes last.
    let known = ["daemon.recovery", "daemon.leftovers", "daemon.names"].map(str::to_owned);
    let with = checks(world.ask(&["doctor"]));
    let (first, plugins) = with.split_at(without.len() + known.len());
    assert_eq!(first, [without.as_slice(), &known].concat());
    assert!(plugins.iter().all(|name| name.starts_with("plugin.")), "{plugins:?}");
    for plugin in ["plugin.nat", "plugin.zone"] {
        assert!(plugins.iter().any(|name| name == plugin), "{plugin} is not among {plugins:?}");
    }
    for check in ["vmm.qemu", "vmm.kvm", "network.subnet", "disk.space", "daemon.socket", "guest.agent"] {
        assert!(without.iter().any(|name| name == check), "{check} is not among {without:?}");
    }
    let blind = world.vm(&["doctor"]).env("PATH", "/nonexistent").run();
    blind.must("the tools' absence is nothing it dies of", |output| output.status.code().is_some());
    world.leaves_nothing();
}

#[test]
fn a_wrong_configuration_is_named() {
    let world = World::new();
    world.configure("version = 1\n[vm]\nmemry_mib = 5\n");
    world.vm(&["ls"]).run().exits(9).complains("memry_mib").complains("hint");
    world.configure("version = 2\n");
    world.vm(&["ls"]).run().exits(9).complains("version 2");
    world.configure("");
    world.leaves_nothing();
}
