//! A VMM is another user, sees its own files only, and takes no more of the host than it may.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use vm_tests::{
    World, fixtures, snapshot, wait_until,
    world::{BOOT, SHORT},
};

/// What QEMU may take beyond its guest's memory under emulation and, at least, under KVM.
const OVERHEAD_MIB: std::ops::RangeInclusive<u64> = 258..=1282;

fn create(world: &World, name: &str, start: bool) {
    let arguments = ["create", "--name", name, "--image", fixtures::BUSYBOX, "--memory", "256M", "--start"];
    world.vm(&arguments[..arguments.len() - usize::from(!start)]).run().exits(0);
}

fn status(pid: i32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process that runs has a status");
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    line.split_ascii_whitespace().collect::<Vec<_>>().join(" ")
}

/// A file of a VM's control group, wherever its controller is.
fn limit(world: &World, vm: &str, names: [&str; 2]) -> Option<PathBuf> {
    let id = world.ask(&["show", vm])["id"].as_str().expect("a VM has an id").to_owned();
    let name = format!("vmd-{}-{id}", world.instance().expect("there is a daemon"));
    fn find(directory: &Path, name: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name() == name {
                    found.push(entry.path());
                }
                find(&entry.path(), name, found);
            }
        }
    }
    let mut found = Vec::new();
    snapshot::cgroup_roots().iter().for_each(|root| find(root, &name, &mut found));
    found.iter().flat_map(|group| names.map(|file| group.join(file))).find(|file| file.exists())
}

#[test]
fn qemu_is_another_user_and_sees_its_own_files_only() {
    let world = World::new();
    create(&world, "a", true);
    create(&world, "b", true);
    create(&world, "c", false);
    let vmm = world.vmm_pid("a");
    let user = status(vmm, "Uid:");
    let id: u32 = user.split(' ').next().unwrap().parse().unwrap();
    assert!((0x7000_0001..0x7FFF_FFFE).contains(&id), "{user}");
    assert_eq!(user, vec![id.to_string(); 4].join(" "));
    assert_eq!(status(vmm, "Gid:"), user);
    assert_ne!(status(world.vmm_pid("b"), "Uid:"), user, "each VM has its own");
    for (key, value) in [("Seccomp:", "2"), ("NoNewPrivs:", "1"), ("CapEff:", "0000000000000000")] {
        assert_eq!(status(vmm, key), value, "{key}");
    }
    for (key, value) in [("CapBnd:", 0), ("CapPrm:", 0), ("CapInh:", 0), ("CapAmb:", 0)] {
        assert_eq!(u64::from_str_radix(&status(vmm, key), 16), Ok(value), "{key}");
    }

    let seen = |path: &Path| {
        let root = PathBuf::from(format!("/proc/{vmm}/root"));
        root.join(path.strip_prefix("/").unwrap()).symlink_metadata().is_ok()
    };
    let own = world.paths("a");
    assert!(seen(&own.disk()) && seen(&own.initramfs()), "what it needs is there");
    let others = [world.paths("b").disk(), world.paths("c").disk(), own.host_key(), own.shim_sock()];
    let hosts =
        ["/etc/passwd", "/boot", "/home", "/proc", "/sys", "/dev/mem", "/dev/net/tun", "/usr/bin/env"];
    for path in others.into_iter().chain(hosts.map(PathBuf::from)) {
        assert!(!seen(&path), "{} is seen", path.display());
    }
    for vm in ["a", "b"] {
        let about = fs::metadata(world.namespaces().path(&world.paths(vm).disk())).unwrap();
        let user = status(world.vmm_pid(vm), "Uid:");
        assert_eq!(about.uid().to_string(), user.split(' ').next().unwrap(), "{vm}'s disk is its user's");
        assert_eq!(about.mode() & 0o077, 0, "and nobody else's");
    }

    // It works all the same, and once more.
    world.vm(&["ssh", "a", "echo there"]).run().exits(0).says("there\n");
    world.vm(&["restart", "a"]).run().exits(0);
    assert_eq!(status(world.vmm_pid("a"), "Uid:"), user, "a VM keeps its user");
    world.leaves_nothing();
}

