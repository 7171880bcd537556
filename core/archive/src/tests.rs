//! Both ends together, as `vm cp` has them on the host: a sender that may be hostile, and files that somebody wants to keep.

use std::{
    ffi::OsStr,
    fs,
    io::Read,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::Command,
    time::{Duration, SystemTime},
};

use tar::{Builder, EntryType, Header};
use tokio::sync::mpsc;
use vm_types::guest::files::{PackOptions, PackReport, UnpackOptions, code};

use crate::{Failure, Output, Replaced, Unpacking, pack, pax::Entry, unpack};

/// As `vm cp` unpacks on the host.
fn careful(top: &Path, only: Option<&str>, archive: &[u8]) -> Result<PackReport, Failure> {
    let how = Unpacking {
        owner: None,
        modes: 0o777,
        only: only.map(OsStr::new),
        careful: true,
        options: UnpackOptions::default(),
    };
    unpack(top, how, archive)
}

fn packed(path: &Path, name: &str) -> Vec<u8> {
    let (output, mut pieces) = mpsc::channel(1);
    std::thread::scope(|scope| {
        let work = scope.spawn(move || {
            let options = PackOptions::default();
            pack(path, Some(OsStr::new(name)), &options, Replaced::new(), &Output(output)).unwrap()
        });
        let mut all = Vec::new();
        while let Some(piece) = pieces.blocking_recv() {
            all.extend_from_slice(&piece);
        }
        work.join().unwrap();
        all
    })
}

/// Name, type, target and content.
type Member<'a> = (&'a str, EntryType, &'a str, &'a [u8]);

fn archive(entries: &[Member<'_>]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for (name, kind, link, content) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o6755);
        header.set_size(content.len() as u64);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        archive.append(&header, *content).unwrap();
    }
    archive.into_inner().unwrap()
}

