//! Whatever is wrong is said clearly, with what to do, and undone.

use std::{fs, io::Write};

use vm_tests::{
    World, fixtures,
    world::{BOOT, SHORT},
};

#[test]
fn names_and_references() {
    let world = World::new();
    world.vm(&["create", "--image", "nosuch"]).run().exits(3).complains("no image nosuch").complains("hint");
    world
        .vm(&["run", "--image", "nosuch", "--", "true"])
        .run()
        .exits(125)
        .complains("nosuch")
        .complains("hint");
    world.vm(&["create", "--image", "No Such"]).run().exits(2).complains("No Such");
    world.vm(&["create", "--kernel", "nosuch"]).run().exits(3).complains("no kernel nosuch");
    world.vm(&["create", "--name", "Not_A_Name"]).run().exits(2).complains("Not_A_Name");
    world.vm(&["create", "--name", "taken", "--image", fixtures::BUSYBOX]).run().exits(0);
    world.vm(&["create", "--name", "taken", "--image", fixtures::BUSYBOX]).run().exits(4).complains("taken");
    world.vm(&["start", "takn"]).run().exits(3).complains("did you mean taken");
    world.vm(&["create", "--disk", "1M", "--image", fixtures::BUSYBOX]).run().exits(2).complains("at least");
    world.vm(&["create", "--memory", "1M", "--image", fixtures::BUSYBOX]).run().exits(2).complains("memory");
    world.vm(&["create", "--cpus", "9999", "--image", fixtures::BUSYBOX]).run().exits(2).complains("CPUs");
    world.vm(&["delete", "taken", "other"]).run().exits(3).complains("other");
    assert!(world.names().is_empty());
    world.leaves_nothing();
}

#[test]
fn tarballs_that_are_none() {
    let world = World::new();
    let file = world.directory().join("bad.tar");
    let path = file.to_string_lossy().into_owned();
    let import = || world.vm(&["image", "import", &path, "bad"]).run();

    fs::write(&file, b"this is no tarball at all, but it is long enough to be looked at".repeat(40)).unwrap();
    import().exits(7).complains("hint");
    fs::write(&file, b"").unwrap();
    import().exits(7);

    let mut whole = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1 << 20);
    header.set_mode(0o644);
    whole.append_data(&mut header, "big", vec![7; 1 << 20].as_slice()).unwrap();
    let whole = whole.into_inner().unwrap();
    fs::write(&file, &whole[..600_000]).unwrap();
    import().exits(7).complains("truncated");

    let mut damaged = whole.clone();
    damaged[3] ^= 0xff;
    fs::write(&file, &damaged).unwrap();
    import().exits(7).complains("corrupt");

    let mut climbing = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..13].copy_from_slice(b"../../escaped");
    header.set_size(4);
    header.set_mode(0o644);
    header.set_cksum();
    climbing.append(&header, &b"evil"[..]).unwrap();
    fs::write(&file, climbing.into_inner().unwrap()).unwrap();
    import().exits(7).complains("escaped");

    world.vm(&["image", "import", "/nonexistent.tar", "bad"]).run().exits(3).complains("/nonexistent.tar");
    let listed = world.ask(&["image", "ls"]).to_string();
    assert!(!listed.contains("bad"), "{listed}");
    fs::remove_file(&file).unwrap();
    world.leaves_nothing();
}

#[test]
fn kernels_that_will_not_do() {
    let world = World::new();
    let file = world.directory().join("kernel");
    let path = file.to_string_lossy().into_owned();
    fs::write(&file, vec![0; 1 << 20]).unwrap();
    let import = || world.vm(&["kernel", "import", "--kernel", &path]).run();
    import().exits(7).complains("no x86-64 kernel").complains("hint");
    // A real one, but without its modules: it could find no disk.
    let kernels = fs::read_dir(world.dirs().kernels()).unwrap().flatten().next().unwrap().path();
    fs::copy(kernels.join("vmlinuz"), &file).unwrap();
    import().exits(7).complains("hint");
    assert_eq!(world.ask(&["kernel", "ls"]).as_array().unwrap().len(), 1);
    world.leaves_nothing();
}