#[test]
fn a_vmm_that_grabs_memory_ends_alone() {
    let world = World::new();
    create(&world, "a", true);
    create(&world, "b", true);
    let Some(file) = limit(&world, "a", ["memory.max", "memory.limit_in_bytes"]) else {
        world.vm(&["doctor"]).run().tells("VMMs are not limited in memory");
        return world.leaves_nothing();
    };
    let bytes: u64 = fs::read_to_string(&file).unwrap().trim().parse().unwrap();
    let mib = bytes >> 20;
    assert!(OVERHEAD_MIB.contains(&(mib - 256)), "{mib} MiB for a guest of 256");
    let group = file.parent().unwrap();
    let members = fs::read_to_string(group.join("cgroup.procs")).unwrap();
    assert_eq!(members.trim(), world.vmm_pid("a").to_string(), "the VMM alone is in it");

    // As if QEMU itself took more than it should: what it has is more than it may.
    let kib: u64 = status(world.vmm_pid("a"), "VmRSS:").split(' ').next().unwrap().parse().unwrap();
    fs::write(&file, format!("{}", (kib << 10) + (16 << 20))).unwrap();
    let grab = "mkdir -p /m; mount -t tmpfs -o size=200m none /m; head -c 180000000 /dev/zero > /m/x";
    world.vm(&["ssh", "a", grab]).within(BOOT).run();
    let shown = world.wait_for_state("a", "failed");
    assert!(shown["cause"].as_str().unwrap_or_default().contains("signal 9"), "{shown}");
    assert_eq!(world.state("b"), "running");
    world.vm(&["ssh", "b", "echo there"]).run().exits(0).says("there\n");
    world.leaves_nothing();
}

#[test]
fn the_end_of_a_shim_or_of_all_leaves_no_group_and_no_process() {
    let world = World::new();
    create(&world, "a", true);
    let shim = |world: &World| {
        let mut all = world.namespaces().processes().into_iter();
        all.find(|process| process.arguments.contains(" shim ")).map(|process| process.outside)
    };
    let vmm = world.vmm_pid("a");
    world.kill(shim(&world).unwrap());
    world.wait_for_state("a", "failed");
    let runs = |pid: i32| world.namespaces().processes().iter().any(|process| process.outside == pid);
    wait_until("the VMM's end", SHORT, || !runs(vmm));
    world.vm(&["start", "a"]).run().exits(0);

    let vmm = world.vmm_pid("a");
    world.kill(world.daemon_pid());
    world.kill(shim(&world).unwrap());
    wait_until("the VMM's end", SHORT, || !runs(vmm));
    world.wait_for_state("a", "failed");
    world.vm(&["delete", "a"]).run().exits(0);
    world.leaves_nothing();
}

#[test]
fn the_configuration_decides_whether_a_vmm_is_locked_in() {
    let world = World::with_config("[vmm]\njail = \"off\"\n");
    create(&world, "a", true);
    assert_eq!(status(world.vmm_pid("a"), "Uid:"), "0 0 0 0");
    world.vm(&["doctor"]).run().tells("vmm.jail is \"off\"");
    world.leaves_nothing();
}

#[test]
fn a_vmm_that_must_be_locked_in_and_cannot_be_is_not_started() {
    let world = World::new();
    let script = world.directory().join("qemu");
    // By another process, so that no child of this one can have it open for writing when it is run.
    let make = format!(
        "printf '#!/bin/sh\\nexec qemu-system-%s \"$@\"\\n' {} > {file}; chmod +x {file}",
        std::env::consts::ARCH,
        file = script.display()
    );
    world.tool("sh", &["-c", &make]).run().exits(0);
    let configure =
        |jail: &str| world.configure(&format!("[vmm]\njail = \"{jail}\"\nqemu = \"{}\"\n", script.display()));
    configure("on");
    create(&world, "a", false);
    let refused = world.vm(&["start", "a"]).run().must("fail", |output| !output.status.success());
    refused.complains("is a script").complains("vmm.jail");
    world.vm(&["daemon", "stop"]).run().exits(0);
    configure("auto");
    world.vm(&["start", "a"]).run().exits(0);
    assert_eq!(status(world.vmm_pid("a"), "Uid:"), "0 0 0 0");
    world.leaves_nothing();
}
