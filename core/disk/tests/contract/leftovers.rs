//! What holds of disks by device-mapper alone.

use std::{
    fs,
    os::unix::fs::FileExt,
    process::Command,
    time::{Duration, Instant},
};

use vm_disk::Cow;
use vm_types::{Effect, Handle, Observed};

use super::bench::{BASE_BYTES, Bench, Disk, MIB, block, run};

fn device(disk: &Disk) -> (&Effect, &str) {
    match &disk.device {
        Some(effect @ Effect::DmSnapshot { name, .. }) => (effect, name),
        _ => unreachable!("a disk of differences"),
    }
}

fn dmsetup(arguments: &[&str]) {
    run(Command::new("dmsetup").args(["--noudevsync", "--noudevrules"]).args(arguments)).unwrap();
}

/// Gives a device a table that counts from its next resume on: the same, and more of its last target.
fn load_larger(name: &str) {
    let shown = Command::new("dmsetup").args(["table", name]).output().unwrap();
    let table = String::from_utf8(shown.stdout).unwrap();
    let (before, last) = table.trim_end().rsplit_once('\n').map_or(("", table.trim_end()), |both| both);
    let mut words: Vec<_> = last.split(' ').map(str::to_owned).collect();
    words[1] = (words[1].parse::<u64>().unwrap() + BASE_BYTES / 512).to_string();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), format!("{before}\n{}\n", words.join(" ")).trim_start()).unwrap();
    dmsetup(&["load", name, file.path().to_str().unwrap()]);
}

pub(crate) async fn a_disk_in_use_grows(bench: &Bench) {
    let disk = bench.disk(1, BASE_BYTES);
    bench.make(&disk).await.unwrap();
    let (effect, _) = device(&disk);
    disk.write(0, &block(1, 4096));
    let held = disk.open();
    bench.cow.grow(effect, 8 * BASE_BYTES).await.unwrap();
    held.write_all_at(&block(2, 4096), 8 * BASE_BYTES - 4096).unwrap();
    held.sync_all().unwrap();
    drop(held);
    assert_eq!(disk.size(), 8 * BASE_BYTES);
    let grown = bench.disk(1, 8 * BASE_BYTES);
    // Under its former size, as a journal has it, and under its new one.
    assert!(bench.is_up(&disk).await && bench.is_up(&grown).await);
    bench.stop(&disk).await.unwrap();
    bench.start(&grown).await.unwrap();
    assert_eq!(grown.read(0, 4096), block(1, 4096));
    assert_eq!(grown.read(8 * BASE_BYTES - 4096, 4096), block(2, 4096));
    bench.remove(&grown).await.unwrap();
}

