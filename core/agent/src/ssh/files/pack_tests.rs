//! Archives of files, by the daemon's client, read by GNU tar and record by record.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use bytes::Bytes;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat},
    sys::time::TimeSpec,
};
use rustix::fs::{XattrFlags, lsetxattr, setxattr};
use tokio::{sync::mpsc, time::timeout};
use vm_guest::{Guest, GuestError};
use vm_types::guest::files::{PackOptions, PackReport, code};

use vm_archive::{Failure, Output, Replaced, pack};

use crate::ssh::{guest_tests::guest, tests::PATIENCE};

async fn packed(guest: &Guest, path: &Path, options: PackOptions) -> (Vec<u8>, PackReport) {
    let mut archive = std::io::Cursor::new(Vec::new());
    let packed = guest.pack(path.to_str().unwrap(), options, &mut archive).await.unwrap();
    let archive = archive.into_inner();
    assert_eq!(packed.bytes, archive.len() as u64);
    (archive, packed.report)
}

/// One entry as it stands in the archive.
#[derive(Debug)]
struct Entry {
    name: Vec<u8>,
    kind: u8,
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    content: Vec<u8>,
}

/// Reads an archive by the letter of POSIX.1-2008.
fn entries(mut archive: &[u8]) -> Vec<Entry> {
    let mut all = Vec::new();
    let mut records = BTreeMap::new();
    loop {
        let (header, rest) = archive.split_at(512);
        if header == [0; 512] {
            assert_eq!(rest, [0; 512], "two blocks end it, and nothing follows");
            return all;
        }
        let text = |from: usize, length: usize| {
            let field = &header[from..from + length];
            field.split(|byte| *byte == 0).next().unwrap().to_vec()
        };
        let octal = |from, length| {
            u64::from_str_radix(String::from_utf8(text(from, length)).unwrap().trim(), 8).unwrap()
        };
        let sum = header.iter().enumerate().map(|(at, byte)| match at {
            148..156 => 32,
            _ => u64::from(*byte),
        });
        assert_eq!(octal(148, 8), sum.sum::<u64>());
        let size = octal(124, 12) as usize;
        let (content, rest) = rest.split_at(size);
        archive = &rest[size.next_multiple_of(512) - size..];
        if header[156] == b'x' {
            let mut left = content;
            while let Some(blank) = left.iter().position(|byte| *byte == b' ') {
                let length: usize = std::str::from_utf8(&left[..blank]).unwrap().parse().unwrap();
                let record = &left[blank + 1..length - 1];
                let equals = record.iter().position(|byte| *byte == b'=').unwrap();
                records.insert(record[..equals].to_vec(), record[equals + 1..].to_vec());
                left = &left[length..];
            }
            continue;
        }
        let records = std::mem::take(&mut records);
        let name = [&b"GNU.sparse.name"[..], b"path"].into_iter().find_map(|key| records.get(key));
        let name = name.cloned().unwrap_or_else(|| text(0, 100));
        all.push(Entry { name, kind: header[156], records, content: content.to_vec() });
    }
}

fn names(archive: &[u8]) -> Vec<String> {
    entries(archive).into_iter().map(|entry| String::from_utf8(entry.name).unwrap()).collect()
}

/// Unpacks an archive by GNU tar.
fn extracted(archive: &[u8], scratch: &Path) -> PathBuf {
    let (file, directory) = (scratch.join("archive.tar"), scratch.join("extracted"));
    fs::write(&file, archive).unwrap();
    fs::create_dir(&directory).unwrap();
    let output = Command::new("tar")
        .args([
            "--extract",
            "--preserve-permissions",
            "--same-owner",
            "--numeric-owner",
            "--warning=no-timestamp",
            "--file",
        ])
        .arg(&file)
        .arg("--directory")
        .arg(&directory)
        .output()
        .unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    directory
}

