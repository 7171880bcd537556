//! `vm cp`: between host and VM, and between VMs.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::sys::signal::Signal;
use vm_tests::{World, wait_until, world::SHORT};

/// What is to be said of a tree: names, kinds, modes, times, contents, links.
fn described(top: &Path) -> Vec<String> {
    fn walk(top: &Path, directory: &Path, all: &mut Vec<String>) {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            let (path, meta) = (entry.path(), entry.metadata().unwrap());
            let name = path.strip_prefix(top).unwrap().as_os_str().as_bytes().escape_ascii().to_string();
            let content = if meta.is_dir() {
                walk(top, &path, all);
                String::new()
            } else if meta.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else {
                fs::read(&path)
                    .unwrap()
                    .escape_ascii()
                    .take(2000)
                    .collect::<Vec<_>>()
                    .escape_ascii()
                    .to_string()
            };
            let (mode, links) = (meta.mode() & 0o777, if meta.is_dir() { 0 } else { meta.nlink() });
            all.push(format!("{name} {mode:o} {links} {}.{:09} {content}", meta.mtime(), meta.mtime_nsec()));
        }
    }
    let mut all = Vec::new();
    walk(top, top, &mut all);
    all.sort();
    all
}

/// A tree with what trees may have in them.
fn oddities(top: &Path) {
    let at = |name: &[u8]| top.join(OsStr::from_bytes(name));
    fs::create_dir_all(at(b"deep/er")).unwrap();
    // Longer than headers of archives have room for, and of several lines.
    let long = [b"-long\n", b"l".repeat(120).as_slice()].concat();
    let far = [b"deep/", b"d".repeat(200).as_slice(), b"/\n", b"e".repeat(200).as_slice()].concat();
    fs::create_dir_all(at(&far)).unwrap();
    symlink(OsStr::from_bytes(&b"../x\n".repeat(40)), at(b"far link")).unwrap();
    fs::create_dir(at(b"empty")).unwrap();
    for (name, content) in [
        (&b"plain"[..], &b"plain"[..]),
        (b"-dash", b"dash"),
        (b"new\nline and blank", b""),
        (b"\xff\xfe", b"\x00\x01"),
        (b"deep/er/run", b"#!/bin/sh\n"),
        (b"\x1f\x8b\x08", b"no gzip"),
        (&long, b"long"),
        (&[far.as_slice(), b"/-f\xff "].concat(), b"far"),
    ] {
        fs::write(at(name), content).unwrap();
    }
    fs::hard_link(at(b"plain"), at(b"deep/hard")).unwrap();
    symlink("../plain", at(b"deep/link")).unwrap();
    symlink("/no/where", at(b"lost")).unwrap();
    for (name, mode) in [(&b""[..], 0o755), (b"plain", 0o644), (b"deep/er/run", 0o751), (b"empty", 0o555)] {
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let old = SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    for name in [&b"plain"[..], b"\x1f\x8b\x08", b"deep", b"empty"] {
        File::open(at(name)).unwrap().set_modified(old).unwrap();
    }
}

/// Whether a process has a file open that is, or is to be, in a directory.
fn writes_in(pid: i32, directory: &Path) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd"));
    files.is_ok_and(|files| {
        let mut files = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
        files.any(|file| file.starts_with(directory) && file != directory)
    })
}

