//! Any image boots unmodified: with an init of its own, with a shell and no init, with neither.

use serde_json::json;
use vm_tests::{
    World, fixtures, wait_until,
    world::{BOOT, SHORT},
};

/// What `e2fsck` says of a disk that was unmounted cleanly.
#[track_caller]
fn disk_is_clean(world: &World, vm: &str) {
    let disk = world.paths(vm).disk();
    world.tool("e2fsck", &["-fn", &disk.to_string_lossy()]).run().exits(0);
}

#[track_caller]
fn main_job(world: &World, image: &str, cat: &[&str]) {
    let mut command = vec!["run", "--rm", "--image", image, "--"];
    command.extend(cat);
    world.vm(&command).stdin("hi\n").run().exits(0).says("hi\n");
}

#[test]
fn debian_stops_cleanly_and_keeps_its_files() {
    let world = World::new();
    world.vm(&["create", "--name", "a"]).run().exits(0).says("a\n");
    assert_eq!(world.state("a"), "stopped");
    world.vm(&["start", "a"]).run().exits(0).says("a\n");
    assert_eq!(world.state("a"), "running");
    let fill = "dd if=/dev/urandom of=/root/big bs=1M count=32 2>/dev/null; sha256sum /root/big";
    let sum = world.vm(&["ssh", "a", fill]).run().exits(0).text();
    world.vm(&["stop", "a"]).run().exits(0).says("a\n");
    assert_eq!(world.state("a"), "stopped");
    disk_is_clean(&world, "a");
    world.vm(&["start", "a"]).run().exits(0);
    world.vm(&["ssh", "a", "sha256sum /root/big"]).run().exits(0).says(&sum);
    world.leaves_nothing();
}

#[test]
fn systemd_with_its_own_sshd_and_firewall() {
    let world = World::new();
    main_job(&world, fixtures::SYSTEMD, &["cat"]);
    world.vm(&["create", "--name", "s", "--image", fixtures::SYSTEMD, "--start"]).run().exits(0);
    let ssh = |command: &str| world.vm(&["ssh", "s", command]).run();
    ssh("readlink /proc/1/exe").exits(0).tells("systemd");
    // The agent is there before systemd has a bus.
    wait_until("systemd is on its bus", BOOT, || ssh("systemctl is-system-running").text() != "");
    ssh("systemctl is-system-running --wait || systemctl --failed --no-legend >&2")
        .exits(0)
        .says("running\n");
    ssh("systemctl is-active nftables ssh").exits(0).says("active\nactive\n");
    ssh("exec 3<>/dev/tcp/127.0.0.1/22; head -c 7 <&3").exits(0).says("SSH-2.0");
    // A firewall that drops everything does not cut us off.
    ssh("nft 'add table inet t; add chain inet t c { type filter hook input priority 0; policy drop; }'")
        .exits(0);
    ssh("echo still here; exit 7").exits(7).says("still here\n");
    world.vm(&["stop", "s"]).run().exits(0);
    let shown = world.ask(&["show", "s"]);
    assert_eq!(shown["last_exit"]["code"], 0, "it powered off by itself: {shown}");
    disk_is_clean(&world, "s");
    world.leaves_nothing();
}

#[test]
fn a_busybox_tree() {
    let world = World::new();
    let image = fixtures::BUSYBOX;
    main_job(&world, image, &["cat"]);
    world.vm(&["create", "--name", "b", "--image", image, "--memory", "256M", "--start"]).run().exits(0);
    world.vm(&["ssh", "b", "uname -s; echo kept > /root/file; exit 7"]).run().exits(7).says("Linux\n");
    world.vm(&["stop", "b"]).run().exits(0);
    disk_is_clean(&world, "b");
    world.vm(&["start", "b"]).run().exits(0);
    world.vm(&["ssh", "b", "cat /root/file"]).run().exits(0).says("kept\n");
    world.leaves_nothing();
}

#[test]
fn a_single_static_binary() {
    let world = World::new();
    let image = fixtures::STATIC;
    main_job(&world, image, &["/prog", "cat"]);
    world.vm(&["run", "--rm", "--image", image, "--", "/prog", "exit", "7"]).run().exits(7);
    world.vm(&["create", "--name", "p", "--image", image, "--memory", "256M", "--start"]).run().exits(0);
    world.vm(&["ssh", "p", "/prog", "write", "/kept", "text"]).run().exits(0);
    world.vm(&["ssh", "p"]).stdin("").run().exits(127).complains("no shell");
    world.vm(&["stop", "p"]).run().exits(0);
    disk_is_clean(&world, "p");
    let disk = world.paths("p").disk();
    world.tool("debugfs", &["-R", "cat /kept", &disk.to_string_lossy()]).run().exits(0).says("text");
    world.leaves_nothing();
}

