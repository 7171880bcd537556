//! What a guest does with its copy of an image: grows it, fills it, adds to big directories.

use std::{
    fs,
    io::Write,
    os::unix::fs::{FileExt, PermissionsExt},
    path::Path,
    process::Command,
};

use crate::common::{Bench, Tar, mounted_with};

fn writable(bench: &Bench) {
    fs::set_permissions(bench.out(), fs::Permissions::from_mode(0o600)).unwrap();
}

fn free(root: &Path) -> u64 {
    let about = rustix::fs::statvfs(root).unwrap();
    about.f_bavail * about.f_frsize
}

/// The room that was promised is there, to the last block.
#[tokio::test]
async fn the_free_room_can_be_filled() {
    for content in [0, 1, 40 << 20] {
        let bench = Bench::new();
        let noise: Vec<u8> =
            (0..content as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8 | 1).collect();
        let built = bench.build(Tar::default().add(b'0', "content", "", &noise).end()).await.unwrap();
        assert!(built.used_bytes < content + (4 << 20), "{built:?}");
        writable(&bench);
        let room = mounted_with(&bench.out(), "loop", |root| {
            let room = free(root);
            let mut file = fs::File::create(root.join("filler")).unwrap();
            let chunk = vec![3; 1 << 20];
            let mut written = 0;
            while let Ok(count) = file.write(&chunk) {
                written += count as u64;
            }
            // A few blocks are its own extents.
            assert!(written + (1 << 20) > room, "{written} of {room}");
            drop(file);
            fs::remove_file(root.join("filler")).unwrap();
            // The kernel keeps 2 % for itself.
            let about = rustix::fs::statvfs(root).unwrap();
            about.f_bfree * about.f_frsize
        });
        let promised = (64 << 20) + content / 10;
        assert!(room >= promised && room < promised + (4 << 20), "{room} where {promised} were promised");
        bench.check();
    }
}

/// A hundred thousand names are found, and a hundred more go among them.
#[tokio::test]
async fn a_big_directory_is_indexed() {
    let bench = Bench::new();
    let mut tar = Tar::default();
    tar.push(b'5', "big", "", b"");
    for i in 0..100_000 {
        tar.push(b'0', &format!("big/a name that is not short {i}"), "", b"");
    }
    // Names beyond ASCII hash as bytes.
    for i in 0..300 {
        tar.push(b'0', &format!("big/größer {i}"), "", b"x");
    }
    bench.build(tar.end()).await.unwrap();
    bench.check();
    let flags = Command::new("debugfs").args(["-R", "stat /big"]).arg(bench.out()).output().unwrap();
    assert!(String::from_utf8_lossy(&flags.stdout).contains("Flags: 0x81000"));
    writable(&bench);
    mounted_with(&bench.out(), "loop", |root| {
        for i in [0, 1, 77_777, 99_999] {
            assert!(root.join(format!("big/a name that is not short {i}")).exists(), "{i}");
        }
        for i in 0..300 {
            assert!(root.join(format!("big/größer {i}")).exists(), "{i}");
            fs::write(root.join(format!("big/new {i}")), b"new").unwrap();
            fs::remove_file(root.join(format!("big/a name that is not short {i}"))).unwrap();
        }
        assert_eq!(fs::read_dir(root.join("big")).unwrap().count(), 100_300);
    });
    bench.check();
}

/// As the agent does it at the first boot: while it is mounted. Where the tests lack the capability for that (24,
/// CAP_SYS_RESOURCE), the kernel refuses it of every filesystem, and only the tests in VMs tell.
#[tokio::test]
async fn a_mounted_filesystem_grows() {
    let bench = Bench::new();
    bench.build(Tar::default().add(b'0', "a", "", b"x").end()).await.unwrap();
    writable(&bench);
    fs::File::options().write(true).open(bench.out()).unwrap().set_len(40 << 30).unwrap();
    mounted_with(&bench.out(), "loop", |root| {
        let device = Command::new("findmnt").args(["-nro", "SOURCE"]).arg(root).output().unwrap();
        let device = String::from_utf8(device.stdout).unwrap();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let capable = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
        let capable = u64::from_str_radix(capable, 16).unwrap() & 1 << 24 != 0;
        let grown = Command::new("resize2fs").arg(device.trim()).output().unwrap();
        if !capable {
            let error = String::from_utf8_lossy(&grown.stderr);
            assert!(error.contains("Permission denied to resize"), "{error}");
            return;
        }
        assert!(grown.status.success(), "{}", String::from_utf8_lossy(&grown.stderr));
        assert!(free(root) > 38 << 30, "{}", free(root));
        fs::write(root.join("b"), vec![1; 1 << 20]).unwrap();
        assert_eq!(fs::read(root.join("a")).unwrap(), b"x");
    });
    bench.check();
}

#[tokio::test]
async fn a_file_of_holes_costs_nothing() {
    let bench = Bench::new();
    let root = bench.dir.path().join("tree");
    fs::create_dir(&root).unwrap();
    let file = fs::File::create(root.join("sparse")).unwrap();
    file.write_all_at(b"end", (5 << 30) - 3).unwrap();
    let tar = Command::new("tar").arg("-C").arg(&root).args(["--sparse", "-cf", "-", "."]).output().unwrap();
    let built = bench.build(tar.stdout).await.unwrap();
    bench.check();
    assert!(built.used_bytes < 4 << 20 && built.size_bytes < 200 << 20, "{built:?}");
    let end = crate::common::mounted(&bench.out(), |root| {
        let file = fs::File::open(root.join("sparse")).unwrap();
        let mut end = [0; 6];
        file.read_exact_at(&mut end, (5 << 30) - 6).unwrap();
        (file.metadata().unwrap().len(), end)
    });
    assert_eq!(end, (5 << 30, *b"\0\0\0end"));
}

#[tokio::test]
#[ignore = "a million files take minutes: make test-full"]
async fn a_million_small_files_fit() {
    let bench = Bench::new();
    let mut tar = Tar::default();
    for i in 0..1_000_000 {
        tar.push(b'0', &format!("d{}/f{i}", i % 997), "", b"x");
    }
    let built = bench.build(tar.end()).await.unwrap();
    println!("{built:?}");
    bench.check();
}