#[test]
fn trees_come_back_as_they_went() {
    let world = World::new();
    for name in ["a", "b"] {
        world.vm(&["create", "--name", name, "--memory", "512M", "--start"]).run().exits(0);
    }
    let files = world.directory().join("files");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (tree, back) = (files.join("tree"), files.join("back"));
    fs::create_dir_all(&tree).unwrap();
    oddities(&tree);
    let wanted = described(&tree);

    // There, from one VM to another, and back.
    world.vm(&["cp", &text(&tree), "a:/srv/tree"]).run().exits(0);
    world.vm(&["cp", "a:/srv/tree", "b:/srv"]).run().exits(0);
    world.vm(&["cp", "b:/srv/tree", &text(&back)]).run().exits(0);
    assert_eq!(described(&back), wanted);
    // What is in it, over what is there.
    fs::write(back.join("plain"), "other").unwrap();
    world.vm(&["cp", "-r", "b:/srv/tree/.", &text(&back)]).run().exits(0);
    assert_eq!(described(&back).len(), wanted.len());
    assert_eq!(fs::read(back.join("plain")).unwrap(), b"plain");

    // Somebody else's, from where they are at home.
    world.vm(&["ssh", "a", "useradd -m -s /bin/sh dev"]).run().exits(0);
    let summary = world.ask(&["cp", "--user", "dev", &text(&tree), &text(&tree.join("plain")), "a:"]);
    assert_eq!((summary["files"].as_u64(), summary["bytes"].as_u64()), (Some(9), Some(40)), "{summary}");
    let command = "cd ~dev && stat -c '%U %a' plain tree tree/deep/er/run";
    world.vm(&["ssh", "a", command]).run().exits(0).says("dev 644\ndev 755\ndev 751\n");

    // Rights of others do not come onto the host, nor do devices.
    world
        .vm(&["ssh", "a", "mkdir /odd; cp /bin/true /odd/suid; chmod 4755 /odd/suid; mknod /odd/null c 1 3"])
        .run()
        .exits(0);
    let odd = files.join("odd");
    world.vm(&["cp", "a:/odd", &text(&odd)]).run().exits(0).complains("null");
    assert_eq!(fs::metadata(odd.join("suid")).unwrap().mode() & 0o7777, 0o755);
    assert!(!odd.join("null").exists());
    world.leaves_nothing();
}

#[test]
fn streams_and_large_files() {
    let world = World::new();
    world.vm(&["create", "--name", "a", "--memory", "512M", "--start"]).run().exits(0);
    let file = world.directory().join("large");
    let mut data = vec![0; 50 << 20];
    std::io::Read::read_exact(&mut File::open("/dev/urandom").unwrap(), &mut data).unwrap();
    fs::write(&file, &data).unwrap();
    world.vm(&["cp", file.to_str().unwrap(), "a:/root/large"]).run().exits(0);
    let got = world.vm(&["cp", "a:large", "-"]).run().exits(0);
    assert!(got.stdout == data, "{} bytes came back", got.stdout.len());

    world.vm(&["cp", "-", "a:/root/from-stdin"]).stdin("hello\n").run().exits(0);
    world.vm(&["ssh", "a", "cat from-stdin; chmod 700 from-stdin"]).run().exits(0).says("hello\n");
    world.vm(&["cp", "-", "a:from-stdin"]).stdin("again\n").run().exits(0);
    world.vm(&["ssh", "a", "cat from-stdin; stat -c %a from-stdin"]).run().exits(0).says("again\n700\n");

    world.vm(&["ssh", "a", "mkdir -p d/e; echo x >d/e/f"]).run().exits(0);
    let archive = world.vm(&["cp", "--archive", "a:d", "-"]).run().exits(0).stdout;
    let names = |archive: &[u8]| -> Vec<PathBuf> {
        let mut archive = tar::Archive::new(archive);
        archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned()).collect()
    };
    assert_eq!(names(&archive), ["d/", "d/e/", "d/e/f"].map(PathBuf::from));
    world.vm(&["cp", "--archive", "-", "a:/srv/new"]).stdin(archive).run().exits(0);
    world.vm(&["ssh", "a", "cat /srv/new/d/e/f"]).run().exits(0).says("x\n");

    // Ctrl-C leaves no half file on either side.
    let mut sending = world.vm(&["cp", "-", "a:/root/half"]).open_stdin().start();
    sending.type_in("half of it");
    // What is being made has no name there, and shows among what the agent has open.
    let drafts = || {
        let command = "find /proc/[0-9]*/fd -lname '/root/#*' 2>/dev/null | wc -l; ls -A | grep half";
        world.vm(&["ssh", "a", command]).run().text().trim().to_owned()
    };
    wait_until("the file is begun", SHORT, || drafts() == "1");
    sending.signal(Signal::SIGINT);
    sending.finish(SHORT).exits(130);
    wait_until("what was begun is gone", SHORT, || drafts() == "0");

    let directory = world.directory().join("receiving");
    fs::create_dir(&directory).unwrap();
    let directory = directory.canonicalize().unwrap();
    world.vm(&["ssh", "a", "fallocate -l 2G endless"]).run().exits(0);
    let mut receiving = world.vm(&["cp", "a:endless", directory.to_str().unwrap()]).start();
    let pid = receiving.pid();
    wait_until("the file is begun", SHORT, || writes_in(pid, &directory));
    receiving.signal(Signal::SIGINT);
    receiving.finish(SHORT).exits(130);
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);

    // Nor does a guest that dies, even if somebody else's rest is there: the next copy removes it.
    world.vm(&["ssh", "a", "rm endless large; mkdir d2; echo rest >d2/.vmd-new-1-1; sync"]).run().exits(0);
    let mut sending = world.vm(&["cp", "-", "a:/root/d2/half"]).open_stdin().start();
    sending.type_in("half of it");
    let begun = "find /proc/[0-9]*/fd -lname '/root/d2/#*' 2>/dev/null | wc -l";
    wait_until("the file is begun", SHORT, || world.vm(&["ssh", "a", begun]).run().text().trim() == "1");
    world.vm(&["kill", "a"]).run().exits(0);
    sending.finish(SHORT).must("the copy fails", |ended| !ended.status.success());
    world.vm(&["start", "a"]).run().exits(0);
    world.vm(&["ssh", "a", "echo rest >d2/.vmd-new-1-2"]).run().exits(0);
    world.vm(&["cp", "a:d2", directory.to_str().unwrap()]).run().exits(0);
    assert_eq!(fs::read_dir(directory.join("d2")).unwrap().count(), 0);
    world.vm(&["cp", file.to_str().unwrap(), "a:d2"]).run().exits(0);
    world.vm(&["ssh", "a", "ls -A d2"]).run().exits(0).says("large\n");
    world.leaves_nothing();
}

