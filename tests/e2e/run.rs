//! `vm run`: the command's streams, exit code, signals and surroundings, exactly.

use nix::sys::signal::Signal;
use sha2::{Digest, Sha256};
use vm_tests::{
    World,
    world::{BOOT, SHORT},
};

#[test]
fn the_main_job() {
    let world = World::new();
    let host = world.tool("uname", &["-r"]).run().exits(0).text();
    let command = ["run", "--rm", "--image", "debian:bookworm", "--", "sh", "-c", "uname -r; exit 7"];
    let output = world.vm(&command).run().exits(7);
    let kernels = world.ask(&["kernel", "ls"]);
    assert_eq!(output.text().trim(), kernels[0]["release"], "the guest runs the catalogue's kernel");
    assert_ne!(output.text(), host, "that is not the host's kernel");

    world.vm(&["run", "--rm", "--", "cat"]).stdin("hi\n").run().exits(0).says("hi\n");

    let output = world.vm(&["run", "--rm", "--", "sh", "-c", "echo to-out; echo to-err >&2"]).run().exits(0);
    let output = output.says("to-out\n").complains("to-err");
    assert!(!output.text().contains("to-err"), "the streams are apart");
    world.leaves_nothing();
}

#[test]
fn ten_mebibytes_come_back_the_same() {
    let world = World::new();
    let mut data = vec![0; 10 << 20];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut data).unwrap();
    let sum: String = Sha256::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect();
    let command = "tee /tmp/got; sha256sum /tmp/got >&2";
    let output =
        world.vm(&["run", "--rm", "--", "sh", "-c", command]).stdin(data).run().exits(0).complains(&sum);
    let back: String = Sha256::digest(&output.stdout).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(back, sum, "{} bytes came back", output.stdout.len());
    world.leaves_nothing();
}

#[test]
fn surroundings_and_exit_codes() {
    let world = World::new();
    world
        .vm(&["create", "--name", "a", "--start", "--memory", "512M", "--cpus", "1"])
        .run()
        .exits(0)
        .says("a\n");
    let ssh = |command: &str| world.vm(&["ssh", "a", command]).run();
    ssh("nproc; hostname").exits(0).says("1\na\n");
    ssh("exit 255").exits(255);
    ssh("kill -TERM $$").exits(143);
    ssh("kill -KILL $$").exits(137);
    ssh("/etc/passwd").exits(126);
    ssh("no-such-command").exits(127);
    ssh("test -t 0 || echo none").exits(0).says("none\n");
    ssh("echo ${HOME}; id -un").exits(0).says("/root\nroot\n");
    world
        .vm(&["ssh", "--env", "A=b c", "--env", "PASSED", "a", "echo \"$A\" $PASSED"])
        .env("PASSED", "on")
        .run()
        .exits(0)
        .says("b c on\n");
    ssh("useradd -m -s /bin/sh dev").exits(0);
    world
        .vm(&["ssh", "--user", "dev", "a", "id -un; pwd; echo $HOME"])
        .run()
        .exits(0)
        .says("dev\n/home/dev\n/home/dev\n");
    world.vm(&["ssh", "--user", "nobody-of-that-name", "a", "true"]).run().exits(125);
    let report = world.vm(&["--json", "ssh", "a", "echo out; echo err >&2; exit 3"]).run().exits(3).json();
    assert_eq!(report["stdout"], "out\n");
    assert_eq!(report["stderr"], "err\n");
    assert_eq!(report["exit_code"], 3);
    world.leaves_nothing();
}

