//! Layers become what another tool makes of them, and nothing where they must not.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest, Sha256};

use crate::{
    common::{Bench, Seen, Tar, look, mounted, silent},
    layout::{Layout, layers},
};
use vm_image::{ImageError, rootfs};

pub(crate) async fn flatten(bench: &Bench, layout: &Path) -> Result<rootfs::BuiltRootfs, ImageError> {
    let (identity, sources) = layers(layout);
    rootfs::flatten(sources, identity, &bench.out(), &bench.scratch(), silent()).await
}

async fn flattened(bench: &Bench, archives: Vec<Vec<u8>>) -> Result<rootfs::BuiltRootfs, ImageError> {
    let layout = bench.dir.path().join("layout");
    Layout::write(&layout, archives, "cat");
    let result = flatten(bench, &layout).await;
    fs::remove_dir_all(&layout).unwrap();
    result
}

pub(crate) fn sum(path: &Path) -> Vec<u8> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut fs::File::open(path).unwrap(), &mut hasher).unwrap();
    hasher.finalize().to_vec()
}

/// What is hard to get right, in four layers.
fn awkward() -> Vec<Vec<u8>> {
    let mut one = Tar::default();
    one.push_as(b'5', "./", "", b"", (0o711, 3, 900_000_001));
    for dir in ["etc/", "usr/", "usr/bin/", "gone/", "opaque/", "opaque/sub/", "swap/", "d/", "var/", "run/"]
    {
        one.push(b'5', dir, "", b"");
    }
    one.push_as(b'0', "etc/a", "", b"one", (0o4755, 70_000, 1_100_000_000));
    one.push(b'1', "etc/b", "etc/a", b"");
    one.push(b'2', "bin", "usr/bin", b"");
    one.push(b'2', "var/run", "/run", b"");
    one.push(b'2', "ln", "usr", b"");
    for file in ["gone/x", "opaque/old", "opaque/sub/old", "swap/inner", "file", "d/keep", "d/drop", "last"] {
        one.push(b'0', file, "", file.as_bytes());
    }
    one.push(b'1', "linked", "last", b"");
    one.push(b'3', "null", "", b"");
    one.push(b'4', "disk", "", b"");
    one.push(b'6', "pipe", "", b"");
    one.push_pax(&[
        (
            "SCHILY.xattr.security.capability",
            &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, b'\n', 0, 0, 0, 0, 0, 0, 0],
        ),
        ("SCHILY.xattr.user.text", b"two\nlines"),
        ("mtime", b"1234567890.123456789"),
    ]);
    one.push(b'0', "ping", "", b"ping");

    let mut two = Tar::default();
    two.push(b'0', ".wh.gone", "", b"");
    two.push_as(b'5', "opaque/", "", b"", (0o700, 1, 1_200_000_000));
    two.push(b'0', "opaque/new", "", b"new");
    // After what it must not hide.
    two.push(b'0', "opaque/.wh..wh..opq", "", b"");
    two.push(b'0', "swap", "", b"a file now");
    two.push_as(b'5', "file/", "", b"", (0o750, 2, 1_300_000_000));
    two.push(b'0', "file/in", "", b"in");
    two.push(b'1', "etc/c", "etc/b", b"");
    two.push_as(b'5', "etc/", "", b"", (0o2775, 9, 1_400_000_000));
    two.push(b'0', "bin/tool", "", b"through the link");
    two.push(b'0', "var/run/lock", "", b"through an absolute one");
    // The link goes, what was written through it stays.
    two.push(b'0', "ln/made", "", b"made");
    two.push(b'0', ".wh.ln", "", b"");
    two.push(b'0', "d/keep", "", b"newer");
    two.push(b'0', "d/.wh.keep", "", b"");
    two.push(b'0', "d/.wh.drop", "", b"");
    two.push(b'0', ".wh.nothing", "", b"");

    let mut three = Tar::default();
    // The other names of the file keep what it was.
    three.push(b'0', "etc/a", "", b"three");
    three.push(b'0', ".wh.last", "", b"");
    three.push(b'2', "opaque", "etc", b"");
    three.push_as(b'5', "gone/", "", b"", (0o755, 0, 1_500_000_000));
    three.push(b'0', "gone/again", "", b"again");
    three.push(b'1', "usr/bin/a", "bin/tool", b"");

    let mut four = Tar::default();
    four.push(b'0', "etc/.wh.b", "", b"");
    four.push(b'2', "swap", &"t".repeat(90), b"");
    four.push_as(b'0', "ping", "", b"", (0o600, 0, 1_600_000_000));
    [one, two, three, four].into_iter().map(Tar::end).collect()
}

