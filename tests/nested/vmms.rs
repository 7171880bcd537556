//! VMMs that need KVM. Firecracker is tested where there is a binary of it.

use vm_tests::wait_until;

use crate::{
    host::{BUSYBOX, E2E, Host, WHILE},
    image, say,
};

/// Of the end-to-end tests, those that show the most of a VMM and its guest: a session's surroundings, the network, OpenSSH, and how
/// a VM ends and begins anew.
const END_TO_END: &[&str] = &[
    "ends::a_policy_starts_it_again_and_so_does_a_restart",
    "run::surroundings_and_exit_codes",
    "network::host_and_guest_reach_each_other",
    "session::openssh_through_the_proxy",
];
/// The process that is a VM's shim, as `pgrep` finds it.
const SHIM: &str = "$(pgrep -f '^[^ ]*vmd shim ')";

#[test]
#[ignore = "takes many minutes"]
fn qemu_with_kvm() {
    let host = Host::boot_for_guests();
    let before = host.traces();
    finds(&host, "true", "qemu");
    host.attempt(&format!("vm run --rm {BUSYBOX} -- sh -c 'exit 7'")).exits(7);
    host.run(&format!("vm create --name small {BUSYBOX} --start"));
    host.run("pgrep -af '^[^ ]*qemu-system'").tells("-machine microvm").tells("-accel kvm");
    host.run("vm ssh small true");
    host.leaves_nothing(&before);
    host.tests("vm-vmm.contract", "", &["qemu_keeps_the_contract"]);
    host.tests(E2E, &end_to_end(), END_TO_END);
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
    let host = Host::boot_for_guests();
    let before = host.traces();
    let directory = image::FIRECRACKER;
    let path = format!("PATH={directory}:$PATH VM_FIRECRACKER={directory}/firecracker");
    finds(&host, &format!("export {path}"), "firecracker");
    host.attempt(&format!("export {path}; vm run --rm {BUSYBOX} -- sh -c 'exit 7'")).exits(7);
    ends_by_force(&host, &path);
    host.leaves_nothing(&before);
    // The daemon's own program is shim and jail.
    let jailer = format!("{path} VM_JAILER={}/vmd", image::PROGRAMS);
    let contract = [
        "firecracker_keeps_the_contract",
        "firecracker_keeps_the_contract_in_a_jail",
        "firecracker::is_its_shims_alone",
    ];
    host.tests("vm-vmm.contract", &jailer, &contract);
    host.tests(E2E, &format!("{path} {}", end_to_end()), END_TO_END);
    assert_eq!(host.traces(), before);
    host.end();
}

/// The VMM that is chosen by itself, locked in, and disks of differences: what all VMs inside then are.
fn finds(host: &Host, setting: &str, vmm: &str) {
    let found = host.attempt(&format!("{setting}; vm doctor --json")).json();
    let of = |check: &str| found.as_array().into_iter().flatten().find(|finding| finding["check"] == check);
    for (check, says) in [
        ("vmm.driver", format!("{vmm} ")),
        ("vmm.jail", "each VM's".to_owned()),
        ("disk.backend", "dm-snapshot".to_owned()),
    ] {
        let message = of(check).and_then(|finding| finding["message"].as_str()).unwrap_or_default();
        assert!(message.starts_with(&says), "{check} is not {says}: {found:#}");
    }
    assert!(of(&format!("vmm.{vmm}.jail")).is_none(), "{found:#}");
}

/// Whatever is killed, the VM can be started and deleted, and no trace of it stays.
fn ends_by_force(host: &Host, path: &str) {
    host.run(&format!("export {path}; vm create --name forced {BUSYBOX} --start"));
    let shown = || host.run("vm show forced --json");
    shown().must("it is run by Firecracker", |shown| shown.json()["vmm"].as_str() == Some("firecracker"));
    wait_until("Firecracker tells what it counts", WHILE, || shown().json()["vmm_metrics"].is_object());
    is_locked_in(host);
    for (what, victims) in [
        ("the daemon", "$(pgrep -x vmd)"),
        ("the shim", SHIM),
        ("Firecracker", "$(pgrep -x firecracker)"),
        ("the daemon, then the shim", &format!("$(pgrep -x vmd) {SHIM}")),
    ] {
        say(&format!("nested: {what} is killed"));
        host.run(&format!("kill -9 {victims}"));
        if what != "the daemon" {
            // With its shim, and by nobody else where there is no daemon.
            host.wait("Firecracker has ended", "! pgrep -x firecracker");
        }
        host.run(&format!("export {path}; vm ls"));
        if what != "the daemon" {
            host.wait("it is known", "vm show forced --json | grep -Eq '\"state\": *\"(stopped|failed)\"'");
            host.run(&format!("export {path}; vm start forced"));
        }
        host.run("vm ssh forced true");
    }
    is_locked_in(host);
}

/// Firecracker is a user of the VM's own that sees what it needs and nothing of the host.
fn is_locked_in(host: &Host) {
    let proc = "/proc/$(pgrep -x firecracker)";
    let ids = host.run(&format!("grep -E '^(Uid|Gid|CapEff|NoNewPrivs|Seccomp):' {proc}/status"));
    ids.must("a user without capabilities, filtered", |ids| {
        let text = ids.text();
        let of = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("0").trim();
        let users: Vec<_> = of("Uid:").split_whitespace().chain(of("Gid:").split_whitespace()).collect();
        users.iter().all(|user| *user != "0" && *user == users[0])
            && of("CapEff:") == "0000000000000000"
            && (of("NoNewPrivs:"), of("Seccomp:")) == ("1", "2")
    });
    // The whole of its root: no /etc, no /usr, no /proc.
    host.run(&format!("ls {proc}/root")).must("only what it needs", |seen| {
        seen.text().split_whitespace().all(|name| matches!(name, "dev" | "run" | "var" | "opt"))
    });
    host.run(&format!("ls {proc}/root/dev")).must("no disks but its own", |seen| {
        seen.text()
            .split_whitespace()
            .all(|name| matches!(name, "kvm" | "net" | "null" | "urandom" | "mapper"))
    });
    host.run(&format!("test -e {proc}/root/dev/kvm && test ! -e {proc}/root/var/lib/vmd/vmd.db"));
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