pub(crate) async fn what_a_killed_daemon_left_is_named_completed_and_removed(bench: &Bench) {
    let disk = bench.disk(1, 2 * BASE_BYTES);
    let (effect, name) = device(&disk);
    let origin = format!("{name}-origin");
    bench.make(&disk).await.unwrap();
    disk.write(0, &block(1, 4096));
    bench.stop(&disk).await.unwrap();
    let uuid = format!("VMD-{name}");
    // Each is what a daemon leaves that is killed at that moment.
    let states: [(&str, &dyn Fn()); 6] = [
        ("an origin without a snapshot", &|| {
            dmsetup(&["remove", name]);
            fs::remove_file(disk.path()).unwrap();
        }),
        ("a snapshot without a table", &|| {
            dmsetup(&["remove", name]);
            dmsetup(&["create", "--notable", "--uuid", &uuid, name]);
        }),
        ("a snapshot held back", &|| dmsetup(&["suspend", "--nolockfs", name])),
        ("both held back", &|| {
            dmsetup(&["suspend", "--nolockfs", name]);
            dmsetup(&["suspend", "--nolockfs", &origin]);
        }),
        ("a snapshot without a node", &|| fs::remove_file(disk.path()).unwrap()),
        ("a node without a device", &|| {
            dmsetup(&["remove", name]);
            dmsetup(&["remove", &origin]);
        }),
    ];
    for (what, leave) in states {
        for complete in [true, false] {
            bench.start(&disk).await.unwrap();
            leave();
            let seen = bench.cow.observe(effect).await.unwrap();
            assert!(matches!(seen, Observed::Foreign(_)), "{what}: {seen:?}");
            if complete {
                bench.start(&disk).await.unwrap();
                assert!(bench.is_up(&disk).await, "{what}");
                assert_eq!(disk.read(0, 4096), block(1, 4096), "{what}");
            }
            bench.stop(&disk).await.unwrap();
            assert_eq!(bench.cow.observe(effect).await.unwrap(), Observed::Absent, "{what}");
            assert_eq!(bench.devices(), [""; 0], "{what}");
        }
    }
    // Killed while the disk grew.
    let states: [(&str, &dyn Fn()); 3] = [
        ("a larger origin to come", &|| load_larger(&origin)),
        ("both larger to come", &|| {
            load_larger(&origin);
            load_larger(name);
        }),
        ("both larger to come, the snapshot held back", &|| {
            load_larger(&origin);
            load_larger(name);
            dmsetup(&["suspend", "--nolockfs", name]);
        }),
    ];
    for (what, leave) in states {
        for complete in [true, false] {
            bench.start(&disk).await.unwrap();
            leave();
            if complete {
                bench.start(&disk).await.expect(what);
                assert_eq!(disk.read(0, 4096), block(1, 4096), "{what}");
            }
            bench.stop(&disk).await.expect(what);
            assert_eq!(bench.devices(), [""; 0], "{what}");
        }
    }
    // A device of that name which is somebody else's.
    dmsetup(&["create", "--notable", name]);
    assert!(bench.cow.observe(effect).await.is_err());
    bench.start(&disk).await.unwrap_err();
    bench.stop(&disk).await.unwrap_err();
    assert_eq!(bench.devices(), [name]);
    dmsetup(&["remove", name]);
    bench.remove(&disk).await.unwrap();
    // A loop device goes with its last user, which the kernel may take a moment for.
    let deadline = Instant::now() + Duration::from_secs(30);
    while bench.loops(&bench.base_path()) > 0 {
        assert!(Instant::now() < deadline, "the base still has a loop device");
        std::thread::yield_now();
    }
}

pub(crate) async fn a_full_delta_says_so_and_every_chunk_has_room(bench: &Bench) {
    let disk = bench.disk(1, 64 * MIB);
    bench.make(&disk).await.unwrap();
    let (effect, _) = device(&disk);
    let before = bench.cow.fill(effect).await.unwrap().unwrap();
    assert!(!before.invalid && before.used_bytes < MIB, "{before:?}");
    let file = disk.open();
    for n in 0..64 {
        file.write_all_at(&block(n as u8, MIB), n * MIB).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let full = bench.cow.fill(effect).await.unwrap().unwrap();
    assert!(!full.invalid && full.used_bytes > 64 * MIB && full.used_bytes <= full.total_bytes, "{full:?}");
    bench.stop(&disk).await.unwrap();
    assert_eq!(bench.cow.fill(effect).await.unwrap(), None);
    bench.start(&disk).await.unwrap();
    for n in 0..64 {
        assert!(disk.read(n * MIB, MIB) == block(n as u8, MIB), "MiB {n}");
    }
    bench.remove(&disk).await.unwrap();
}

pub(crate) async fn devices_of_a_daemon_are_found(bench: &Bench) {
    let disks = [bench.disk(1, BASE_BYTES), bench.disk(2, BASE_BYTES)];
    for disk in &disks {
        bench.make(disk).await.unwrap();
    }
    dmsetup(&["remove", device(&disks[1]).1]);
    let found = bench.cow.found(&bench.instance).await.unwrap();
    let found: Vec<_> = found.iter().map(ToString::to_string).collect();
    assert_eq!(found, ["000000000001", "000000000002"], "also one that is half there");
    for disk in &disks {
        bench.cow.undo(device(disk).0, &Handle::None).await.unwrap();
        bench.remove(disk).await.unwrap();
    }
    assert!(bench.cow.found(&bench.instance).await.unwrap().is_empty());
}