#[test]
fn no_space_left() {
    let world = World::new();
    // The state directory moves to a small filesystem of this world's own.
    let state = world.dirs().state.to_string_lossy().into_owned();
    let kept = world.directory().join("kept").to_string_lossy().into_owned();
    let move_state = format!(
        "mkdir {kept} && cp -a --sparse=always {state}/kernels {state}/vmd.db {kept}/ && \
         mount -t tmpfs -o size=96m,mode=711 tmpfs {state} && cp -a --sparse=always {kept}/* {state}/"
    );
    world.tool("sh", &["-c", &move_state]).run().exits(0);
    let tarball = world.directory().join("large.tar");
    let mut large = tar::Builder::new(fs::File::create(&tarball).unwrap());
    let mut header = tar::Header::new_gnu();
    header.set_size(200 << 20);
    header.set_mode(0o644);
    // Not zeros, which would take no space.
    let noise = std::io::Read::take(fs::File::open("/dev/urandom").unwrap(), 200 << 20);
    large.append_data(&mut header, "noise", noise).unwrap();
    large.into_inner().unwrap().flush().unwrap();

    let used = || {
        world
            .tool("sh", &["-c", &format!("du -s {state}/images {state}/scratch {state}/vms 2>/dev/null")])
            .run()
            .text()
    };
    world.vm(&["daemon", "start"]).run().exits(0);
    let before = used();
    let path = tarball.to_string_lossy().into_owned();
    world.vm(&["image", "import", &path, "large"]).run().exits(5).complains("space").complains("hint");
    assert_eq!(used(), before, "what was half made is gone");
    world.vm(&["ls"]).run().exits(0);
    world.vm(&["daemon", "stop"]).run().exits(0);
    // With nothing left at all, not even for its log, the daemon is there all the same.
    world.tool("sh", &["-c", &format!("cat /dev/zero > {state}/full")]).run();
    world.vm(&["daemon", "start"]).run().exits(0);
    world.vm(&["ls"]).run().exits(0);
    world.vm(&["daemon", "stop"]).run().exits(0);
    world.tool("umount", &[&state]).run().exits(0);
    fs::remove_dir_all(&kept).unwrap();
    world.leaves_nothing();
}

#[test]
fn a_guest_that_does_not_answer_in_time() {
    // No emulated machine is up within a second.
    let world =
        World::with_config("version = 1\n[vm]\nstart_timeout_seconds = 1\n[vmm]\naccelerator = \"tcg\"\n");
    let run = ["run", "--rm", "--image", fixtures::BUSYBOX, "--", "true"];
    world.vm(&run).within(SHORT).run().exits(125).complains("did not answer within 1 s").complains("hint");
    assert!(world.names().is_empty());
    world.leaves_nothing();
}

#[test]
fn a_root_that_cannot_be_mounted_is_told_by_the_agent() {
    let world = World::with_config("version = 1\n[vm]\nstart_timeout_seconds = 60\n");
    world.vm(&["create", "--name", "a", "--image", fixtures::BUSYBOX, "--memory", "256M"]).run().exits(0);
    let disk = fs::OpenOptions::new().write(true).open(world.paths("a").disk()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &[0; 4096], 0).unwrap();
    drop(disk);
    let failed = world.vm(&["start", "a"]).within(BOOT).run();
    // The agent's own words, not a deadline.
    failed.must("fails", |output| !output.status.success()).complains("mount").complains("hint");
    let shown = world.wait_for_state("a", "failed");
    assert_eq!(shown["at"], "start", "{shown}");
    world.vm(&["delete", "a"]).run().exits(0);
    world.leaves_nothing();
}

#[test]
fn a_broken_pipe_ends_the_client() {
    let world = World::new();
    let vm = world.program("vm").to_string_lossy().into_owned();
    let dirs = world.dirs();
    let line = format!(
        "{vm} --run-dir {} --state-dir {} --config-dir {} run --rm --image busybox -- yes | head -n 1",
        dirs.run.display(),
        dirs.state.display(),
        dirs.config.display()
    );
    world.tool("sh", &["-c", &line]).within(BOOT).run().exits(0).says("y\n");
    vm_tests::wait_until("its VM is gone", SHORT, || world.names().is_empty());
    world.leaves_nothing();
}
