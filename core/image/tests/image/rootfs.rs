//! Root filesystems with the real tools: built, checked with e2fsck, mounted, compared.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::Command,
    time::Duration,
};

use crate::common::{Bench, Tar, look, mounted, privately, recorded, silent};
use sha2::{Digest, Sha256};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use vm_image::{ImageError, rootfs};

fn set_time(path: &Path, seconds: i64, nanos: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// A tree with one of everything.
fn everything(root: &Path) {
    let join = |name: &str| root.join(name);
    fs::create_dir_all(join("usr/bin")).unwrap();
    fs::create_dir(join("empty")).unwrap();
    fs::create_dir(join("tmp")).unwrap();
    fs::set_permissions(join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::write(join("usr/bin/su"), b"#!suid").unwrap();
    std::os::unix::fs::chown(join("usr/bin/su"), Some(70_000), Some(100_001)).unwrap();
    fs::set_permissions(join("usr/bin/su"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::hard_link(join("usr/bin/su"), join("another su")).unwrap();
    symlink("usr/bin", join("bin")).unwrap();
    symlink("/absolute/and/dangling", join("dangling")).unwrap();
    symlink("x/".repeat(400), join("long link")).unwrap();
    std::os::unix::fs::lchown(join("dangling"), Some(5), Some(6)).unwrap();
    let make = |name: &str, kind, major, minor| {
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(CWD, join(name), kind, Mode::from_raw_mode(0o620), device).unwrap();
    };
    make("null", FileType::CharacterDevice, 1, 3);
    make("big device", FileType::BlockDevice, 259, 70_000);
    make("pipe", FileType::Fifo, 0, 0);
    fs::write(join("quote\"d na'me \\ $x"), b"odd").unwrap();
    fs::write(join("new\nline"), b"odd").unwrap();
    set_time(&join("new\nline"), 77, 5);
    fs::write(join(&"n".repeat(255)), b"long").unwrap();
    let deep = (0..18).fold(join("deep"), |path, i| path.join(format!("{i:0>100}")));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("leaf"), b"leaf").unwrap();
    let sparse = fs::File::create(join("sparse")).unwrap();
    sparse.write_all_at(b"middle", 50 << 20).unwrap();
    sparse.write_all_at(b"odd", (70 << 20) + 12_345).unwrap();
    sparse.set_len((100 << 20) + 17).unwrap();
    fs::write(join("data"), (0..3_000_001u32).map(|i| ((i * 7) >> 3) as u8).collect::<Vec<_>>()).unwrap();
    fs::write(join("none"), b"").unwrap();
    let xattr = |name: &str, key: &str, value: &[u8]| {
        rustix::fs::lsetxattr(join(name), key, value, XattrFlags::empty()).unwrap();
    };
    // vfs_cap_data revision 2, cap_net_raw+ep; its bytes and the next value hold newlines and zeros.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, b'\n', 0, 0, 0, 0, 0, 0, 0];
    xattr("usr/bin/su", "security.capability", &capability);
    xattr("data", "user.note", b"two\nlines\0and more\n");
    xattr("data", "user.empty", b"");
    xattr("data", "user.big", &[7; 2500]);
    xattr("data", "user.größer", &[0xf0; 300]);
    xattr("empty", "user.dir", b"d");
    xattr("dangling", "trusted.link", b"l");
    // ACL version 2: user::rw-, user:4:r--, group::r--, mask::r--, other::---
    let acl: [u8; 44] = [
        2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 4, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255,
        16, 0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
    ];
    xattr("none", "system.posix_acl_access", &acl);
    set_time(&join("quote\"d na'me \\ $x"), 1_700_000_000, 123_456_789);
    set_time(&join("data"), 4_102_444_801, 500_000_000);
    set_time(&join("none"), -1000, 0);
    set_time(&join("dangling"), 1234, 0);
    set_time(&join("sparse"), 1_600_000_000, 0);
    set_time(&join("usr"), 999_999_999, 0);
    fs::set_permissions(root, fs::Permissions::from_mode(0o711)).unwrap();
    std::os::unix::fs::chown(root, Some(3), Some(4)).unwrap();
    set_time(root, 1_234_567_890, 250_000_000);
}

fn gnu_tar(root: &Path, options: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(["--numeric-owner", "--sort=name", "-C"])
        .arg(root)
        .args(options)
        .args(["-cf", "-", "."])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[tokio::test]
async fn every_kind_of_entry_is_kept_exactly() {
    let bench = Bench::new();
    let root = bench.dir.path().join("tree");
    fs::create_dir(&root).unwrap();
    everything(&root);
    let wanted = look(&root);
    for sparse in
        [&["--sparse"][..], &["--sparse", "--sparse-version=0.1"], &["--sparse", "--sparse-version=0.0"], &[]]
    {
        let options = [&["--format=pax", "--xattrs", "--xattrs-include=*"], sparse].concat();
        let built = bench.build(gnu_tar(&root, &options)).await.unwrap();
        bench.check();
        let about = fs::metadata(bench.out()).unwrap();
        assert_eq!((about.len(), about.mode() & 0o7777), (built.size_bytes, 0o444));
        assert!(built.used_bytes < 40 << 20, "holes were filled: {built:?}");
        let seen = mounted(&bench.out(), look);
        for (path, wanted) in &wanted {
            assert_eq!(seen.get(path), Some(wanted), "{path:?} {sparse:?}");
        }
        assert_eq!(seen.len(), wanted.len());
    }
}

#[tokio::test]
async fn gnu_archives_keep_long_names_and_holes() {
    let bench = Bench::new();
    let root = bench.dir.path().join("tree");
    fs::create_dir(&root).unwrap();
    everything(&root);
    // Many holes need a sparse map that goes on in further blocks.
    let sparse = fs::File::create(root.join("holes")).unwrap();
    for i in 0..200 {
        sparse.write_all_at(&[1; 4096], i << 16).unwrap();
    }
    let mut wanted = look(&root);
    bench.build(gnu_tar(&root, &["--format=gnu", "--sparse"])).await.unwrap();
    bench.check();
    let mut seen = mounted(&bench.out(), look);
    // What the form cannot hold.
    for seen in wanted.values_mut().chain(seen.values_mut()) {
        seen.xattrs.clear();
        seen.mtime.1 = 0;
        if seen.mode & 0o170_000 == 0o100_000 {
            seen.mode &= !0o070;
        }
    }
    assert_eq!(seen, wanted);
}

#[tokio::test]
async fn compression_is_told_by_content_and_the_digest_is_of_the_tar() {
    let bench = Bench::new();
    let plain = Tar::default().add(b'0', "a", "", b"hello").end();
    let digest = bench.build(plain.clone()).await.unwrap().digest;
    assert_eq!(digest.hex(), vm_image_sha256(&plain));
    for tool in ["gzip", "zstd", "xz"] {
        let file = bench.dir.path().join("archive");
        fs::write(&file, &plain).unwrap();
        let packed = Command::new(tool).args(["-c"]).arg(&file).output();
        let Ok(packed) = packed else { panic!("{tool} is not installed") };
        assert_eq!(bench.build(packed.stdout.clone()).await.unwrap().digest, digest, "{tool}");
        // A stream of which the end is missing.
        fs::remove_file(bench.out()).unwrap();
        let cut = packed.stdout[..packed.stdout.len() - 12].to_vec();
        let error = bench.build(cut).await.unwrap_err();
        assert!(
            matches!(error, ImageError::TruncatedArchive { .. } | ImageError::CorruptArchive { .. }),
            "{tool}: {error:?}"
        );
        bench.assert_clean();
    }
}

fn vm_image_sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn the_same_archive_gives_the_same_identity() {
    let bench = Bench::new();
    let tar = Tar::default().add(b'0', "a", "", b"hello").end();
    let identity = || {
        let output = Command::new("dumpe2fs").arg("-h").arg(bench.out()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let keep =
            ["Filesystem UUID", "Directory Hash Seed", "Filesystem volume name", "Reserved block count"];
        text.lines()
            .filter(|line| keep.iter().any(|key| line.starts_with(key)))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    bench.build(tar.clone()).await.unwrap();
    let first = identity();
    bench.build(tar).await.unwrap();
    assert_eq!(first, identity());
    assert!(first.iter().any(|line| line.ends_with(rootfs::LABEL)), "{first:?}");
    assert!(first.iter().any(|line| line.starts_with("Reserved") && line.ends_with(" 0")), "{first:?}");
}

#[tokio::test]
async fn hostile_archives_are_refused_by_name() {
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().to_str().unwrap();
    let up = Tar::default;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("../escape", up().add(b'0', "../escape", "", b"x").end()),
        ("a/../../escape", up().add(b'0', "a/../../escape", "", b"x").end()),
        ("/../escape", up().add(b'0', "/../escape", "", b"x").end()),
        ("in/file", up().add(b'2', "in", "in", b"").add(b'0', "in/file", "", b"x").end()),
        ("hard", up().add(b'1', "hard", "/etc/passwd", b"").end()),
        ("hard", up().add(b'1', "hard", "../../etc/passwd", b"").end()),
        ("hard", up().add(b'2', "e", "/etc", b"").add(b'1', "hard", "e/passwd", b"").end()),
        ("hard", up().add(b'1', "hard", "nowhere", b"").end()),
        ("file/below", up().add(b'0', "file", "", b"x").add(b'0', "file/below", "", b"x").end()),
        ("./", up().add(b'2', "./", out, b"").end()),
        ("what", up().add(b'Q', "what", "", b"").end()),
    ];
    for (path, tar) in cases {
        let bench = Bench::new();
        let error = bench.build(tar).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, ImageError::RefusedEntry { .. }), "{path}: {error:?}");
        assert!(text.contains(path), "{path}: {text}");
        assert!(error.hint().is_some());
        bench.assert_clean();
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "something was written outside");
}

/// As in images that `ko` makes, and with every name that means the root of the image and not the host's.
#[tokio::test]
async fn names_and_links_start_at_the_root() {
    let bench = Bench::new();
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().to_str().unwrap();
    let mut tar = Tar::default();
    tar.push_as(b'5', "/", "", b"", (0o711, 0, 1));
    tar.push(b'0', "/ko-app/x", "", b"absolute");
    tar.push(b'1', "/usr/x", "/ko-app/x", b"");
    tar.push(b'1', "y", "none/../ko-app/./x", b"");
    tar.push(b'0', "a/../b", "", b"up");
    tar.push(b'2', "link", out, b"");
    tar.push(b'0', "link/file", "", b"through a link");
    tar.push(b'5', "link/dir/", "", b"");
    tar.push(b'2', "in", "../../d/none/../e", b"");
    tar.push(b'0', "in/file", "", b"one up too many");
    bench.build(tar.end()).await.unwrap();
    bench.check();
    let seen = mounted(&bench.out(), look);
    for (path, content) in [
        ("ko-app/x", "absolute"),
        ("usr/x", "absolute"),
        ("y", "absolute"),
        ("b", "up"),
        (&format!("{out}/file")[1..], "through a link"),
        ("d/e/file", "one up too many"),
    ] {
        let content = Some(Sha256::digest(content).to_vec());
        assert_eq!(seen.get(Path::new(path)).map(|seen| &seen.content), Some(&content), "{path}");
    }
    assert_eq!((seen[Path::new("")].mode, seen[Path::new("y")].links), (0o040_711, 3));
    assert!(seen.contains_key(Path::new(&format!("{out}/dir")[1..])));
    assert!(!seen.contains_key(Path::new("a")) && !seen.contains_key(Path::new("d/none")));
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "something was written outside");
}

/// Headers that would have to be kept, copied or gone through again and again.
#[tokio::test]
async fn excessive_headers_are_refused() {
    let names: Vec<String> = (0..1001).map(|i| format!("SCHILY.xattr.user.{i}")).collect();
    let many: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"x"[..])).collect();
    let large = vec![b'x'; 600 << 10];
    let map = "0,0,".repeat(400_000);
    let pairs: Vec<(&str, &[u8])> =
        [("GNU.sparse.offset", &b"0"[..]), ("GNU.sparse.numbytes", b"0")].repeat(100_000);
    type Headers<'a> = Vec<(u8, Vec<(&'a str, &'a [u8])>)>;
    let cases: [(&str, Headers<'_>); 7] = [
        ("too many extended attributes", vec![(b'x', many.clone())]),
        ("too many extended attributes", vec![(b'x', many[..600].to_vec()), (b'x', many[600..].to_vec())]),
        (
            "too many extended attributes",
            vec![(b'x', vec![(many[0].0, &large)]), (b'x', vec![(many[1].0, &large)])],
        ),
        ("of all entries", vec![(b'g', vec![(many[0].0, &large)])]),
        ("of all entries", vec![(b'g', vec![("linkpath", &large)])]),
        ("sparse map is too long", vec![(b'x', vec![("GNU.sparse.map", map.as_bytes())])]),
        ("sparse map is too long", vec![(b'x', pairs); 4]),
    ];
    for (says, headers) in cases {
        let bench = Bench::new();
        let mut tar = Tar::default();
        for (kind, records) in &headers {
            tar.push_records(*kind, records);
        }
        tar.push(b'0', "f", "", b"");
        let error = bench.build(tar.end()).await.unwrap_err();
        assert!(matches!(error, ImageError::CorruptArchive { .. }), "{says}: {error:?}");
        assert!(error.to_string().contains(says), "{says}: {error}");
        bench.assert_clean();
    }
    // The same one again and again is one, a comment for all is none.
    let bench = Bench::new();
    let mut again = vec![("SCHILY.xattr.user.a", &b"before"[..]); 50_000];
    again.push(("SCHILY.xattr.user.a", b"last"));
    let mut tar = Tar::default();
    tar.push_records(b'g', &[("comment", &large)]);
    tar.push_pax(&again);
    tar.push(b'0', "f", "", b"");
    bench.build(tar.end()).await.unwrap();
    let seen = mounted(&bench.out(), look);
    assert_eq!(seen[Path::new("f")].xattrs[&b"user.a"[..]], b"last");
}

/// A few bytes that ask the decompressor for gigabytes.
#[tokio::test]
async fn decompressors_take_no_more_memory_than_real_archives_need() {
    let bench = Bench::new();
    let file = bench.dir.path().join("archive");
    fs::write(&file, Tar::default().add(b'0', "a", "", b"hello").end()).unwrap();
    let mut packed = Command::new("xz").args(["-T1", "-c"]).arg(&file).output().unwrap().stdout;
    bench.build(packed.clone()).await.unwrap();
    fs::remove_file(bench.out()).unwrap();
    // The block's header, with a dictionary of 1.5 GiB (the .xz file format 1.2.1, 3.1 and 5.3.1).
    let header = &mut packed[12..];
    let length = (usize::from(header[0]) + 1) * 4;
    let filter = header.windows(2).position(|bytes| bytes == [0x21, 1]).unwrap();
    header[filter + 2] = 37;
    let mut sum = flate2::Crc::new();
    sum.update(&header[..length - 4]);
    header[length - 4..length].copy_from_slice(&sum.sum().to_le_bytes());
    // A frame with a window of 1 GiB (RFC 8878, 3.1.1.1.2), and an empty block.
    let frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 20 << 3, 1, 0, 0];
    for (packed, says) in [(packed, "256 MiB of memory"), (frame, "too much memory")] {
        let error = bench.build(packed).await.unwrap_err();
        assert!(matches!(error, ImageError::CorruptArchive { .. }), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
        bench.assert_clean();
    }
}

/// More than a group of blocks in one file, and files behind it; and as many directories as one can count.
#[tokio::test]
async fn groups_are_crossed_and_links_counted_to_their_end() {
    const MIB: usize = 1 << 20;
    let bench = Bench::new();
    let noise: Vec<u8> = (0..MIB as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8 | 1).collect();
    let piece = move |i: usize| {
        let mut piece = noise.clone();
        // Each block is another.
        for (block, bytes) in piece.chunks_mut(4096).enumerate() {
            bytes[..8].copy_from_slice(&(i * 256 + block).to_be_bytes());
        }
        piece
    };
    let dense: Vec<u8> = (0..140).flat_map(&piece).collect();
    let mut tar = Tar::default().add(b'0', "dense", "", &dense);
    drop(dense);
    for i in 0..200 {
        tar.push(b'0', &format!("small {i}"), "", &piece(i)[..i * 100]);
    }
    // With its own and its parent's name for it 65000.
    for i in 0..64_998 {
        tar.push(b'5', &format!("many/{i}"), "", b"");
    }
    bench.build(tar.end()).await.unwrap();
    bench.check();
    mounted(&bench.out(), move |root| {
        let dense = fs::File::open(root.join("dense")).unwrap();
        assert_eq!(dense.metadata().unwrap().len(), 140 * MIB as u64);
        let mut read = vec![0; MIB];
        for i in 0..140 {
            dense.read_exact_at(&mut read, (i * MIB) as u64).unwrap();
            assert!(read == piece(i), "MiB {i}");
        }
        for i in 0..200 {
            assert!(fs::read(root.join(format!("small {i}"))).unwrap() == piece(i)[..i * 100], "{i}");
        }
        assert_eq!(fs::metadata(root.join("many")).unwrap().nlink(), 65_000);
    });
}

#[tokio::test]
async fn overlong_paths_and_names_are_refused() {
    for (path, says) in [
        ("abc/".repeat(1024), "4096 bytes long"),
        (format!("a/{}/b", "n".repeat(256)), "a name of 256 bytes"),
    ] {
        let bench = Bench::new();
        let mut tar = Tar::default();
        tar.push_pax(&[("path", path.as_bytes())]);
        tar.push(b'5', "x", "", b"");
        let error = bench.build(tar.end()).await.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        bench.assert_clean();
    }
}

#[tokio::test]
async fn a_later_entry_replaces_an_earlier_one() {
    let bench = Bench::new();
    let tar = Tar::default()
        .add(b'2', "a", "/etc/passwd", b"")
        .add(b'0', "a", "", b"file")
        .add(b'0', "b", "", b"file")
        .add(b'5', "b", "", b"")
        .add(b'0', "b/c", "", b"implied and named")
        .add(b'0', "x/y/z", "", b"directories above are made")
        .end();
    bench.build(tar).await.unwrap();
    bench.check();
    let seen = mounted(&bench.out(), |root| {
        (
            fs::read(root.join("a")).unwrap(),
            fs::metadata(root.join("b")).unwrap().is_dir(),
            root.join("x/y/z").is_file(),
        )
    });
    assert_eq!(seen, (b"file".to_vec(), true, true));
}

#[tokio::test]
async fn damaged_archives_fail_and_leave_nothing() {
    let good = Tar::default().add(b'0', "first", "", &[1; 5000]).add(b'0', "second", "", &[2; 5000]).end();
    // Every cut but one that leaves an end mark.
    for cut in
        (0..good.len() - 1024).step_by(1024).chain([5632, good.len() - 1025, good.len() - 1024, 100, 511])
    {
        let bench = Bench::new();
        let error = bench.build(good[..cut].to_vec()).await.unwrap_err();
        assert!(matches!(error, ImageError::TruncatedArchive { .. }), "{cut}: {error:?}");
        bench.assert_clean();
    }
    let mut flipped = good.clone();
    flipped[5632 + 3] ^= 1;
    let error = Bench::new().build(flipped).await.unwrap_err();
    assert!(matches!(&error, ImageError::CorruptArchive { last, .. } if last == "first"), "{error:?}");
    let bench = Bench::new();
    let error = bench.build(b"this is no archive".repeat(100)).await.unwrap_err();
    assert!(matches!(error, ImageError::CorruptArchive { .. }), "{error:?}");
    bench.assert_clean();
}

/// Shapes of content that strain a filesystem's tables, each made in one go without a second try.
#[tokio::test]
async fn any_shape_of_content_fits() {
    let noise = |seed: u32, length: usize| {
        (0..length as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8 | 1)
            .collect::<Vec<u8>>()
    };
    let mut shapes: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Tar::default().end()),
        ("one byte", Tar::default().add(b'0', "a", "", b"x").end()),
        ("one huge file", Tar::default().add(b'0', "a", "", &noise(1, 100 << 20)).end()),
    ];
    let mut small = Tar::default();
    for i in 0..10_000 {
        small.push(b'0', &format!("d{}/f{i}", i % 7), "", b"x");
    }
    shapes.push(("many small files", small.end()));
    let mut empty = Tar::default();
    for i in 0..6_000 {
        empty.push(b'0', &format!("{i:0>90}"), "", b"");
    }
    shapes.push(("one directory of long names", empty.end()));
    let mut directories = Tar::default();
    for i in 0..6_000 {
        directories.push(b'5', &format!("{}/{i}", i % 13), "", b"");
    }
    shapes.push(("many directories", directories.end()));
    let mut links = Tar::default();
    for i in 0..6_000 {
        links.push(b'2', &format!("l{i}"), &"t".repeat(99), b"");
    }
    shapes.push(("many long links", links.end()));
    let mut xattrs = Tar::default();
    for i in 0..4_000 {
        xattrs.push_pax(&[("SCHILY.xattr.user.a", &noise(i, 300))]);
        xattrs.push(b'0', &format!("x{i}"), "", b"x");
    }
    shapes.push(("many attributes", xattrs.end()));
    let mut deep = Tar::default();
    let mut path = String::new();
    for _ in 0..1023 {
        path.push_str("abc/");
        deep.push_pax(&[("path", path.as_bytes())]);
        deep.push(b'5', "x", "", b"");
    }
    shapes.push(("deep directories", deep.end()));
    let mut holes = vec![0; 128 << 20];
    for at in (0..holes.len()).step_by(16 << 10) {
        holes[at] = 1;
    }
    shapes.push(("one file of 8192 fragments", Tar::default().add(b'0', "a", "", &holes).end()));
    for (name, tar) in shapes {
        let bench = Bench::new();
        let length = tar.len() as u64;
        let built = bench.build(tar).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        bench.check();
        assert!(built.used_bytes < length * 5 + (40 << 20), "{name}: {built:?} of {length}");
        println!("{name}: tar {length}, {built:?}");
    }
}