/// All that is to be said of a tree, by path; names of files with several links are told by the first of them.
fn described(directory: &Path) -> BTreeMap<PathBuf, String> {
    fn walk(
        base: &Path,
        path: &Path,
        first: &mut HashMap<u64, PathBuf>,
        all: &mut BTreeMap<PathBuf, String>,
    ) {
        let meta = fs::symlink_metadata(path).unwrap();
        let name = path.strip_prefix(base).unwrap().to_owned();
        let mut text = format!(
            "{:o} {}:{} {}.{:09} {}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.rdev()
        );
        if meta.is_symlink() {
            text += &format!(" -> {}", fs::read_link(path).unwrap().display());
        }
        if meta.is_file() {
            text += &format!(" {} bytes", meta.len());
            if meta.len() < 1 << 20 {
                text += &format!(" {:?}", fs::read(path).unwrap());
            }
            if meta.nlink() > 1 {
                text += &format!(" = {}", first.entry(meta.ino()).or_insert(name.clone()).display());
            }
        }
        all.insert(name, text);
        if meta.is_dir() {
            let mut paths: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
            paths.sort();
            paths.iter().for_each(|path| walk(base, path, first, all));
        }
    }
    let mut all = BTreeMap::new();
    walk(directory, directory, &mut HashMap::new(), &mut all);
    all
}

fn set_time(path: &Path, seconds: i64, nanos: i64) {
    let time = TimeSpec::new(seconds, nanos);
    utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink).unwrap();
}

#[tokio::test]
async fn every_kind_of_file_comes_out_as_it_is() {
    let (guest, served) = guest().await;
    let tree = served.path("tree");
    let at = |name: &str| tree.join(name);
    fs::create_dir_all(at("a/b/c")).unwrap();
    fs::create_dir(at("sticky")).unwrap();
    fs::set_permissions(at("sticky"), fs::Permissions::from_mode(0o3777)).unwrap();
    fs::write(at("a/plain"), "plain").unwrap();
    fs::write(at("a/empty"), "").unwrap();
    fs::write(at("a/block"), [7; 512]).unwrap();
    fs::write(at("a/odd"), [7; 70_001]).unwrap();
    chown(at("a/plain"), Some(3_000_000_000), Some(2_097_152)).unwrap();
    fs::set_permissions(at("a/plain"), fs::Permissions::from_mode(0o6751)).unwrap();
    fs::hard_link(at("a/plain"), at("a/b/again")).unwrap();
    fs::hard_link(at("a/plain"), at("a/b/third")).unwrap();
    symlink("../a", at("a/link")).unwrap();
    symlink("t".repeat(300), at("a/far")).unwrap();
    lchown(at("a/link"), Some(12), Some(34)).unwrap();
    mknod(&at("fifo"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o640), 0).unwrap();
    mknod(&at("char"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), makedev(4000, 1_000_000)).unwrap();
    mknod(&at("block"), SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), makedev(7, 3)).unwrap();
    set_time(&at("a/empty"), -3, 250_000_000);
    set_time(&at("a/block"), 1_234_567_890, 123_456_789);
    set_time(&at("a/far"), 1, 1);
    set_time(&at("sticky"), 5, 0);
    let before = described(&tree);
    let _socket = UnixListener::bind(at("sticky/socket")).unwrap();
    set_time(&at("sticky"), 5, 0);

    let (archive, report) = packed(&guest, &tree, PackOptions::default()).await;
    assert_eq!(report.warnings, []);
    assert_eq!(report.entries, before.len() as u64);
    let found = described(&extracted(&archive, served.directory.path()));
    for (path, wanted) in &before {
        assert_eq!(found.get(path), Some(wanted), "{}", path.display());
    }
    assert_eq!(found.len(), before.len());
    let sorted = names(&archive);
    assert_eq!(sorted[..6], ["./", "a/", "a/b/", "a/b/again", "a/b/c/", "a/b/third"]);
    let (again, _) = packed(&guest, &tree, PackOptions::default()).await;
    assert!(again == archive, "the same files are the same archive");
}