#[test]
fn images_are_listed_and_deleted_by_name() {
    let world = World::new();
    let listed = world.ask(&["image", "ls"]);
    let names: Vec<_> =
        listed.as_array().unwrap().iter().map(|image| image["references"][0].as_str().unwrap()).collect();
    assert!(names.iter().any(|name| name.starts_with("debian:bookworm")), "{names:?}");
    world.vm(&["create", "--name", "b", "--image", fixtures::BUSYBOX]).run().exits(0);
    world.vm(&["image", "delete", fixtures::BUSYBOX]).run().exits(4).complains("hint");
    world.vm(&["delete", "b"]).run().exits(0);
    world.vm(&["image", "delete", fixtures::BUSYBOX]).within(SHORT).run().exits(0);
    world.vm(&["image", "delete", fixtures::BUSYBOX]).within(SHORT).run().exits(3);
    world.vm(&["daemon", "stop"]).run().exits(0);
}

#[test]
fn a_file_of_the_hosts_is_registered_used_in_place_and_promoted() {
    let world = World::new();
    let digest =
        world.ask(&["image", "show", fixtures::BUSYBOX])["digest"].as_str().expect("a digest").to_owned();
    let file = world.directory().join("mine.ext4");
    let path = file.to_str().expect("UTF-8");
    std::fs::copy(world.dirs().image_rootfs(&digest.parse().unwrap()), &file).expect("it can be copied");
    // Another content than that of the image it is a copy of.
    world.tool("debugfs", &["-w", "-R", "mkdir /mine", path]).run().exits(0);
    let kernel = world.ask(&["kernel", "ls"])[0]["id"].as_str().expect("an id").to_owned();
    let register = || world.vm(&["image", "register", path, "--kernel", &kernel, "--name", "mine"]).run();
    register().exits(0).says("mine:latest\n");
    let shown = world.ask(&["image", "show", "mine"]);
    assert_eq!((&shown["registered"]["path"], &shown["kernel"]), (&json!(path), &json!(kernel)));

    let before = std::fs::read(&file).expect("it can be read");
    world.vm(&["create", "--name", "m", "--image", "mine", "--memory", "256M", "--start"]).run().exits(0);
    world.vm(&["ssh", "m", "rmdir /mine && echo kept > /kept && sync"]).run().exits(0);
    world.vm(&["stop", "m"]).run().exits(0);
    assert!(std::fs::read(&file).expect("it can be read") == before, "it is never written");

    world.vm(&["image", "tag", "mine", "fixed"]).run().exits(0);
    world.vm(&["image", "promote", "mine"]).run().exits(0);
    std::fs::remove_file(&file).expect("it can be removed");
    assert!(world.ask(&["image", "show", "fixed"]).get("registered").is_none());
    world.vm(&["start", "m"]).run().exits(0);
    world.vm(&["ssh", "m", "cat /kept"]).run().exits(0).says("kept\n");
    world
        .vm(&["run", "--rm", "--image", "fixed", "--memory", "256M", "--", "ls", "-d", "/mine"])
        .run()
        .exits(0);

    // One that changes underneath.
    std::fs::write(&file, &before).expect("it can be written");
    world.tool("debugfs", &["-w", "-R", "mkdir /other", path]).run().exits(0);
    world.vm(&["image", "register", path, "--name", "other"]).run().exits(0);
    world.tool("debugfs", &["-w", "-R", "mkdir /more", path]).run().exits(0);
    let create = || world.vm(&["create", "--name", "o", "--image", "other"]).run();
    create().exits(7).complains("has changed").complains("image promote");
    world.vm(&["image", "promote", "other"]).run().exits(7).complains("has changed");
    register().exits(0);
    world.vm(&["image", "delete", "other", "mine"]).run().exits(0);
    assert!(file.is_file(), "it is never deleted");
    world.vm(&["delete", "--force", "m"]).run().exits(0);
    world.vm(&["image", "delete", "fixed"]).run().exits(0);
    world.leaves_nothing();
}