/// What Docker made on aufs: files with several names are in a directory of aufs's own.
#[tokio::test]
async fn layers_of_aufs_keep_the_content_of_links_and_nothing_else() {
    let bench = Bench::new();
    let layout = bench.dir.path().join("layout");
    let mut one = Tar::default();
    one.push(b'0', "shared", "", b"of the layer below");
    let mut two = Tar::default();
    two.push(b'5', ".wh..wh.plnk/", "", b"");
    two.push_as(b'0', ".wh..wh.plnk/7.9", "", b"twice", (0o640, 3, 1_200_000_000));
    two.push(b'0', ".wh..wh.plnk/8.9", "", b"nobody links to it");
    two.push(b'0', ".wh..wh.aufs", "", b"");
    two.push(b'5', ".wh..wh.orph/", "", b"");
    two.push(b'1', "shared", ".wh..wh.plnk/7.9", b"");
    two.push(b'1', "other", "/.wh..wh.plnk/7.9", b"");
    Layout::write(&layout, vec![one.end(), two.end()], "gzip");
    flatten(&bench, &layout).await.unwrap();
    bench.check();
    let ours = mounted(&bench.out(), look);
    let names: Vec<_> = ours.keys().filter_map(|path| path.to_str()).collect();
    assert!(!names.iter().any(|name| name.contains(".wh.")), "{names:?}");
    for name in ["shared", "other"] {
        let entry = &ours[Path::new(name)];
        assert_eq!(entry.content, Some(Sha256::digest("twice").to_vec()), "{name}");
    }
    // One of another layer's is none.
    let mut three = Tar::default();
    three.push(b'1', "late", ".wh..wh.plnk/7.9", b"");
    let mut two = Tar::default();
    two.push(b'0', ".wh..wh.plnk/7.9", "", b"twice");
    fs::remove_dir_all(&layout).unwrap();
    Layout::write(&layout, vec![two.end(), three.end()], "gzip");
    let error = flatten(&bench, &layout).await.unwrap_err();
    assert!(error.to_string().contains("late") && error.to_string().contains("not there"), "{error}");
}

#[tokio::test]
async fn layers_become_what_umoci_makes_of_them() {
    let bench = Bench::new();
    let layout = bench.dir.path().join("layout");
    for compressor in ["gzip", "zstd"] {
        Layout::write(&layout, awkward(), compressor);
        let image = format!("{}:latest", layout.display());
        let bundle = bench.dir.path().join("bundle");
        let output = Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle).output().unwrap();
        // Older ones read no Zstandard.
        let theirs = output.status.success().then(|| look(&bundle.join("rootfs")));
        assert!(theirs.is_some() || compressor == "zstd", "{}", String::from_utf8_lossy(&output.stderr));
        flatten(&bench, &layout).await.unwrap();
        bench.check();
        let ours = mounted(&bench.out(), look);
        for (path, theirs) in theirs.iter().flatten() {
            assert_eq!(ours.get(path), Some(theirs), "{path:?}");
        }
        assert!(theirs.is_none_or(|theirs| theirs.len() == ours.len()));
        let read = |path: &str| ours[Path::new(path)].content.clone();
        assert_eq!(read("etc/c"), Some(Sha256::digest("one").to_vec()));
        assert_eq!(read("linked"), Some(Sha256::digest("last").to_vec()));
        assert_eq!(read("usr/bin/tool"), Some(Sha256::digest("through the link").to_vec()));
        assert_eq!(read("run/lock"), Some(Sha256::digest("through an absolute one").to_vec()));
        assert!(!ours.contains_key(Path::new("gone/x")) && !ours.contains_key(Path::new("d/drop")));
        let _ = fs::remove_dir_all(&bundle);
        fs::remove_dir_all(&layout).unwrap();
    }
}