#[tokio::test]
async fn what_is_packed_can_be_unpacked_here() {
    let (guest, served) = guest().await;
    let tree = served.path("tree");
    fs::create_dir_all(tree.join("x".repeat(200)).join("y".repeat(200))).unwrap();
    fs::write(tree.join("x".repeat(200)).join("y".repeat(200)).join("z"), "deep").unwrap();
    fs::write(tree.join("\u{e4}"), "umlaut").unwrap();
    fs::hard_link(tree.join("\u{e4}"), tree.join("more")).unwrap();
    symlink("more", tree.join("less")).unwrap();
    let (archive, _) = packed(&guest, &tree, PackOptions::default()).await;
    let other = served.path("other");
    guest.unpack(archive.as_slice(), other.to_str().unwrap(), 0, 0).await.unwrap();
    let content = |directory: &Path| -> BTreeMap<_, _> {
        let strip = |text: String| text.split_once(" 0:0 ").map(|(mode, _)| mode.to_owned());
        described(directory).into_iter().map(|(path, text)| (path, strip(text))).collect()
    };
    assert_eq!(content(&tree), content(&other));
    assert_eq!(fs::read(other.join("x".repeat(200)).join("y".repeat(200)).join("z")).unwrap(), b"deep");
    assert_eq!(fs::read_link(other.join("less")).unwrap(), Path::new("more"));
    assert_eq!(fs::metadata(other.join("more")).unwrap().nlink(), 2);
}

#[tokio::test]
async fn strange_names_are_only_names() {
    let (guest, served) = guest().await;
    let tree = served.path("tree");
    fs::create_dir(&tree).unwrap();
    let longest = [b'n'; 255];
    let names: [&[u8]; 11] = [
        b"-rf",
        b"...",
        b"new\nline",
        b"a=b",
        b"11 path=up\n",
        b"\xff\xfe",
        b"back\\slash",
        b" ",
        b"*?[\"'$(x)",
        &longest[..100],
        &longest,
    ];
    for name in names {
        fs::write(tree.join(OsStr::from_bytes(name)), name).unwrap();
    }
    fs::create_dir(tree.join(OsStr::from_bytes(&longest[..101]))).unwrap();
    fs::write(tree.join(OsStr::from_bytes(&longest[..101])).join("in"), "in").unwrap();
    let (archive, report) = packed(&guest, &tree, PackOptions::default()).await;
    assert_eq!((report.entries, report.warnings), (14, vec![]));
    assert_eq!(described(&extracted(&archive, served.directory.path())), described(&tree));
}

#[tokio::test]
async fn attributes_are_kept_byte_by_byte() {
    let (guest, served) = guest().await;
    let tree = served.path("tree");
    fs::create_dir(&tree).unwrap();
    let file = tree.join("file");
    fs::write(&file, "x").unwrap();
    fs::hard_link(&file, tree.join("second")).unwrap();
    symlink("file", tree.join("link")).unwrap();
    // capabilities(7): version 2 in little-endian, cap_net_raw permitted and effective.
    let capability: Vec<u8> =
        [0x0200_0001u32, 1 << 13, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    // acl(5), as the kernel has it: owner, user 1000, group, mask, other.
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1u16, 6u16, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)]
    {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&permissions.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
    }
    let mut wanted: BTreeMap<&str, &[u8]> = BTreeMap::new();
    for (name, value) in [
        ("user.binary", &b"\x00\n12 path=evil\n\xff="[..]),
        ("user.empty", b""),
        ("security.capability", &capability),
        ("system.posix_acl_access", &acl),
    ] {
        // Not every filesystem takes every one.
        if setxattr(&file, name, value, XattrFlags::empty()).is_ok() {
            wanted.insert(name, value);
        }
    }
    let with_equals = setxattr(&file, "user.a=b", b"", XattrFlags::empty()).is_ok();
    let on_link = lsetxattr(tree.join("link"), "trusted.link", b"1", XattrFlags::empty()).is_ok();
    let (archive, report) = packed(&guest, &tree, PackOptions::default()).await;
    let found = entries(&archive);
    let xattrs = |name: &str| -> BTreeMap<String, Vec<u8>> {
        let entry = found.iter().find(|entry| entry.name == name.as_bytes()).unwrap();
        let named = |(key, value): (&Vec<u8>, &Vec<u8>)| {
            let name = key.strip_prefix(b"SCHILY.xattr.")?;
            Some((String::from_utf8(name.to_vec()).unwrap(), value.clone()))
        };
        entry.records.iter().filter_map(named).collect()
    };
    let wanted: BTreeMap<_, _> =
        wanted.into_iter().map(|(name, value)| (name.to_owned(), value.to_vec())).collect();
    assert_eq!(xattrs("file"), wanted);
    assert_eq!(xattrs("second"), BTreeMap::new(), "they are the first name's");
    assert_eq!(xattrs("link").contains_key("trusted.link"), on_link);
    let left_out: Vec<_> = report.warnings.iter().map(|warning| warning.code.as_str()).collect();
    assert_eq!(left_out, vec![code::LEFT_OUT; usize::from(with_equals)], "{:?}", report.warnings);
}