#[test]
fn run_takes_environment_directory_and_arguments_as_they_are() {
    let world = World::new();
    let script = r#"printf '%s|' "$A" "$(pwd)" "$(id -un)" "$@"; exit 4"#;
    let command = [
        "run",
        "--rm",
        "-e",
        "A=x y",
        "-w",
        "/usr/share",
        "-u",
        "daemon",
        "--",
        "sh",
        "-c",
        script,
        "sh",
        "a b",
        "",
        "$HOME *",
    ];
    world.vm(&command).run().exits(4).says("x y|/usr/share|daemon|a b||$HOME *|");
    let refused = world.vm(&["run", "--rm", "-w", "/nowhere", "--", "true"]).run();
    refused.exits(126).complains("/nowhere");
    world.leaves_nothing();
}

#[test]
fn commands_that_cannot_be_run() {
    let world = World::new();
    world.vm(&["run", "--rm", "--", "no-such-command"]).run().exits(127).complains("no-such-command");
    world.vm(&["run", "--rm", "--", "/etc/passwd"]).run().exits(126).complains("/etc/passwd");
    world.leaves_nothing();
}

#[test]
fn signals_reach_the_command() {
    let world = World::new();
    let script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let mut running = world.vm(&["run", "--rm", "--", "sh", "-c", script]).start();
    running.expect("ready\n", BOOT);
    running.signal(Signal::SIGINT);
    running.finish(SHORT).exits(9).tells("caught\n");
    world.leaves_nothing();
}

#[test]
fn a_terminal_has_our_size_and_follows_it() {
    let world = World::new();
    let script = "trap 'stty size' WINCH; tty; stty size; echo ready; while :; do sleep 0.1; done";
    let mut running = world.vm(&["run", "--rm", "-t", "--", "sh", "-c", script]).terminal(91, 23).start();
    running.expect("ready", BOOT);
    running.expect("/dev/pts/", SHORT).expect("23 91", SHORT);
    running.resize(77, 31);
    running.expect("31 77", SHORT);
    // Typed, not sent: the guest's terminal makes a signal of it.
    running.type_in("\u{3}");
    running.finish(SHORT).exits(130);
    world.leaves_nothing();
}

#[test]
fn a_client_that_vanishes_takes_its_vm_along() {
    let world = World::new();
    let mut running = world.vm(&["run", "--", "sh", "-c", "echo ready; sleep 1000"]).start();
    running.expect("ready\n", BOOT);
    assert_eq!(world.names().len(), 1);
    running.signal(Signal::SIGKILL);
    running.finish(SHORT).dies_of(Signal::SIGKILL);
    vm_tests::wait_until("the VM of a killed client is gone", SHORT, || world.names().is_empty());

    // The same while the VM boots, and by Ctrl-C.
    let mut running = world.vm(&["run", "--", "true"]).start();
    vm_tests::wait_until("the VM is on its way", SHORT, || world.names().len() == 1);
    running.signal(Signal::SIGKILL);
    running.finish(SHORT).dies_of(Signal::SIGKILL);
    vm_tests::wait_until("the VM of a killed client is gone", SHORT, || world.names().is_empty());

    let mut running = world.vm(&["run", "--", "true"]).start();
    vm_tests::wait_until("the VM is on its way", SHORT, || world.names().len() == 1);
    running.signal(Signal::SIGINT);
    running.finish(SHORT).exits(130);
    assert_eq!(world.names(), Vec::<String>::new(), "nothing is left when the client has ended");
    world.leaves_nothing();
}

#[test]
fn a_vmm_that_dies_under_a_command_is_told() {
    let world = World::new();
    let running = world.vm(&["run", "--name", "a", "--", "sh", "-c", "echo ready; sleep 1000"]).start();
    running.expect("ready\n", BOOT);
    world.kill(world.vmm_pid("a"));
    running.finish(SHORT).exits(125).complains("VM a").complains("signal 9");
    let shown = world.wait_for_state("a", "failed");
    assert!(shown["cause"].as_str().unwrap_or_default().contains("signal 9"), "{shown}");
    world.vm(&["start", "a"]).run().exits(0);
    world.vm(&["ssh", "a", "echo again"]).run().exits(0).says("again\n");
    world.leaves_nothing();
}
