//! VMMs that need KVM. Firecracker is tested where there is a binary of it.

use crate::{
    host::{BUSYBOX, Host},
    image, say,
};

/// Of the end-to-end tests, those that are about a VMM and its guest.
const END_TO_END: &str = "run:: lifecycle:: session:: ends:: network::";

#[test]
#[ignore = "takes many minutes"]
fn qemu_with_kvm() {
    let host = Host::boot();
    let before = host.traces();
    host.attempt(&format!("vm run --rm {BUSYBOX} -- sh -c 'exit 7'")).exits(7);
    host.leaves_nothing(&before);
    host.suite("vm-vmm.contract", "", "--exact qemu_keeps_the_contract");
    host.suite("vm-tests.e2e", &end_to_end(), END_TO_END);
    assert_eq!(host.traces(), before);
    host.end();
}

#[test]
#[ignore = "takes many minutes"]
fn firecracker() {
    if image::firecracker().is_none() {
        say("NOT TESTED HERE: Firecracker, for VM_FIRECRACKER is not set and no firecracker is on PATH");
        return;
    }
    let host = Host::boot();
    let before = host.traces();
    let directory = image::FIRECRACKER;
    let path = format!("PATH={directory}:$PATH VM_FIRECRACKER={directory}/firecracker");
    host.attempt(&format!("export {path}; vm run --rm {BUSYBOX} -- sh -c 'exit 7'")).exits(7);
    ends_by_force(&host, &path);
    host.leaves_nothing(&before);
    host.suite("vm-vmm.contract", &path, "--exact firecracker_keeps_the_contract");
    host.suite("vm-tests.e2e", &format!("{path} {}", end_to_end()), END_TO_END);
    assert_eq!(host.traces(), before);
    host.end();
}

/// Whatever is killed, the VM can be started and deleted, and no trace of it stays.
fn ends_by_force(host: &Host, path: &str) {
    host.run(&format!("export {path}; vm create --name forced {BUSYBOX} --start"));
    host.run("vm show forced --json")
        .must("it is run by Firecracker", |shown| shown.json()["vmm"].as_str() == Some("firecracker"));
    for (what, victim) in [
        ("the daemon", "pgrep -x vmd"),
        ("the shim", "pgrep -f '^[^ ]*vmd shim '"),
        ("Firecracker", "pgrep -x firecracker"),
    ] {
        say(&format!("nested: {what} is killed"));
        host.run(&format!("kill -9 $({victim}) && export {path} && vm ls"));
        if what != "the daemon" {
            host.wait("it has ended", "vm show forced --json | grep -Eq '\"state\": *\"(stopped|failed)\"'");
            host.run(&format!("export {path}; vm start forced"));
        }
        host.run("vm ssh forced true");
    }
}

/// What the end-to-end tests want to be told.
fn end_to_end() -> String {
    let (programs, suites) = (image::PROGRAMS, image::SUITES);
    format!(
        "VM_TEST_BIN={programs} VM_TEST_PROG={suites}/vm-test-prog VM_TEST_PLUGINS={suites}/plugins \
         VM_TEST_IMAGES={} VM_TEST_CACHE=/var/cache/vmd-tests",
        image::SEED
    )
}
