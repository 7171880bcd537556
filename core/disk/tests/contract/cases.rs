//! What holds of every disk.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    process::Command,
    time::Instant,
};

use vm_disk::{Cow, DiskError};
use vm_types::{Effect, Handle, Observed};

use super::bench::{BASE_BYTES, Bench, DATA_BYTES, Disk, Ground, MIB, block, instance};

pub(crate) async fn a_disk_begins_as_its_base_and_keeps_its_writes_to_itself(bench: &Bench) {
    let (one, other) = (bench.disk(1, BASE_BYTES), bench.disk(2, BASE_BYTES));
    for disk in [&one, &other] {
        bench.make(disk).await.unwrap();
        assert!(bench.is_up(disk).await);
        assert!(disk.read(0, DATA_BYTES) == block(0, DATA_BYTES));
    }
    one.write(4096, &block(1, 8192));
    one.write(BASE_BYTES - 512, &block(2, 512));
    assert_eq!(one.read(4096, 8192), block(1, 8192));
    assert_eq!(one.read(BASE_BYTES - 512, 512), block(2, 512));
    assert_eq!(one.read(0, 4096), block(0, 4096));
    assert!(other.read(0, DATA_BYTES) == block(0, DATA_BYTES), "a write reached another disk");
    for disk in [&one, &other] {
        bench.remove(disk).await.unwrap();
        assert!(!bench.is_up(disk).await);
        // Once more is no harm.
        bench.remove(disk).await.unwrap();
    }
    assert_eq!(bench.names(), ["base.ext4"]);
}

pub(crate) async fn a_disk_is_as_large_as_asked_and_zero_behind_the_base(bench: &Bench) {
    let disk = bench.disk(1, 10 << 30);
    bench.make(&disk).await.unwrap();
    assert_eq!(disk.size(), 10 << 30);
    assert!(disk.read(0, DATA_BYTES) == block(0, DATA_BYTES));
    for at in [BASE_BYTES - 4096, BASE_BYTES, BASE_BYTES + 4096, 5 << 30, (10 << 30) - 4096] {
        assert!(disk.read(at, 4096).iter().all(|byte| *byte == 0), "data at {at}");
    }
    disk.write((10 << 30) - 4096, &block(3, 4096));
    disk.write(BASE_BYTES - 4096, &block(4, 8192));
    assert_eq!(disk.read((10 << 30) - 4096, 4096), block(3, 4096));
    assert_eq!(disk.read(BASE_BYTES - 4096, 8192), block(4, 8192));
    assert!(disk.used_bytes() < 16 * MIB, "it takes {} bytes", disk.used_bytes());
    bench.remove(&disk).await.unwrap();
}

pub(crate) async fn what_was_written_is_there_after_another_start(bench: &Bench) {
    let disk = bench.disk(1, 2 * BASE_BYTES);
    bench.make(&disk).await.unwrap();
    disk.write(0, &block(1, 4096));
    disk.write(2 * BASE_BYTES - 4096, &block(2, 4096));
    // Applied again while it is there, as a daemon does that adopts it; then stopped and started.
    bench.make(&disk).await.unwrap();
    assert_eq!(disk.read(0, 4096), block(1, 4096));
    for _ in 0..3 {
        bench.stop(&disk).await.unwrap();
        bench.start(&disk).await.unwrap();
        assert!(bench.is_up(&disk).await);
        assert_eq!(disk.read(0, 4096), block(1, 4096));
        assert_eq!(disk.read(4096, 4096), block(0, 8192)[4096..]);
        assert_eq!(disk.read(2 * BASE_BYTES - 4096, 4096), block(2, 4096));
    }
    bench.remove(&disk).await.unwrap();
}