#[tokio::test]
async fn holes_are_not_sent_where_they_may_stay_out() {
    let (guest, served) = guest().await;
    let tree = served.path("tree");
    fs::create_dir(&tree).unwrap();
    let end = 9 << 30;
    for (name, data, size) in [
        ("middle", &[(1 << 20, 100_000), (8 << 30, 1)][..], end),
        ("ends", &[(0, 4096), (end - 4096, 4096)], end),
        ("nothing", &[], 1 << 40),
    ] {
        let file = File::create(tree.join(name)).unwrap();
        file.set_len(size).unwrap();
        for (offset, length) in data {
            file.write_all_at(&vec![b'd'; *length], *offset).unwrap();
        }
    }
    fs::write(tree.join("whole"), [0; 100_000]).unwrap();
    let options = PackOptions { sparse: true, ..PackOptions::default() };
    let (archive, report) = packed(&guest, &tree, options).await;
    assert_eq!(report.warnings, []);
    assert!(archive.len() < 1 << 20, "{}", archive.len());
    let copy = extracted(&archive, served.directory.path());
    assert_eq!(described(&copy), described(&tree));
    for name in ["middle", "ends", "nothing"] {
        let (file, copy) = (File::open(tree.join(name)).unwrap(), File::open(copy.join(name)).unwrap());
        for offset in [0, 4000, (1 << 20) - 10, (1 << 20) + 99_990, (8 << 30) - 1, end - 4100, end - 100] {
            let (mut wanted, mut found) = ([1; 100], [2; 100]);
            file.read_exact_at(&mut wanted, offset).unwrap();
            copy.read_exact_at(&mut found, offset).unwrap();
            assert!(wanted == found, "{name} at {offset}");
        }
    }
    // Asked for otherwise, they are sent.
    let file = tree.join("holes");
    File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let (archive, _) = packed(&guest, &file, PackOptions::default()).await;
    let [entry] = entries(&archive).try_into().unwrap();
    assert!(entry.name == b"holes" && entry.content == vec![0; 1 << 20]);
}

#[tokio::test]
async fn one_file_a_link_and_nothing() {
    let (guest, served) = guest().await;
    let directory = served.path("dir");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("file"), "content").unwrap();
    let link = served.path("link");
    symlink(&directory, &link).unwrap();
    for path in [link.clone(), link.join("")] {
        let (archive, _) = packed(&guest, &path, PackOptions::default()).await;
        let [entry] = entries(&archive).try_into().unwrap();
        assert_eq!((entry.name.as_slice(), entry.kind), (&b"link"[..], b'2'));
    }
    let (archive, _) = packed(&guest, &directory.join("./file"), PackOptions::default()).await;
    let [entry] = entries(&archive).try_into().unwrap();
    assert_eq!((entry.name.as_slice(), entry.content.as_slice()), (&b"file"[..], &b"content"[..]));
    for (path, wanted) in [
        (served.path("none").to_str().unwrap(), code::NOT_FOUND),
        (directory.join("file/below").to_str().unwrap(), code::NOT_DIRECTORY),
        ("etc", code::REQUEST),
        ("/etc/../etc", code::REQUEST),
    ] {
        let mut sink = std::io::Cursor::new(Vec::new());
        let error = guest.pack(path, PackOptions::default(), &mut sink).await.unwrap_err();
        assert!(matches!(&error, GuestError::File { code, .. } if code == wanted), "{path}: {error:?}");
        assert!(sink.into_inner().is_empty());
    }
}

