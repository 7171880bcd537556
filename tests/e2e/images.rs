//! Any image boots unmodified: with an init of its own, with a shell and no init, with neither.

use serde_json::json;
use vm_tests::{
    World, fixtures, wait_until,
    world::{BOOT, SHORT},
};

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
    world.disk_is_clean("a");
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
    world.disk_is_clean("s");
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
    world.disk_is_clean("b");
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
    world.disk_is_clean("p");
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

#[test]
fn a_running_vm_becomes_an_image() {
    let world = World::new();
    let small = ["--memory", "256M"];
    let made = |name: &str, image: &str| {
        let create = ["create", "--name", name, "--image", image, "--start"];
        world.vm(&[&create[..], &small].concat()).run().exits(0);
    };
    let ssh = |vm: &str, command: &str| world.vm(&["ssh", vm, command]).run();
    made("b", fixtures::BUSYBOX);
    ssh("b", "echo of the base > /old && sync").exits(0);
    let files = "cd /root && echo kept > file && chmod 4751 file && chown 12:34 file && ln file same && ln -s file link \
                 && mkfifo pipe && mkdir -m 1777 dir && truncate -s 100M sparse && echo end >> sparse \
                 && echo 10.9.8.7 mine >> /etc/hosts && echo temporary > /tmp/file && rm -f /old && touch -d '2001-02-03 04:05:06' file";
    ssh("b", files).exits(0);
    let told = |vm: &str| {
        ssh(vm, "cd /root && ls -ln && stat -c '%i %h' file same && md5sum sparse").exits(0).text()
    };
    let without_inodes = |text: String| -> Vec<String> {
        let same = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let lines: Vec<_> = text.lines().map(str::to_owned).collect();
        let inodes: Vec<_> =
            lines.iter().filter(|line| same(line).len() == 2 && line.ends_with(" 2")).collect();
        assert!(inodes.len() == 2 && inodes[0] == inodes[1], "one file: {text}");
        lines.iter().filter(|line| !inodes.contains(line)).cloned().collect()
    };
    let before = without_inodes(told("b"));
    world
        .vm(&["image", "commit", "b", "mine", "--message", "as it was"])
        .run()
        .exits(0)
        .says("mine:latest\n");
    assert_eq!(without_inodes(told("b")), before, "the VM is as it was");
    world.vm(&["pause", "b"]).run().exits(0);
    world.vm(&["image", "commit", "b", "other"]).within(SHORT).run().exits(4).complains("vm resume b");
    world.vm(&["resume", "b"]).run().exits(0);

    made("c", "mine");
    assert_eq!(without_inodes(told("c")), before);
    ssh("c", "test ! -e /old && test ! -e /tmp/file && cat /root/link").exits(0).says("kept\n");
    ssh("c", "test $(cat /etc/machine-id) != x && grep -c ' b$' /etc/hosts; grep -c mine /etc/hosts")
        .exits(0)
        .says("0\n1\n");
    let id = |vm: &str| ssh(vm, "cat /etc/machine-id").exits(0).text();
    assert_ne!(id("b"), id("c"));
    world.vm(&["image", "history", "mine"]).run().exits(0).tells("vm image commit b");
    let shown = world.ask(&["image", "show", "mine"]);
    assert_eq!(shown["origin"]["history"][0]["comment"], "as it was", "{shown}");

    // And is one like any other.
    let file = world.directory().join("mine.tar");
    world.vm(&["image", "export", "mine", &file.to_string_lossy()]).run().exits(0);
    world.vm(&["delete", "--force", "b"]).run().exits(0);
    world.vm(&["delete", "--force", "c"]).run().exits(0);
    world.vm(&["image", "delete", "mine"]).run().exits(0);
    world.vm(&["image", "import", &file.to_string_lossy(), "again"]).run().exits(0);
    assert_eq!(world.ask(&["image", "show", "again"])["digest"], shown["digest"]);
    world.vm(&["image", "delete", "again"]).run().exits(0);
    world.leaves_nothing();
}

#[test]
fn a_vm_that_is_off_becomes_an_image_and_stays_off() {
    let world = World::new();
    let create = ["create", "--name", "b", "--image", fixtures::BUSYBOX, "--memory", "256M", "--start"];
    world.vm(&create).run().exits(0);
    world.vm(&["ssh", "b", "echo kept > /root/file && mkdir /etc/own && chmod 700 /etc/own"]).run().exits(0);
    world.vm(&["stop", "b"]).run().exits(0);
    let changes = [
        "--change",
        "ENV GREETING=hello",
        "--change",
        "CMD [\"sh\", \"-c\", \"echo $GREETING; cat /root/file\"]",
    ];
    let commit = world.ask(&[&["image", "commit", "b", "mine"][..], &changes].concat());
    assert_eq!((&commit["references"], &commit["warnings"]), (&json!(["mine:latest"]), &json!([])));
    assert_eq!(world.state("b"), "stopped");
    world.disk_is_clean("b");
    world.vm(&["run", "--rm", "--image", "mine", "--memory", "256M"]).run().exits(0).says("hello\nkept\n");
    world
        .vm(&["image", "commit", "b", "mine", "--change", "RUN x"])
        .within(SHORT)
        .run()
        .exits(2)
        .complains("RUN x");
    world.vm(&["start", "b"]).run().exits(0);
    world.vm(&["ssh", "b", "stat -c %a /etc/own"]).run().exits(0).says("700\n");
    world.vm(&["delete", "--force", "b"]).run().exits(0);
    world.vm(&["image", "delete", "mine"]).run().exits(0);
    world.leaves_nothing();
}
