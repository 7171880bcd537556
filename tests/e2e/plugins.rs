//! What plugins do for real VMs: networks beyond the bridge, names, disks that outlive a VM, files and variables.

use vm_tests::{World, fixtures, programs};

/// Another network, behind the host: somebody at 192.0.2.2 who does not know the guests' addresses.
fn outside(world: &World) {
    let script = "
        set -e
        mkdir -p /run/netns; mount -t tmpfs outside /run/netns; ip netns add outside
        ip link add up0 type veth peer name up1
        ip link set up1 netns outside
        ip address add 192.0.2.1/24 dev up0; ip link set up0 up
        ip -n outside address add 192.0.2.2/24 dev up1; ip -n outside link set up1 up
        ip -n outside address add 169.254.169.254/32 dev up1; ip route add 169.254.169.254 dev up0";
    world.tool("sh", &["-c", script]).run().exits(0);
}

fn not_outside(world: &World) {
    let script = "ip link delete up0; ip netns delete outside; umount /run/netns";
    world.tool("sh", &["-ec", script]).run().exits(0);
}

/// Where clouds tell a host its credentials.
const METADATA: &str = "busybox ping -c 1 -W 3 169.254.169.254";
const PING: &str = "busybox ping -c 1 -W 10 192.0.2.2";

#[test]
fn other_networks_are_reached_by_a_plugin_and_not_without() {
    let world = World::new();
    outside(&world);
    world.vm(&["create", "--name", "a", "--image", fixtures::BUSYBOX, "--start"]).run().exits(0);
    world.vm(&["ssh", "a", PING]).run().exits(0);
    let metadata = || world.vm(&["ssh", "a", METADATA]).run();
    metadata().must("is refused", |output| !output.status.success());
    world.vm(&["plugin", "configure", "nat", "link-local=true"]).run().exits(0);
    metadata().exits(0);
    world.vm(&["plugin", "configure", "nat", "--reset"]).run().exits(0);
    metadata().must("is refused again", |output| !output.status.success());
    world.vm(&["stop", "a"]).run().exits(0);
    world.vm(&["plugin", "disable", "nat"]).run().exits(0);
    world.vm(&["start", "a"]).run().exits(0);
    let lost = world.vm(&["ssh", "a", "busybox ping -c 1 -W 3 192.0.2.2"]).run();
    lost.must("reaches nobody", |output| !output.status.success());
    world.vm(&["plugin", "enable", "nat"]).run().exits(0);
    world.vm(&["delete", "--force", "a"]).run().exits(0);
    not_outside(&world);
    world.leaves_nothing();
}

#[test]
fn vms_have_names() {
    let world = World::new();
    world.vm(&["create", "--name", "a", "--memory", "512M", "--start"]).run().exits(0);
    let address = world.ask(&["show", "a"])["address"].as_str().unwrap().to_owned();
    world.vm(&["ssh", "a", "getent hosts a.vm"]).run().exits(0).tells(&address);
    // One that only has its record yet, by its short name.
    world.vm(&["create", "--name", "other", "--image", fixtures::BUSYBOX]).run().exits(0);
    let address = world.ask(&["show", "other"])["address"].as_str().unwrap().to_owned();
    world.vm(&["ssh", "a", "getent ahostsv4 other"]).run().exits(0).tells(&address);
    world.vm(&["ssh", "a", "getent hosts nobody.vm"]).run().exits(2);
    world.leaves_nothing();
}

#[test]
fn a_disk_outlives_its_vm_if_asked_to() {
    let world = World::new();
    let plugin = programs::bundled_plugin("work-disk");
    let install = [
        "plugin",
        "install",
        &plugin,
        "--grant",
        "all",
        "--config",
        "lifetime=kept",
        "--config",
        "size-gib=1",
    ];
    world.vm(&install).run().exits(0);
    let create = ["create", "--name", "a", "--memory", "512M", "--start"];
    world.vm(&create).run().exits(0);
    world.vm(&["ssh", "a", "findmnt -no FSTYPE /work && echo kept >/work/note"]).run().exits(0).tells("ext4");
    world.vm(&["stop", "a"]).run().exits(0);
    world.vm(&["delete", "a"]).run().exits(0);
    world.vm(&create).run().exits(0);
    world.vm(&["ssh", "a", "cat /work/note"]).run().exits(0).says("kept\n");
    // A running VM has it: it is not taken away.
    world.vm(&["delete", "--force", "a"]).run().exits(0);
    world.vm(&["plugin", "remove", "work-disk", "--purge"]).run().exits(0);
    world.leaves_nothing();
}

#[test]
fn a_guest_is_provisioned_and_oversize_is_refused() {
    let world = World::new();
    let config = world.directory().join("provision.json");
    let text = r#"{"files":[{"path":"/etc/motd","content":"hello from a plugin\n"}],
                   "environment":{"FROM_PLUGIN":"yes"},
                   "first-boot":[{"run":"echo once >>/root/first"}]}"#;
    std::fs::write(&config, text).unwrap();
    world.vm(&["plugin", "configure", "provision", "--file", config.to_str().unwrap()]).run().exits(0);
    world.vm(&["plugin", "configure", "limits", "max-cpus=3"]).run().exits(0);
    let refused = world.vm(&["create", "--name", "big", "--cpus", "4", "--image", fixtures::BUSYBOX]).run();
    refused.must("is refused", |output| !output.status.success()).complains("limits").complains("4");
    assert!(world.names().is_empty(), "nothing was made");
    world.vm(&["create", "--name", "a", "--memory", "512M", "--start"]).run().exits(0);
    world
        .vm(&["ssh", "a", "cat /etc/motd; echo $FROM_PLUGIN; cat /root/first"])
        .run()
        .exits(0)
        .says("hello from a plugin\nyes\nonce\n");
    world.vm(&["restart", "a"]).run().exits(0);
    world.vm(&["ssh", "a", "cat /root/first"]).run().exits(0).says("once\n");
    world.leaves_nothing();
}