#[test]
fn holes_stay_holes() {
    let world = World::new();
    world.vm(&["create", "--name", "a", "--memory", "512M", "--start"]).run().exits(0);
    let script = "truncate -s 100G sparse; echo end >>sparse; stat -c %s sparse";
    let size = world.vm(&["ssh", "a", script]).run().exits(0).text();
    let file = world.directory().join("sparse");
    let path = file.to_str().unwrap();
    world.vm(&["cp", "a:sparse", path]).run().exits(0);
    let about = fs::metadata(&file).unwrap();
    assert_eq!(format!("{}\n", about.len()), size);
    assert!(about.blocks() < 1024, "{} blocks", about.blocks());
    world.vm(&["cp", path, "a:again"]).run().exits(0);
    let script = "stat -c %s again; tail -c 4 again; test $(stat -c %b again) -lt 1024";
    world.vm(&["ssh", "a", script]).run().exits(0).says(&format!("{size}end\n"));
    world.leaves_nothing();
}

#[test]
fn what_cannot_be_copied_is_told_by_side_and_path() {
    let world = World::new();
    world.vm(&["create", "--name", "a", "--memory", "512M", "--start"]).run().exits(0);
    let file = world.directory().join("file");
    fs::write(&file, "x").unwrap();
    let file = file.to_str().unwrap();
    let cases: [(&[&str], i32, &str); 10] = [
        (&["cp", "a:/no/such", "."], 3, "a:/no/such"),
        (&["cp", "/no/such", "a:"], 3, "/no/such"),
        (&["cp", file, "a:/no/such/file"], 3, "a:/no/such"),
        (&["cp", file, "a:/dev/null"], 2, "device"),
        (&["cp", file, "a:/etc/passwd/x"], 2, "a:/etc/passwd"),
        (&["cp", "/etc", "a:/etc/passwd"], 2, "no directory"),
        (&["cp", file, file], 2, "neither side"),
        (&["cp", "--user", "nobody-of-that-name", file, "a:"], 3, "nobody-of-that-name"),
        (&["cp", file, "none:"], 3, "none"),
        (&["cp", "a:/etc", "a:/etc/within"], 2, "within"),
    ];
    for (command, code, told) in cases {
        world.vm(command).run().exits(code).complains(told);
    }
    world.vm(&["ssh", "a", "mount -t tmpfs -o size=1m none /mnt"]).run().exits(0);
    let full = world.directory().join("full");
    fs::write(&full, vec![1; 4 << 20]).unwrap();
    world.vm(&["cp", full.to_str().unwrap(), "a:/mnt"]).run().exits(5).complains("VM a").complains("full");
    world.vm(&["ssh", "a", "ls -A /mnt"]).run().exits(0).says("");
    world.leaves_nothing();
}