pub(crate) async fn a_disk_that_is_off_grows_and_keeps_what_is_on_it(bench: &Bench) {
    let (before, after) = (bench.disk(1, BASE_BYTES), bench.disk(1, 4 * BASE_BYTES));
    bench.make(&before).await.unwrap();
    before.write(8192, &block(1, 4096));
    bench.stop(&before).await.unwrap();
    bench.cow.grow(&before.file, 4 * BASE_BYTES).await.unwrap();
    // Never smaller.
    bench.cow.grow(&before.file, BASE_BYTES).await.unwrap();
    bench.start(&after).await.unwrap();
    assert!(bench.is_up(&after).await);
    assert_eq!(after.size(), 4 * BASE_BYTES);
    assert_eq!(after.read(8192, 4096), block(1, 4096));
    assert!(after.read(4 * BASE_BYTES - 4096, 4096).iter().all(|byte| *byte == 0));
    after.write(4 * BASE_BYTES - 4096, &block(2, 4096));
    assert_eq!(after.read(4 * BASE_BYTES - 4096, 4096), block(2, 4096));
    bench.remove(&after).await.unwrap();
}

pub(crate) async fn a_disk_smaller_than_its_base_is_refused_and_leaves_nothing(bench: &Bench) {
    let disk = bench.disk(1, BASE_BYTES / 2);
    let error = bench.make(&disk).await.unwrap_err();
    assert!(
        matches!(error, DiskError::SmallerThanBase { base_bytes, .. } if base_bytes == BASE_BYTES),
        "{error:?}"
    );
    assert_eq!(error.hint().unwrap(), "use `--disk 32M` or more");
    assert_eq!(bench.names(), ["base.ext4"]);
}

pub(crate) async fn what_is_somebody_elses_stays(bench: &Bench) {
    let disk = bench.disk(1, BASE_BYTES);
    fs::create_dir(disk.path()).unwrap();
    let last = disk.device.as_ref().unwrap_or(&disk.file);
    if disk.device.is_some() {
        bench.cow.apply(&disk.file).await.unwrap();
    }
    assert!(matches!(bench.cow.observe(last).await.unwrap(), Observed::Foreign(_)));
    let error = bench.cow.apply(last).await.unwrap_err();
    assert!(matches!(error, DiskError::Foreign { .. }) && error.hint().is_some(), "{error:?}");
    bench.cow.undo(last, &Handle::None).await.unwrap_err();
    assert!(disk.path().is_dir());
    fs::remove_dir(disk.path()).unwrap();
    bench.remove(&disk).await.unwrap();

    let other = Effect::Sysctl { key: "a".into(), value: "b".into() };
    assert!(matches!(bench.cow.apply(&other).await, Err(DiskError::NotMine { .. })));
}

pub(crate) async fn discards_never_reach_the_base(bench: &Bench) {
    let disk = bench.disk(1, 2 * BASE_BYTES);
    bench.make(&disk).await.unwrap();
    disk.write(0, &block(1, 64 << 10));
    // As a VMM does it: the device's discard, or a hole in the file. One that cannot refuses.
    let all = (2 * BASE_BYTES).to_string();
    let mut discard = match disk.device {
        Some(_) => Command::new("blkdiscard"),
        None => Command::new("fallocate"),
    };
    match disk.device {
        Some(_) => discard.args(["--force", "--length", &all]),
        None => discard.args(["--punch-hole", "--offset", "0", "--length", &all]),
    };
    let done = discard.arg(disk.path()).output().unwrap();
    println!("{discard:?}: {} {}", done.status, String::from_utf8_lossy(&done.stderr));
    disk.write(BASE_BYTES, &block(2, 4096));
    assert_eq!(disk.read(BASE_BYTES, 4096), block(2, 4096));
    let other = bench.disk(2, BASE_BYTES);
    bench.make(&other).await.unwrap();
    assert!(other.read(0, DATA_BYTES) == block(0, DATA_BYTES), "the base is not what it was");
    bench.remove(&other).await.unwrap();
    bench.remove(&disk).await.unwrap();
}

