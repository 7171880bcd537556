//! What VMs reach, and what the host's network has to say to it.

use vm_tests::{World, fixtures};

#[test]
fn host_and_guest_reach_each_other() {
    let world = World::new();
    world.vm(&["create", "--name", "a", "--memory", "512M", "--start"]).run().exits(0);
    let address = world.ask(&["show", "a"])["address"].as_str().unwrap().to_owned();
    world.vm(&["ssh", "a", "ip -4 -o address show scope global"]).run().exits(0).tells(&address);
    world.tool("busybox", &["ping", "-c", "1", "-W", "10", &address]).run().exits(0);
    world.vm(&["ssh", "a", "ip route get 192.0.2.1"]).run().exits(0).tells("via");
    world.vm(&["ssh", "a", "cat /etc/resolv.conf"]).run().exits(0).tells("nameserver");
    world.leaves_nothing();
}

#[test]
fn a_vm_without_a_network_can_be_logged_in_to() {
    let world = World::new();
    let command =
        ["run", "--rm", "--net", "none", "--image", fixtures::BUSYBOX, "--", "ls", "/sys/class/net"];
    world.vm(&command).run().exits(0).says("lo\n");
    world.leaves_nothing();
}

#[test]
fn a_subnet_that_clashes_is_refused_with_the_route() {
    let world = World::with_config("version = 1\n[network]\nsubnet = \"10.99.0.0/24\"\n");
    world.tool("ip", &["link", "add", "vpn0", "type", "bridge"]).run().exits(0);
    world.tool("ip", &["link", "set", "vpn0", "up"]).run().exits(0);
    world.tool("ip", &["route", "add", "10.99.0.0/16", "dev", "vpn0"]).run().exits(0);
    let refused = world.vm(&["create", "--name", "a", "--image", fixtures::BUSYBOX]).run();
    refused.exits(5).complains("10.99.0.0/16").complains("vpn0").complains("network.subnet");
    assert!(world.names().is_empty());
    world.vm(&["doctor"]).run().exits(1).tells("10.99.0.0/16");
    world.tool("ip", &["link", "delete", "vpn0"]).run().exits(0);
    world.vm(&["create", "--name", "a", "--image", fixtures::BUSYBOX]).run().exits(0);
    world.leaves_nothing();
}