fn code_of(result: Result<PackReport, Failure>) -> &'static str {
    match result {
        Err(Failure::Told { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn modes_and_times_arrive_to_the_nanosecond_also_of_directories() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    fs::create_dir_all(at("from/in/er")).unwrap();
    fs::write(at("from/in/file"), "x").unwrap();
    symlink("nowhere", at("from/in/link")).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 987_654_321);
    // The deepest first, as what is made changes its directory.
    for (name, mode) in [("from/in/file", 0o600), ("from/in/er", 0o500), ("from/in", 0o511), ("from", 0o755)]
    {
        fs::File::open(at(name)).unwrap().set_modified(time).unwrap();
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let report = careful(&at("to"), Some("new"), &packed(&at("from"), "new")).unwrap();
    assert_eq!((report.entries, report.files, report.content), (5, 1, 1));
    for (name, mode) in [("", 0o755), ("in", 0o511), ("in/er", 0o500), ("in/file", 0o600)] {
        let meta = fs::metadata(at("to/new").join(name)).unwrap();
        assert_eq!(meta.modified().unwrap(), time, "{name}");
        assert_eq!(meta.mode() & 0o7777, mode, "{name}");
    }
    let times = |name: &str| fs::symlink_metadata(at(name)).unwrap().modified().unwrap();
    assert_eq!(times("to/new/in/link"), times("from/in/link"));
}

#[test]
fn nothing_but_what_was_asked_for_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let top = scratch.path().join("home");
    fs::create_dir_all(top.join("mine")).unwrap();
    fs::write(top.join("mine/kept"), "kept").unwrap();
    fs::write(top.join("profile"), "kept").unwrap();
    symlink("mine", top.join("way")).unwrap();
    symlink("../outside", top.join("out")).unwrap();
    fs::create_dir(scratch.path().join("outside")).unwrap();
    use EntryType::{Directory, Link, Regular, Symlink};
    let evil = &b"evil"[..];
    let cases: [(&str, &[Member<'_>], &str); 10] = [
        ("new", &[("profile", Regular, "", evil)], code::OUTSIDE),
        ("new", &[("./profile", Regular, "", evil)], code::OUTSIDE),
        ("new", &[("new/../profile", Regular, "", evil)], code::OUTSIDE),
        ("new", &[("new", Link, "profile", b"")], code::OUTSIDE),
        ("new", &[("new", Symlink, ".", b""), ("new/profile", Regular, "", evil)], code::NOT_DIRECTORY),
        ("new", &[("new", Symlink, "mine", b""), ("new/", Directory, "", b"")], code::NOT_DIRECTORY),
        ("way", &[("way/kept", Regular, "", evil)], code::NOT_DIRECTORY),
        ("out", &[("out/evil", Regular, "", evil)], code::NOT_DIRECTORY),
        ("profile", &[("profile/", Directory, "", b"")], code::NOT_DIRECTORY),
        ("mine", &[("mine", Regular, "", evil)], code::IS_DIRECTORY),
    ];
    for (only, entries, wanted) in cases {
        let got = code_of(careful(&top, Some(only), &archive(entries)));
        assert_eq!(got, wanted, "{entries:?}");
        let _ = fs::remove_file(top.join("new"));
    }
    for name in ["mine/kept", "profile"] {
        assert_eq!(fs::read_to_string(top.join(name)).unwrap(), "kept", "{name}");
    }
    assert_eq!(fs::read_dir(&top).unwrap().count(), 4, "no drafts are left");
    assert_eq!(fs::read_dir(scratch.path().join("outside")).unwrap().count(), 0);
}

/// chown(2) takes the largest number as "leave it": the file would be whoever's that unpacks, its set-uid bit with it.
#[test]
fn owners_that_nobody_can_be_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
        for (kind, name) in [(EntryType::Regular, &b"new"[..]), (EntryType::Directory, b"new/")] {
            let entry = Entry {
                name,
                kind,
                mode: 0o6755,
                uid,
                gid,
                mtime: (5, 0),
                link: b"",
                size: 0,
                device: (0, 0),
                xattrs: &[],
                sparse: None,
            };
            let mut archive = Vec::new();
            entry.encode(&mut archive);
            archive.resize(archive.len() + 1024, 0);
            let options = UnpackOptions { owners: true, ..UnpackOptions::default() };
            let how = Unpacking { owner: None, modes: 0o7777, only: None, careful: false, options };
            let refused = unpack(scratch.path(), how, archive.as_slice());
            let Err(Failure::Told { code: code::MALFORMED, message }) = refused else {
                panic!("{refused:?}")
            };
            assert!(message.starts_with("new"), "{message}");
            assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "{uid}:{gid}");
        }
    }
}

/// A volume's label, directories of incremental archives, and a time for all.
#[test]
fn archives_with_more_than_files_are_unpacked() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    fs::create_dir_all(at("from/in")).unwrap();
    fs::write(at("from/in/file"), "content").unwrap();
    // What has parts of a second gets a time of its own.
    let whole = SystemTime::UNIX_EPOCH + Duration::from_secs(1_234_567_890);
    fs::File::open(at("from/in/file")).unwrap().set_modified(whole).unwrap();
    let snapshot = format!("--listed-incremental={}", at("snapshot").display());
    let cases = [
        (&["--label=some label"][..], None),
        (&["--format=posix", "--label=some label"], None),
        (&["--format=gnu", "--label=some label", &snapshot], None),
        (&["--format=posix", "--pax-option=mtime=77"], Some(77)),
    ];
    for (number, (options, time)) in cases.into_iter().enumerate() {
        let output = Command::new("tar")
            .args(options)
            .args(["--create", "--directory"])
            .args([&at("from"), Path::new("in")])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let to = at(&number.to_string());
        let report = careful(&to, None, &output.stdout).unwrap();
        assert_eq!((report.entries, report.files, report.warnings.len()), (2, 1, 0), "{options:?}");
        assert_eq!(fs::read_to_string(to.join("in/file")).unwrap(), "content", "{options:?}");
        assert_eq!(fs::read_dir(&to).unwrap().count(), 1, "{options:?}");
        if let Some(time) = time {
            assert_eq!(fs::metadata(to.join("in/file")).unwrap().mtime(), time);
        }
    }
}