#[tokio::test]
async fn excluded_paths_are_left_out_or_emptied() {
    let (guest, served) = guest().await;
    let tree = served.path("tree");
    for path in ["keep/a", "keep/b", "gone/a", "empty/a/b", "gone-not"] {
        fs::create_dir_all(tree.join(path)).unwrap();
    }
    fs::write(tree.join("file"), "").unwrap();
    let base = tree.to_str().unwrap();
    let exclude = ["gone", "keep//./b", "empty/", "file"].map(|name| format!("{base}/{name}")).to_vec();
    let options = PackOptions { exclude, ..PackOptions::default() };
    let (archive, _) = packed(&guest, &tree, options).await;
    assert_eq!(names(&archive), ["./", "empty/", "gone-not/", "keep/", "keep/a/"]);
}

/// Packs on this thread. `meanwhile` is called with what it sends, piece by piece.
fn direct(
    path: &Path,
    options: &PackOptions,
    replaced: Replaced,
    mut meanwhile: impl FnMut(usize) + Send,
) -> (Vec<u8>, PackReport) {
    let (output, mut pieces) = mpsc::channel::<Bytes>(1);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let (mut archive, mut count) = (Vec::new(), 0);
            while let Some(piece) = pieces.blocking_recv() {
                archive.extend_from_slice(&piece);
                meanwhile(count);
                count += 1;
            }
            archive
        });
        let output = Output(output);
        let report = pack(path, None, options, replaced, &output).unwrap();
        drop(output);
        (reader.join().unwrap(), report)
    })
}

#[test]
fn other_contents_stand_in_for_some_files() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("changed"), "of the VM").unwrap();
    fs::write(at("gone"), "of the VM").unwrap();
    symlink("gone", at("link")).unwrap();
    let replaced = Replaced::from([
        (at("changed"), Some(b"of all".to_vec())),
        (at("gone"), None),
        (at("link"), Some(b"no file".to_vec())),
        (at("never"), Some(b"there".to_vec())),
    ]);
    let (archive, _) = direct(directory.path(), &PackOptions::default(), replaced, |_| {});
    let found = entries(&archive);
    let found: Vec<_> =
        found.iter().map(|entry| (entry.name.as_slice(), entry.kind, entry.content.as_slice())).collect();
    let wanted: [(&[u8], u8, &[u8]); 3] =
        [(b"./", b'5', b""), (b"changed", b'0', b"of all"), (b"link", b'2', b"")];
    assert_eq!(found, wanted);
}

#[test]
fn files_that_change_or_vanish_are_told_of_and_spoil_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    // So large that the packer is in the midst of it when its beginning is here.
    let large = vec![b'l'; 4 << 20];
    fs::write(at("b-shrinks"), &large).unwrap();
    fs::write(at("c-vanishes"), "").unwrap();
    fs::create_dir(at("d-vanishes")).unwrap();
    fs::write(at("e-stays"), "stays").unwrap();
    let (archive, report) = direct(directory.path(), &PackOptions::default(), Replaced::new(), |count| {
        if count == 0 {
            File::options().write(true).open(at("b-shrinks")).unwrap().set_len(1000).unwrap();
            fs::remove_file(at("c-vanishes")).unwrap();
            fs::remove_dir(at("d-vanishes")).unwrap();
        }
    });
    let found = entries(&archive);
    let [_, shrunk, stays] = found.as_slice() else { panic!("{report:?}") };
    assert_eq!(shrunk.content.len(), large.len());
    let kept = shrunk.content.iter().take_while(|byte| **byte == b'l').count();
    assert!(kept < large.len() && shrunk.content[kept..].iter().all(|byte| *byte == 0));
    assert_eq!(stays.content, b"stays");
    let told: Vec<_> =
        report.warnings.iter().map(|warning| (warning.code.as_str(), warning.message.as_str())).collect();
    assert_eq!(
        told.iter().map(|(code, _)| *code).collect::<Vec<_>>(),
        [code::CHANGED, code::VANISHED, code::VANISHED]
    );
    assert!(told[0].1.starts_with(at("b-shrinks").to_str().unwrap()), "{told:?}");

    fs::write(at("b-shrinks"), &large).unwrap();
    let (archive, report) = direct(directory.path(), &PackOptions::default(), Replaced::new(), |count| {
        if count == 0 {
            File::options().append(true).open(at("b-shrinks")).unwrap().set_len(5 << 20).unwrap();
        }
    });
    assert!(entries(&archive)[1].content == large, "of one that grows there is what it had");
    assert_eq!(report.warnings.len(), 1, "{report:?}");
}

