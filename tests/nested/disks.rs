//! Disks in a host that has device-mapper, and filesystems of all sorts.

use crate::{
    host::{BUSYBOX, Host},
    image, say,
};

/// Devices of disks that are in use now.
const DEVICES: &str = "dmsetup ls | grep -c '^vmd-'";
/// An image of so many megabytes that do not compress, beside busybox: $1 its name, $2 megabytes.
const IMAGE: &str = r#"
set -eu
mkdir -p tree/bin tree/tmp
cp /usr/bin/busybox tree/bin
for applet in sh true; do ln -sf busybox tree/bin/$applet; done
head -c "$2"M /dev/urandom >tree/ballast
tar -C tree -cf tree.tar .
vm image import "$PWD/tree.tar" "$1"
rm -r tree tree.tar
"#;
/// How often each image is run; runs of both alternate.
const RUNS: usize = 5;
/// What the larger image may take of the smaller one's time.
const RATIO: f64 = 1.1;

/// The part of `make test`.
#[test]
fn disks_of_differences_in_a_host_with_device_mapper() {
    let host = Host::boot();
    let before = host.traces();
    host.suite("vm-disk.contract", "VM_TEST_REQUIRE_DM=1", "snapshots");
    assert_eq!(host.traces(), before, "the suite left something");
    // What is chosen by itself where files share no blocks.
    host.attempt(&format!("vm run --rm {BUSYBOX} -- sh -c 'exit 7'")).exits(7);
    host.run(&format!(
        "vm create --name kept {BUSYBOX} --start && vm ssh kept 'echo of before > /root/file; sync'"
    ));
    // The disk, and the image it differs from.
    host.run(DEVICES).says("2\n");
    host.run("kill -9 $(pgrep -x vmd) && vm ssh kept cat /root/file").says("of before\n");
    host.run("vm stop kept");
    host.attempt(DEVICES).says("0\n");
    host.run("vm start kept >/dev/null && vm ssh kept cat /root/file").says("of before\n");
    host.leaves_nothing(&before);
    host.end();
}

#[test]
#[ignore = "takes minutes"]
fn disks_of_all_kinds() {
    let host = Host::boot();
    let before = host.traces();
    for suite in host.suites("vm-disk") {
        host.suite(&suite, "VM_TEST_REQUIRE_DM=1", "");
    }
    assert_eq!(host.traces(), before, "the suites left something");
    host.end();
}

/// What a disk by each backend costs in a host that has them all; for `make bench`. The host is emulated, so only the order of sizes
/// says something: a backend that is flat is flat here too.
#[test]
#[ignore = "a measurement"]
fn costs() {
    let host = Host::boot();
    let measured = host.run(&format!(
        "cd /root && VM_NESTED_HOST=1 VM_TEST_REQUIRE_DM=1 {}/vm-disk.contract --ignored --nocapture --test-threads 1 costs",
        image::SUITES
    ));
    let text = measured.text();
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("disk by ")).collect();
    assert!(lines.iter().any(|line| line.starts_with("disk by Dm")), "nothing was measured: {text}");
    for line in lines {
        say(&format!("nested, emulated: {line}"));
    }
    host.end();
}

/// What an image's size adds to the start of a VM whose disk is a device-mapper snapshot; for `make bench`, which measures the same
/// with files that share blocks outside. Timed out here, for the clock inside stands still at times.
#[test]
#[ignore = "a measurement"]
fn costs_of_starts() {
    let host = Host::boot_for_guests();
    let images = [("small", 8), ("large", 300)];
    for (name, megabytes) in images {
        host.run(&format!("cd /root; set -- {name} {megabytes}; {IMAGE}"));
    }
    let run = |name: &str| {
        let run = format!("vm run --rm --memory 128M --cpus 1 --image {name} -- true");
        host.run(&run).took
    };
    // Untimed: what starts the daemon, and reads an image for the first time.
    for (name, _) in images {
        run(name);
    }
    host.run("vm create --name kept --image large --memory 128M --cpus 1 --start");
    host.run(DEVICES).says("2\n");
    host.run("vm delete --force kept");
    let mut samples = [const { Vec::new() }; 3];
    for number in 1..=RUNS {
        for (samples, (name, _)) in samples.iter_mut().zip(images) {
            samples.push(run(name));
        }
        // The way to the nested host and back, which is in each.
        samples[2].push(host.run("true").took);
        say(&format!("nested: run {number} of {RUNS}"));
    }
    let [small, large, way] = samples.map(|mut samples| {
        samples.sort();
        say(&format!("nested, emulated: vm run on dm-snapshot: {samples:.2?}"));
        samples[RUNS / 2]
    });
    let ratio = (large - way).as_secs_f64() / (small - way).as_secs_f64();
    say(&format!("nested, emulated: an image of 300 MB over one of 8 MB: {ratio:.2} (goal {RATIO})"));
    host.end();
}