/// Names that start at the root, links with nothing behind them or a ".." too many.
#[tokio::test]
async fn odd_names_lead_where_umoci_has_them_lead() {
    let bench = Bench::new();
    let mut one = Tar::default();
    for (name, target) in
        [("var/run", "/run"), ("up", "../../../d"), ("twice", "var/run/deep"), ("back", "none/../way")]
    {
        one.push(b'2', name, target, b"");
    }
    one.push(b'0', "/ko-app/x", "", b"x");
    let mut two = Tar::default();
    for name in ["var/run/app", "up/f", "twice/f", "back/f", "/var/../b", "/ko-app/y"] {
        two.push(b'0', name, "", name.as_bytes());
    }
    two.push(b'1', "/ko-app/z", "/ko-app/x", b"");
    two.push(b'1', "w", "/var/run/app", b"");
    let layout = bench.dir.path().join("layout");
    Layout::write(&layout, vec![one.end(), two.end()], "gzip");
    let bundle = bench.dir.path().join("bundle");
    let image = format!("{}:latest", layout.display());
    let output = Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    flatten(&bench, &layout).await.unwrap();
    bench.check();
    // Times of directories that nobody names are no one's.
    let without_times = |seen: BTreeMap<PathBuf, Seen>| {
        seen.into_iter().map(|(path, seen)| (path, Seen { mtime: (0, 0), ..seen })).collect::<Vec<_>>()
    };
    let ours = without_times(mounted(&bench.out(), look));
    assert_eq!(ours, without_times(look(&bundle.join("rootfs"))));
    assert!(ours.iter().any(|(path, seen)| path == Path::new("run/app") && seen.links == 2), "{ours:?}");
}

/// Some tools leave it out, and have layers of no byte at all; what says that all is there is the digest.
#[tokio::test]
async fn layers_may_lack_their_end_mark_where_a_digest_tells() {
    let bench = Bench::new();
    let layout = bench.dir.path().join("layout");
    let open = |name: &str| Tar::default().add(b'0', name, "", b"content");
    for compressor in ["cat", "gzip"] {
        Layout::write(&layout, vec![open("a").0, Vec::new(), open("b").0], compressor);
        let (identity, sources) = layers(&layout);
        let build = |change: &dyn Fn(&mut rootfs::LayerSource)| {
            let mut sources = sources.clone();
            sources.iter_mut().for_each(change);
            let (bench, identity) = (&bench, identity.clone());
            async move { rootfs::flatten(sources, identity, &bench.out(), &bench.scratch(), silent()).await }
        };
        build(&|_| {}).await.unwrap();
        build(&|layer| layer.digest = None).await.unwrap();
        build(&|layer| layer.diff_id = None).await.unwrap();
        bench.check();
        let seen = mounted(&bench.out(), look);
        assert!(["", "a", "b"].iter().all(|path| seen.contains_key(Path::new(path))) && seen.len() == 3);
        fs::remove_file(bench.out()).unwrap();
        let error = build(&|layer| (layer.digest, layer.diff_id) = (None, None)).await.unwrap_err();
        assert!(matches!(error, ImageError::TruncatedArchive { .. }), "{error:?}");
        fs::remove_dir_all(&layout).unwrap();
    }
    // The middle of something is no end.
    let mut announced = open("a");
    announced.push_pax(&[("path", b"b")]);
    let whole = open("a").0;
    for cut in [announced.0, whole[..512].to_vec(), whole[..1000].to_vec(), whole[..100].to_vec()] {
        let error = flattened(&bench, vec![cut]).await.unwrap_err();
        assert!(matches!(error, ImageError::TruncatedArchive { .. }), "{error:?}");
        bench.assert_clean();
    }
}

#[tokio::test]
async fn the_same_layers_give_the_same_bytes() {
    let bench = Bench::new();
    let mut stack = awkward();
    let noise: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    for (i, archive) in stack.iter_mut().enumerate() {
        archive.truncate(archive.len() - 1024);
        let mut tar = Tar(std::mem::take(archive));
        // The same name again: what was below is given back.
        tar.push(b'0', "big", "", &noise[i * 1000..]);
        *archive = tar.end();
    }
    let layout = bench.dir.path().join("layout");
    let mut seen = Vec::new();
    let identity = vm_types::ImageDigest::try_from(format!("sha256:{}", "5".repeat(64))).unwrap();
    // Threads are done at other times with each.
    for compressor in ["cat", "xz", "gzip"] {
        Layout::write(&layout, stack.clone(), compressor);
        let (_, sources) = layers(&layout);
        let built =
            rootfs::flatten(sources, identity.clone(), &bench.out(), &bench.scratch(), silent()).await;
        assert_eq!(built.unwrap().digest, identity);
        bench.check();
        seen.push(sum(&bench.out()));
        fs::remove_dir_all(&layout).unwrap();
    }
    assert!(seen.windows(2).all(|pair| pair[0] == pair[1]));
}