#[tokio::test]
async fn a_grown_filesystem_is_sound() {
    let bench = Bench::new();
    bench.build(Tar::default().add(b'0', "a", "", b"x").end()).await.unwrap();
    fs::set_permissions(bench.out(), fs::Permissions::from_mode(0o600)).unwrap();
    fs::File::options().write(true).open(bench.out()).unwrap().set_len(64 << 30).unwrap();
    let grown = Command::new("resize2fs").arg("-f").arg(bench.out()).output().unwrap();
    assert!(grown.status.success(), "{}", String::from_utf8_lossy(&grown.stderr));
    bench.check();
    let inodes = mounted(&bench.out(), |root| rustix::fs::statvfs(root).unwrap().f_files);
    assert!(inodes > 3_000_000, "a grown disk runs out of inodes: {inodes}");
}

#[tokio::test]
async fn a_dropped_build_leaves_nothing() {
    let bench = Bench::new();
    let (reader, writer) = std::io::pipe().unwrap();
    let source = rootfs::TarSource::Reader { reader: Box::new(reader), length: None };
    let (sink, seen) = recorded();
    let started = async {
        use std::io::Write;
        // The archive goes on, and its sender takes its time.
        let mut writer = writer;
        writer.write_all(&Tar::default().add(b'0', "a", "", b"x").0).unwrap();
        tokio::time::timeout(Duration::from_secs(60), async {
            while seen.lock().unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        writer
    };
    let (out, scratch) = (bench.out(), bench.scratch());
    let writer = tokio::select! {
        result = rootfs::build(source, &out, &scratch, sink) => panic!("{result:?}"),
        writer = started => writer,
    };
    // The sender still holds its end, and says nothing.
    tokio::time::timeout(Duration::from_secs(60), async {
        while fs::read_dir(&scratch).unwrap().count() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the scratch directory was not emptied");
    assert!(!out.exists());
    drop(writer);
}

/// Why an image of this archive cannot be made on a disk of its own, of so many MiB. It says what to do, and nothing is left of what was
/// begun.
fn refused_by_a_disk_of(mebibytes: u32, tar: Vec<u8>, check: fn(&ImageError) -> bool) {
    let bench = Bench::new();
    let small = bench.dir.path().join("small");
    fs::create_dir(&small).unwrap();
    let (out, scratch) = (small.join("out"), small.join("scratch"));
    privately(move || {
        let size = format!("size={mebibytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&small).status();
        assert!(mounted.unwrap().success());
        // Its threads see the mount: they are made by this one.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let source = rootfs::TarSource::Reader { reader: Box::new(std::io::Cursor::new(tar)), length: None };
        let error = runtime.block_on(rootfs::build(source, &out, &scratch, silent())).unwrap_err();
        assert!(check(&error), "{error:?}");
        assert!(error.hint().unwrap().contains("free space"), "{error:?}");
        assert!(!out.exists());
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
    });
}

/// The host's last room is not taken.
#[test]
fn a_full_disk_is_told_and_left_as_it_was() {
    let tar = Tar::default().add(b'0', "a", "", &vec![1; 200 << 20]).end();
    refused_by_a_disk_of(320, tar, |error| matches!(error, ImageError::Entry { path, .. } if path == "a"));
}

/// Directories and inodes are counted before they are written.
#[test]
fn a_disk_that_holds_only_the_contents_is_told() {
    let mut tar = Tar::default().add(b'0', "a", "", &vec![1; 20 << 20]);
    // 40 MiB of blocks, where 30 MiB are left but for the reserve.
    for i in 0..10_000 {
        tar.push(b'5', &i.to_string(), "", b"");
    }
    refused_by_a_disk_of(306, tar.end(), |error| matches!(error, ImageError::File { action: "write", .. }));
}

#[tokio::test]
async fn a_missing_archive_says_so() {
    let bench = Bench::new();
    let source = rootfs::TarSource::Path(bench.dir.path().join("nothing.tar"));
    let error = rootfs::build(source, &bench.out(), &bench.scratch(), silent()).await.unwrap_err();
    assert!(error.to_string().contains("nothing.tar") && error.hint().is_some(), "{error}");
    bench.assert_clean();
}
