//! The checker that all other tests trust: it has to see one planted leftover of each kind, and nothing else.

use std::{fs, path::Path};

use nix::sys::signal::Signal;
use vm_tests::{FakeWorld, Running, World, snapshot, wait_until, world::SHORT};

/// What is new has to be of these kinds, each of them, and about `what`.
#[track_caller]
fn shows(host: &FakeWorld, kinds: &[&str], what: &str) {
    let leaks = host.leaks();
    for kind in kinds {
        let found = leaks.iter().any(|leak| leak.starts_with(&format!("new {kind} ")));
        assert!(found, "a planted {kind} ({what}) does not show in {leaks:#?}");
    }
    let foreign: Vec<_> = leaks
        .iter()
        .filter(|leak| {
            !leak.contains(what) || !kinds.iter().any(|kind| leak.starts_with(&format!("new {kind} ")))
        })
        .collect();
    assert!(foreign.is_empty(), "not planted, but reported: {foreign:#?}");
}

/// Plants something by the first command, looks, and takes it away by the second.
#[track_caller]
fn planted(host: &FakeWorld, plant: &str, remove: &str, kinds: &[&str], what: &str) {
    let shell = |line: &str| drop(host.world().tool("sh", &["-ec", line]).run().exits(0));
    host.leaves_nothing();
    shell(plant);
    shows(host, kinds, what);
    shell(remove);
    host.leaves_nothing();
}

#[test]
fn one_leak_of_each_kind_is_seen() {
    let host = FakeWorld::new("");
    let state = host.world().dirs().state.display().to_string();
    let run = host.world().dirs().run.display().to_string();
    let place = host.world().directory().join("planted-mount").display().to_string();

    planted(&host, "ip tuntap add vtplant mode tap", "ip link delete vtplant", &["link"], "vtplant");
    planted(
        &host,
        "ip link add vmbr-plant type bridge",
        "ip link delete vmbr-plant",
        &["link"],
        "vmbr-plant",
    );
    // The kernel adds a route to each address of its own accord.
    planted(
        &host,
        "ip address add 192.0.2.7/32 dev lo",
        "ip address delete 192.0.2.7/32 dev lo",
        &["address", "route"],
        "192.0.2.7",
    );
    planted(
        &host,
        "ip route add unreachable 198.51.100.0/24",
        "ip route delete unreachable 198.51.100.0/24",
        &["route"],
        "198.51.100.0",
    );
    planted(
        &host,
        "ip rule add from 203.0.113.0/24 lookup 77",
        "ip rule delete from 203.0.113.0/24",
        &["rule"],
        "203.0.113.0",
    );
    planted(&host, "nft add table inet planted", "nft delete table inet planted", &["nft"], "planted");
    let shell = |line: &str| drop(host.world().tool("sh", &["-ec", line]).run().exits(0));
    // A rule alone, in a chain that was there before.
    shell("nft add table inet earlier; nft add chain inet earlier rules");
    let before = vm_tests::Snapshot::take(host.world());
    shell("nft add rule inet earlier rules tcp dport 4711 accept");
    let leaks = vm_tests::Snapshot::take(host.world()).difference(&before);
    assert!(leaks.len() == 1 && leaks[0].starts_with("new nft") && leaks[0].contains("4711"), "{leaks:#?}");
    shell("nft delete table inet earlier");

    planted(
        &host,
        &format!("mkdir {place} && mount -t tmpfs planted {place}"),
        &format!("umount {place} && rmdir {place}"),
        &["mount"],
        "planted-mount",
    );
    planted(&host, &format!("touch {state}/planted"), &format!("rm {state}/planted"), &["state"], "planted");
    planted(
        &host,
        &format!("mkdir -p {run}/vms/planted"),
        &format!("rmdir {run}/vms/planted"),
        &["run"],
        "planted",
    );
    let cgroups = cgroups(&host);
    assert!(cgroups > 0 || no_cgroups(), "a control group can be made here, but none was");
}

#[test]
fn a_setting_a_process_and_a_loop_device_are_seen() {
    let host = FakeWorld::new("");
    let shell = |line: &str| drop(host.world().tool("sh", &["-ec", line]).run().exits(0));
    // What is gone is as telling as what is new.
    shell("echo 5 > /proc/sys/net/ipv4/igmp_max_memberships");
    let leaks = host.leaks();
    assert!(leaks.len() == 2, "{leaks:#?}");
    assert!(leaks.iter().all(|leak| leak.contains("sysctl ipv4/igmp_max_memberships:")), "{leaks:#?}");
    shell("echo 20 > /proc/sys/net/ipv4/igmp_max_memberships");
    host.leaves_nothing();

    let mut sleeper: Running = host.world().tool("sleep", &["4711"]).start();
    wait_until("the process is itself", SHORT, || {
        host.leaks().iter().any(|leak| leak.contains("sleep 4711"))
    });
    shows(&host, &["process"], "sleep 4711");
    sleeper.signal(Signal::SIGKILL);
    sleeper.finish(SHORT);
    host.leaves_nothing();

    loop_device(host.world(), &host);
}

fn loop_device(world: &World, host: &FakeWorld) {
    let file = world.directory().join("planted.raw");
    fs::write(&file, vec![0; 1 << 20]).expect("a file can be written");
    let made = world.tool("losetup", &["--find", "--show", &file.to_string_lossy()]).run();
    if !made.status.success() {
        loudly("this host makes no loop devices, so none was planted");
        return;
    }
    let device = made.text().trim().to_owned();
    shows(host, &["loop"], "planted.raw");
    world.tool("losetup", &["--detach", &device]).run().exits(0);
    // The kernel lets go of it when its last user, such as a prober of the host's, has.
    wait_until("the loop device is gone", SHORT, || host.leaks().is_empty());
}

/// In each hierarchy where that can be done; how many.
fn cgroups(host: &FakeWorld) -> usize {
    let instance = host.world().instance().expect("a daemon has lived here");
    let mut planted = 0;
    for root in snapshot::cgroup_roots() {
        let group = root.join(format!("vmd-{instance}-planted"));
        if let Err(error) = fs::create_dir(&group) {
            loudly(&format!("no control group was planted in {}: {error}", root.display()));
            continue;
        }
        planted += 1;
        let leaks = host.leaks();
        fs::remove_dir(&group).expect("an empty control group can be removed");
        let expected = format!("new cgroup {}", group.display());
        assert_eq!(leaks, [expected]);
    }
    host.leaves_nothing();
    planted
}

fn no_cgroups() -> bool {
    snapshot::cgroup_roots().iter().all(|root| {
        rustix::fs::access(root, rustix::fs::Access::WRITE_OK).is_err() || !Path::new(root).is_dir()
    })
}

fn loudly(what: &str) {
    crate::say(&format!("NOT TESTED HERE: {what}"));
}
