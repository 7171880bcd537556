//! Sessions with a VM that runs: dropped connections, OpenSSH through `vm proxy`.

use nix::sys::signal::Signal;
use vm_tests::{World, fixtures, world::SHORT};

#[test]
fn tmux_survives_a_dropped_connection() {
    let world = World::new();
    world.vm(&["create", "--name", "s", "--image", fixtures::SYSTEMD, "--start"]).run().exits(0);
    let mut first = world.vm(&["ssh", "-t", "s", "tmux new-session -s work"]).terminal(80, 24).start();
    first.expect("work", SHORT);
    first.type_in("M=mark; echo $M-$((40+2))\r");
    first.expect("mark-42", SHORT);
    first.signal(Signal::SIGKILL);
    first.finish(SHORT).dies_of(Signal::SIGKILL);

    let mut second = world.vm(&["ssh", "-t", "s", "tmux attach -t work"]).terminal(80, 24).start();
    second.expect("mark-42", SHORT);
    second.type_in("echo again-$M\r");
    second.expect("again-mark", SHORT);
    second.type_in("exit\r");
    second.finish(SHORT).exits(0);
    world.leaves_nothing();
}

#[test]
fn openssh_through_the_proxy() {
    let world = World::new();
    world.vm(&["create", "--name", "web", "--memory", "512M", "--start"]).run().exits(0);
    let config = world.directory().join("ssh_config");
    std::fs::write(&config, world.vm(&["ssh-config", "web"]).run().exits(0).stdout).unwrap();
    let config = config.to_string_lossy().into_owned();
    let ssh = |command: &str| world.tool("ssh", &["-F", &config, "web", command]);
    ssh("cat; exit 5").stdin("through the proxy").run().exits(5).says("through the proxy");
    // A host key that is another is refused.
    let wrong = ["-F", &config, "-o", "KnownHostsCommand=none", "web", "true"];
    world.tool("ssh", &wrong).run().exits(255).complains("Host key verification failed");
    world.leaves_nothing();
}