#[tokio::test]
async fn hostile_layers_are_refused_by_name() {
    let base =
        || Tar::default().add(b'5', "d", "", b"").add(b'2', "out", "out", b"").add(b'0', "f", "", b"f").end();
    let top = |kind: u8, name: &str, link: &str| Tar::default().add(kind, name, link, b"").end();
    for (kind, name, link) in [
        (b'0', ".wh.", ""),
        (b'0', "d/.wh..", ""),
        (b'0', "d/.wh...", ""),
        (b'0', ".wh./x", ""),
        (b'0', ".wh.d/x", ""),
        (b'0', "../.wh.x", ""),
        (b'0', "out/x", ""),
        (b'0', "f/x", ""),
        (b'1', "hard", "out/etc/passwd"),
        (b'1', "hard", "d"),
        (b'1', "hard", ".wh.f"),
        (b'0', "lost+found", ""),
    ] {
        let bench = Bench::new();
        let error = flattened(&bench, vec![base(), top(kind, name, link)]).await.unwrap_err();
        assert!(matches!(error, ImageError::RefusedEntry { .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(name), "{name}: {error}");
        bench.assert_clean();
    }
}

#[tokio::test]
async fn an_image_without_layers_is_an_empty_root() {
    let bench = Bench::new();
    flattened(&bench, Vec::new()).await.unwrap();
    bench.check();
    let seen = mounted(&bench.out(), look);
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[Path::new("")].mode, seen[Path::new("")].mtime), (0o040_755, (0, 0)));
}

#[tokio::test]
async fn names_of_whiteouts_are_names_in_a_tarball() {
    let bench = Bench::new();
    let tar = Tar::default().add(b'0', "f", "", b"f").add(b'0', ".wh.f", "", b"kept").end();
    bench.build(tar).await.unwrap();
    let seen = mounted(&bench.out(), |root| (fs::read(root.join(".wh.f")).unwrap(), root.join("f").exists()));
    assert_eq!(seen, (b"kept".to_vec(), true));
}

#[tokio::test]
async fn a_layer_that_is_another_is_refused() {
    let bench = Bench::new();
    let layout = bench.dir.path().join("layout");
    Layout::write(&layout, vec![Tar::default().add(b'0', "f", "", b"f").end()], "gzip");
    let (identity, sources) = layers(&layout);
    let wrong = format!("sha256:{}", "0".repeat(64));
    for blob in [true, false] {
        let mut sources = sources.clone();
        *(if blob { &mut sources[0].digest } else { &mut sources[0].diff_id }) = Some(wrong.clone());
        let built =
            rootfs::flatten(sources, identity.clone(), &bench.out(), &bench.scratch(), silent()).await;
        let error = built.unwrap_err().to_string();
        assert!(error.contains(&wrong) && error.contains("instead of"), "{error}");
        bench.assert_clean();
    }
}

/// An archive with a few bytes changed is refused or makes a sound filesystem; nothing panics.
#[tokio::test]
async fn damaged_layers_never_make_a_damaged_filesystem() {
    let bench = Bench::new();
    let archives = awkward();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let (mut made, mut refused) = (0, 0);
    for _ in 0..120 {
        let mut archives = archives.clone();
        for _ in 0..1 + random(4) {
            let archive = random(archives.len());
            let archive = &mut archives[archive];
            let block = random(archive.len() / 512) * 512;
            let at = block + random(512);
            archive[at] = random(256) as u8;
            // A header whose sum is wrong would be the end of it.
            if &archive[block + 257..block + 262] == b"ustar" {
                archive[block + 148..block + 156].fill(b' ');
                let sum: u32 = archive[block..block + 512].iter().map(|&byte| u32::from(byte)).sum();
                archive[block + 148..block + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        match flattened(&bench, archives).await {
            Ok(_) => {
                bench.check();
                made += 1;
            }
            Err(error) => {
                assert!(!matches!(error, ImageError::Worker { .. }), "{error:?}");
                refused += 1;
            }
        }
    }
    assert!(made > 10 && refused > 10, "{made} made, {refused} refused: the test tests nothing");
}