#[test]
fn what_has_no_place_on_the_host_is_left_out_with_a_warning() {
    let scratch = tempfile::tempdir().unwrap();
    let archive = archive(&[
        ("null", EntryType::Char, "", b""),
        ("pipe", EntryType::Fifo, "", b""),
        ("suid", EntryType::Regular, "", b"x"),
    ]);
    let report = careful(scratch.path(), None, &archive).unwrap();
    assert_eq!((report.entries, report.warnings.len()), (1, 2), "{report:?}");
    assert!(report.warnings[0].message.contains("null"));
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    assert_eq!(fs::metadata(scratch.path().join("suid")).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn a_sender_that_goes_half_way_leaves_no_half_file() {
    let scratch = tempfile::tempdir().unwrap();
    let whole =
        archive(&[("one", EntryType::Regular, "", b"1"), ("two", EntryType::Regular, "", &[2; 5000])]);
    for cut in [3000, 512, 1024, 1700] {
        let top = tempfile::tempdir_in(scratch.path()).unwrap();
        let how = Unpacking {
            owner: None,
            modes: 0o777,
            only: None,
            careful: true,
            options: UnpackOptions::default(),
        };
        assert_eq!(code_of(unpack(top.path(), how, whole.as_slice().take(cut))), code::TRUNCATED, "{cut}");
        let left: Vec<_> =
            fs::read_dir(top.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name == "one"), "{cut}: {left:?}");
    }
}

#[test]
fn what_would_hide_others_in_a_layer_is_left_out() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    fs::create_dir_all(at("from/.wh.directory")).unwrap();
    for file in ["from/.wh.file", "from/file", "from/.wh.directory/in"] {
        fs::write(at(file), "").unwrap();
    }
    let paths = [".wh.directory/in", ".wh.file", "file"];
    for (generalize, selected, entries, warnings) in
        [(true, true, 1, 2), (true, false, 2, 2), (false, false, 5, 0)]
    {
        let options = PackOptions { generalize, selected, ..PackOptions::default() };
        let (output, mut pieces) = mpsc::channel(100);
        let (from, output) = (at("from"), Output(output));
        let report = match selected {
            true => {
                let mut paths = paths.iter().map(|path| path.as_bytes().to_vec());
                crate::pack_selected(&from, &options, Replaced::new(), || Ok(paths.next()), &output)
            }
            false => pack(&from, None, &options, Replaced::new(), &output),
        };
        pieces.close();
        let report = report.unwrap();
        assert_eq!((report.entries, report.warnings.len()), (entries, warnings), "{report:?}");
        assert!(report.warnings.iter().all(|warning| warning.message.contains(".wh.")), "{report:?}");
    }
}

/// Files of /proc say that they are empty, those of /sys that they have a page.
#[test]
fn files_of_the_kernel_have_what_is_read_from_them() {
    let scratch = tempfile::tempdir().unwrap();
    for file in ["/proc/version", "/proc/self/limits", "/sys/devices/virtual/net/lo/address"] {
        let archive = packed(Path::new(file), "file");
        let report = careful(scratch.path(), Some("file"), &archive).unwrap();
        assert_eq!((report.files, report.warnings.len()), (1, 0), "{report:?}");
        assert_eq!(fs::read(scratch.path().join("file")).unwrap(), fs::read(file).unwrap(), "{file}");
    }
}

#[test]
fn what_others_left_half_done_is_no_part_of_a_tree_and_goes() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    for directory in ["from/in", "to/new/in", "to/new/other"] {
        fs::create_dir_all(at(directory)).unwrap();
    }
    let left = ".vmd-new-7-12";
    for directory in ["from", "from/in", "to", "to/new/in", "to/new/other"] {
        fs::write(at(directory).join(left), "half").unwrap();
    }
    fs::write(at("from/in/.vmd-new-file"), "whole").unwrap();
    let archive = packed(&at("from"), "new");
    let report = careful(&at("to"), Some("new"), &archive).unwrap();
    assert_eq!((report.entries, report.files), (3, 1));
    assert_eq!(fs::read(at("to/new/in/.vmd-new-file")).unwrap(), b"whole");
    for (directory, there) in [("to", false), ("to/new/in", false), ("to/new/other", true)] {
        assert_eq!(at(directory).join(left).exists(), there, "{directory}");
    }
}