#[test]
fn other_mounts_are_empty_directories() {
    let directory = tempfile::tempdir().unwrap();
    // In a mount namespace of a thread of its own, which ends with it.
    let work = || {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["tree/tmpfs", "tree/bound", "source"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        fs::write(at("source/file"), "").unwrap();
        fs::write(at("tree/file"), "").unwrap();
        mount(Some("none"), &at("tree/tmpfs"), Some("tmpfs"), MsFlags::empty(), Some("mode=1751")).unwrap();
        fs::write(at("tree/tmpfs/file"), "").unwrap();
        // Of the same filesystem, but not of the tree.
        for (from, to) in [("source", "tree/bound"), ("source/file", "tree/file")] {
            mount(Some(&at(from)), &at(to), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        }
        let options = PackOptions { one_filesystem: true, ..PackOptions::default() };
        let (archive, _) = direct(&at("tree"), &options, Replaced::new(), |_| {});
        assert_eq!(names(&archive), ["./", "bound/", "tmpfs/"]);
        let (archive, _) = direct(&at("tree"), &PackOptions::default(), Replaced::new(), |_| {});
        assert_eq!(names(&archive), ["./", "bound/", "bound/file", "file", "tmpfs/", "tmpfs/file"]);
    };
    std::thread::scope(|scope| scope.spawn(work).join().unwrap());
}

#[test]
fn what_is_too_deep_is_told_of() {
    let directory = tempfile::tempdir().unwrap();
    let mut path = directory.path().to_owned();
    for _ in 0..600 {
        path.push("d");
    }
    fs::create_dir_all(&path).unwrap();
    let (archive, report) = direct(directory.path(), &PackOptions::default(), Replaced::new(), |_| {});
    assert_eq!(names(&archive).len(), 513);
    assert_eq!(report.warnings[0].code, code::LEFT_OUT);
}

#[test]
fn warnings_have_an_end() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("a"), vec![0; 1 << 20]).unwrap();
    let names: Vec<_> = (0..300).map(|number| at(&format!("{}{number}", "v".repeat(200)))).collect();
    names.iter().for_each(|name| fs::write(name, "").unwrap());
    let (_, report) = direct(directory.path(), &PackOptions::default(), Replaced::new(), |count| {
        if count == 0 {
            names.iter().for_each(|name| fs::remove_file(name).unwrap());
        }
    });
    assert_eq!(report.warnings.len() as u64 + report.more, 300);
    let size = serde_json::to_vec(&report).unwrap().len();
    assert!((10_000..64 << 10).contains(&size), "{size}");
}

#[test]
fn a_reader_that_has_gone_ends_it() {
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join("endless")).unwrap().set_len(1 << 40).unwrap();
    let (output, mut pieces) = mpsc::channel::<Bytes>(1);
    let reader = std::thread::spawn(move || drop(pieces.blocking_recv().unwrap()));
    let result = pack(directory.path(), None, &PackOptions::default(), Replaced::new(), &Output(output));
    reader.join().unwrap();
    assert!(matches!(result, Err(Failure::Gone)), "{result:?}");
}

#[tokio::test]
async fn a_client_that_takes_nothing_makes_it_wait_and_one_that_goes_ends_it() {
    let (guest, served) = guest().await;
    File::create(served.path("endless")).unwrap().set_len(1 << 40).unwrap();
    let (near, mut far) = tokio::io::duplex(1000);
    let path = served.path("endless");
    let packing = guest.pack(path.to_str().unwrap(), PackOptions::default(), near);
    let reading = async {
        let mut piece = [0; 512];
        tokio::io::AsyncReadExt::read_exact(&mut far, &mut piece).await.unwrap();
        piece
    };
    // Cancel-safe is what is tested: what is dropped is waiting for its reader.
    let piece = tokio::select! {
        got = packing => panic!("{got:?}"),
        piece = timeout(Duration::from_secs(60), reading) => piece.unwrap(),
    };
    assert_eq!(piece[156], b'x');
    let got = timeout(PATIENCE, guest.run(vm_guest::Command::new(["echo", "good"]), 100)).await;
    assert_eq!(got.unwrap().unwrap().stdout, b"good\n");
}