pub(crate) async fn a_hundred_disks_share_a_base(bench: &Bench) {
    let disks: Vec<Disk> = (0..100).map(|number| bench.disk(number, 1 << 30)).collect();
    let started = Instant::now();
    for disk in &disks {
        bench.make(disk).await.unwrap();
    }
    let made = started.elapsed();
    let taken: u64 = disks.iter().map(Disk::used_bytes).sum();
    for (number, disk) in disks.iter().enumerate() {
        disk.write(4096 * number as u64, &block(number as u8, 4096));
    }
    for (number, disk) in disks.iter().enumerate() {
        assert_eq!(disk.read(4096 * number as u64, 4096), block(number as u8, 4096), "disk {number}");
        let next = 4096 * (number as u64 + 1);
        assert_eq!(disk.read(next, 4096), block(0, DATA_BYTES)[next as usize..][..4096], "disk {number}");
    }
    if bench.ground == Ground::Dm {
        assert_eq!(bench.loops(&bench.base_path()), 1, "the base has more than one loop device");
    }
    let started = Instant::now();
    for disk in &disks {
        bench.remove(disk).await.unwrap();
    }
    println!(
        "{:?}: made in {made:?} and removed in {:?}, at first {} KiB each",
        bench.ground,
        started.elapsed(),
        taken / 102_400
    );
    assert_eq!(bench.names(), ["base.ext4"]);
}

pub(crate) async fn a_full_host_spoils_no_base_and_no_earlier_write(bench: &Bench) {
    let disk = bench.disk(1, 512 * MIB);
    bench.make(&disk).await.unwrap();
    disk.write(0, &block(1, 2 * MIB));
    let filler = bench.dir.join("filler");
    // To the last block but some, in steps: a filesystem gives no more than it has.
    for mib in [512, 128, 32, 8] {
        let file = File::options().create(true).append(true).open(&filler).unwrap();
        let more = || {
            use std::os::fd::AsFd;
            let at = file.metadata().unwrap().len() as i64;
            nix::fcntl::fallocate(file.as_fd(), nix::fcntl::FallocateFlags::empty(), at, mib << 20)
        };
        while vm_disk::free_bytes(&bench.dir).unwrap() > (mib as u64 + 16) << 20 && more().is_ok() {}
    }
    let file = disk.open();
    let chunk = block(2, MIB);
    let failed =
        (2..512).find(|n| file.write_all_at(&chunk, n * MIB).and_then(|()| file.sync_all()).is_err());
    assert!(failed.is_some(), "the host has room for all of it");
    drop(file);
    if let Some(device) = &disk.device {
        assert!(bench.cow.fill(device).await.unwrap().unwrap().invalid);
        bench.stop(&disk).await.unwrap();
        // It would only come to the same end.
        let error = bench.start(&disk).await.unwrap_err();
        assert!(matches!(error, DiskError::NoSpace { .. }) && error.hint().is_some(), "{error:?}");
    }
    fs::remove_file(&filler).unwrap();
    bench.start(&disk).await.unwrap();
    assert!(bench.is_up(&disk).await);
    assert!(disk.read(0, 2 * MIB) == block(1, 2 * MIB), "what was written before is gone");
    disk.write(400 * MIB, &block(3, 4096));
    assert_eq!(disk.read(400 * MIB, 4096), block(3, 4096));
    bench.remove(&disk).await.unwrap();
}

pub(crate) async fn a_disk_in_use_goes_when_it_is_let_go(bench: &Bench) {
    let disk = bench.disk(1, BASE_BYTES);
    bench.make(&disk).await.unwrap();
    let held = disk.open();
    if disk.device.is_some() {
        let error = bench.stop(&disk).await.unwrap_err();
        assert!(matches!(error, DiskError::Busy { .. }), "{error:?}");
        assert!(error.hint().unwrap().contains("fuser"), "{:?}", error.hint());
        // Who has it can go on with it.
        held.write_all_at(&block(1, 4096), 0).unwrap();
        assert!(bench.is_up(&disk).await);
    }
    drop(held);
    bench.remove(&disk).await.unwrap();
    assert_eq!(bench.names(), ["base.ext4"]);
}

pub(crate) async fn two_daemons_do_not_touch_each_other(bench: &Bench) {
    let other = instance(0x8000);
    let (ours, theirs) = (bench.disk(7, BASE_BYTES), bench.disk_of(&other, 7, BASE_BYTES));
    bench.make(&ours).await.unwrap();
    bench.make(&theirs).await.unwrap();
    theirs.write(0, &block(1, 4096));
    bench.remove(&ours).await.unwrap();
    assert!(bench.is_up(&theirs).await);
    assert_eq!(theirs.read(0, 4096), block(1, 4096));
    assert!(bench.cow.found(&bench.instance).await.unwrap().is_empty());
    bench.remove(&theirs).await.unwrap();
}
