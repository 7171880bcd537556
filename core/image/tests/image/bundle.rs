//! Bundles: made by hand as others would make them, made by us, and made to do harm.

use std::{fs, path::Path, process::Command};

use sha2::{Digest, Sha256};
use vm_image::{
    ImageError,
    bundle::{self, Contents, Metadata, Want},
    kernel,
};
use vm_types::{ImageDigest, image::ImageConfig};

use crate::{
    common::{Bench, Tar, look, mounted, recorded, silent},
    kernel::{COMPLETE, bzimage, unpack as files_of},
};

/// Name and content.
type Part<'a> = (&'a str, &'a [u8]);

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// What a maker would write about these parts.
fn metadata(parts: &[(&str, &[u8])]) -> serde_json::Value {
    let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let parts: serde_json::Map<_, _> = parts
        .iter()
        .map(|(name, content)| {
            let member = serde_json::json!({ "digest": digest(content), "size": content.len() });
            ((*name).to_owned(), member)
        })
        .collect();
    serde_json::json!({
        "format": 1, "name": "team/tool:v2", "platform": format!("linux/{architecture}"), "parts": parts,
        "config": { "env": ["A=b"], "cmd": ["/tool"] },
    })
}

fn rootfs() -> Vec<u8> {
    let mut tar = Tar::default();
    tar.push(b'5', "etc/", "", b"");
    tar.push(b'0', "etc/name", "", b"of a bundle\n");
    tar.push(b'0', "etc/.wh.kept", "", b"a name like others\n");
    tar.push(b'2', "link", "etc/name", b"");
    tar.end()
}

/// A bundle with these entries, compressed.
fn pack(bench: &Bench, entries: &[(&str, &[u8])]) -> std::path::PathBuf {
    let mut tar = Tar::default();
    for (name, content) in entries {
        tar.push(b'0', name, "", content);
    }
    let path = bench.dir.path().join("bundle.tar.zst");
    fs::write(&path, zstd::encode_all(&tar.end()[..], 1).unwrap()).unwrap();
    path
}

async fn described(path: &Path) -> (Metadata, ImageDigest) {
    bundle::describe(path).await.unwrap().expect("it is a bundle")
}

async fn unpacked(bench: &Bench, path: &Path) -> Result<bundle::Unpacked, ImageError> {
    let (_, identity) = bundle::describe(path).await?.expect("it is a bundle");
    bundle::unpack(path, &identity, Want::Image(bench.out()), &bench.scratch(), silent()).await
}

#[tokio::test]
async fn a_bundle_of_a_tarball_and_a_kernel_is_both() {
    let bench = Bench::new();
    let (rootfs, boot) = (rootfs(), bzimage("6.9.1-mine"));
    let parts: [(&str, &[u8]); 3] =
        [("kernel", &boot), ("kernel.config", COMPLETE.as_bytes()), ("rootfs.tar", &rootfs)];
    let text = metadata(&parts).to_string();
    let mut entries = vec![("vm-bundle.json", text.as_bytes())];
    entries.extend(parts);
    let path = pack(&bench, &entries);
    let (told, identity) = described(&path).await;
    assert_eq!((told.name.as_deref(), told.config.cmd), (Some("team/tool:v2"), vec!["/tool".to_owned()]));
    assert_eq!(identity.to_string(), digest(text.as_bytes()));

    let (sink, seen) = recorded();
    let want = Want::Image(bench.out());
    let got = bundle::unpack(&path, &identity, want, &bench.scratch(), sink).await.unwrap();
    let built = got.rootfs.unwrap();
    assert_eq!(built.digest, identity);
    assert_eq!(built.size_bytes, fs::metadata(bench.out()).unwrap().len());
    assert!(seen.lock().unwrap().iter().any(|progress| progress.stage == "unpacking"));
    bench.check();
    let tree = mounted(&bench.out(), look);
    let read = |name: &str| tree[Path::new(name)].content.clone();
    assert_eq!(read("etc/name"), Some(Sha256::digest("of a bundle\n").to_vec()));
    assert_eq!(read("etc/.wh.kept"), Some(Sha256::digest("a name like others\n").to_vec()));

    let source = got.kernel.unwrap();
    assert_eq!(source.release(), "6.9.1-mine");
    assert!(source.origin().contains(identity.short()), "{}", source.origin());
    let installed = kernel::install(source, &bench.dir.path().join("kernels")).await.unwrap();
    assert_eq!(installed.release, "6.9.1-mine");

    // Who wants the kernel alone gets no filesystem.
    let scratch = bench.dir.path().join("other");
    let got = bundle::unpack(&path, &identity, Want::Kernel, &scratch, silent()).await.unwrap();
    assert!(got.rootfs.is_none() && got.kernel.is_some());
    // A bundle that was replaced since it was described is another one.
    let mut other = metadata(&parts);
    other["name"] = "other".into();
    let other = other.to_string();
    entries[0].1 = other.as_bytes();
    let path = pack(&bench, &entries);
    let error = bundle::unpack(&path, &identity, Want::Kernel, &scratch, silent()).await.unwrap_err();
    assert!(error.to_string().contains("has changed"), "{error}");
}

#[tokio::test]
async fn what_is_written_is_read_and_the_same() {
    let bench = Bench::new();
    bench.build(rootfs()).await.unwrap();
    // Mostly holes, and far more than is stored.
    let image = bench.dir.path().join("base.ext4");
    fs::rename(bench.out(), &image).unwrap();
    let status = Command::new("resize2fs").arg(&image).arg("600M").output().unwrap().status;
    assert!(status.success());
    let config = ImageConfig { env: vec!["A=b".into()], ..ImageConfig::default() };
    let contents = Contents {
        name: Some("mine:v1".into()),
        rootfs: image.clone(),
        kernel: None,
        config: config.clone(),
    };
    let path = bench.dir.path().join("out.tar.zst");
    let written = bundle::write(contents.clone(), &path, silent()).await.unwrap();
    let (told, identity) = described(&path).await;
    assert_eq!((told.name.as_deref(), &told.config, &identity), (Some("mine:v1"), &config, &written));
    unpacked(&bench, &path).await.unwrap();
    assert_eq!(fs::read(bench.out()).unwrap(), fs::read(&image).unwrap());
    let taken = |path: &Path| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512;
    assert!(taken(&bench.out()) < 80 << 20, "holes were filled: {}", taken(&bench.out()));
    // Other tools read it, too.
    let plain = bench.dir.path().join("plain.tar");
    zstd::stream::copy_decode(fs::File::open(&path).unwrap(), fs::File::create(&plain).unwrap()).unwrap();
    let listed = Command::new("tar").arg("-tf").arg(&plain).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "vm-bundle.json\nrootfs.ext4\n");

    // The same again is the same; nothing is overwritten, and nothing is left of what fails.
    let error = bundle::write(contents.clone(), &path, silent()).await.unwrap_err();
    assert!(matches!(error, ImageError::Exists { .. }) && error.hint().is_some(), "{error}");
    let second = bench.dir.path().join("second.tar.zst");
    assert_eq!(bundle::write(contents.clone(), &second, silent()).await.unwrap(), written);
    assert_eq!(fs::read(&second).unwrap(), fs::read(&path).unwrap());
    let gone = Contents { rootfs: "/nonexistent".into(), ..contents };
    bundle::write(gone, &bench.dir.path().join("third"), silent()).await.unwrap_err();
    let left = fs::read_dir(bench.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().contains("export") && name != "third"));
}

/// Carries an installed kernel to another place in a bundle, where it must be the same.
pub(crate) async fn carried(place: &Path, dir: &Path) {
    let bench = Bench::new();
    bench.build(rootfs()).await.unwrap();
    let contents = Contents {
        name: None,
        rootfs: bench.out(),
        kernel: Some(place.to_owned()),
        config: ImageConfig::default(),
    };
    let path = bench.dir.path().join("kernel.tar.zst");
    bundle::write(contents, &path, silent()).await.unwrap();
    let source = unpacked(&bench, &path).await.unwrap().kernel.expect("there is a kernel in it");
    let installed = kernel::install(source, &dir.join("carried")).await.unwrap();
    let there = dir.join("carried").join(installed.id.as_str());
    for file in ["vmlinuz", "modules.cpio"] {
        assert_eq!(fs::read(there.join(file)).unwrap(), fs::read(place.join(file)).unwrap(), "{file}");
    }
    assert!(files_of(&fs::read(there.join("modules.cpio")).unwrap()).0.len() >= 3);
}

#[tokio::test]
async fn a_kernel_keeps_what_is_known_of_it() {
    let dir = tempfile::tempdir().unwrap();
    // By a list of what is built in, which is not kept.
    let modules = dir.path().join("modules");
    fs::create_dir(&modules).unwrap();
    let names = ["virtio", "virtio_ring", "virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "ext4"];
    let list: String = names.iter().map(|name| format!("kernel/drivers/{name}.ko\n")).collect();
    fs::write(modules.join("modules.builtin"), list).unwrap();
    let boot = dir.path().join("vmlinuz");
    fs::write(&boot, bzimage("6.9.2")).unwrap();
    let source = kernel::import_files(&boot, Some(&modules), None).await.unwrap();
    let installed = kernel::install(source, &dir.path().join("kernels")).await.unwrap();
    carried(&dir.path().join("kernels").join(installed.id.as_str()), dir.path()).await;
}

#[tokio::test]
async fn hostile_and_broken_bundles_are_refused_by_name_and_leave_nothing() {
    let bench = Bench::new();
    let (rootfs, boot) = (rootfs(), bzimage("6.9.1"));
    let whole: [(&str, &[u8]); 2] = [("kernel", &boot), ("rootfs.tar", &rootfs)];
    let text = metadata(&whole).to_string();
    let first = ("vm-bundle.json", text.as_bytes());
    let mut other = rootfs.clone();
    other[1024] ^= 1;
    let mut outside = Tar::default();
    outside.push(b'0', "../outside", "", b"x");
    let outside = outside.end();
    let hostile = metadata(&[("rootfs.tar", &outside)]).to_string();
    let no_fs = metadata(&[("rootfs.ext4", b"text")]).to_string();
    let no_kernel = metadata(&[("kernel", b"text")]).to_string();
    let mut twice = Tar::default();
    twice.push(b'0', "a/x.ko", "", b"1");
    twice.push(b'0', "b/x.ko", "", b"2");
    let twice = twice.end();
    let modules = metadata(&[("kernel", &boot), ("modules.tar", &twice)]).to_string();
    let cases: Vec<(Vec<Part<'_>>, &str)> = vec![
        (vec![first, ("kernel", &boot), ("rootfs.tar", &other)], "rootfs.tar has the digest"),
        (vec![first, ("kernel", &boot)], "rootfs.tar is missing"),
        (vec![first, ("kernel", &boot), ("kernel", &boot), ("rootfs.tar", &rootfs)], "kernel is in it twice"),
        (vec![first, ("kernel", b"short"), ("rootfs.tar", &rootfs)], "kernel is no file of 4096 bytes"),
        (vec![first, ("kernel", &boot), ("rootfs.tar", &rootfs), ("more", b"x")], "says nothing of \"more\""),
        (vec![first, ("../../kernel", &boot), ("rootfs.tar", &rootfs)], "says nothing of \"../../kernel\""),
        (
            vec![first, first, ("kernel", &boot), ("rootfs.tar", &rootfs)],
            "says nothing of \"vm-bundle.json\"",
        ),
        (vec![("vm-bundle.json", hostile.as_bytes()), ("rootfs.tar", &outside)], "../outside"),
        (vec![("vm-bundle.json", no_fs.as_bytes()), ("rootfs.ext4", b"text")], "too small"),
        (vec![("vm-bundle.json", no_kernel.as_bytes()), ("kernel", b"text")], "kernel is none"),
        (vec![("vm-bundle.json", modules.as_bytes()), ("kernel", &boot), ("modules.tar", &twice)], "b/x.ko"),
    ];
    for (entries, reason) in cases {
        let path = pack(&bench, &entries);
        let error = unpacked(&bench, &path).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{reason}: {error}");
        assert!(error.hint().is_some());
        bench.assert_clean();
    }
    // A link where a file should be, and one that ends in the middle.
    let mut linked = Tar::default();
    linked.push(b'0', "vm-bundle.json", "", text.as_bytes());
    linked.push(b'2', "kernel", "/etc/passwd", b"");
    let path = bench.dir.path().join("bundle.tar.zst");
    fs::write(&path, linked.end()).unwrap();
    let error = unpacked(&bench, &path).await.unwrap_err();
    assert!(error.to_string().contains("kernel is no file"), "{error}");
    let whole = fs::read(pack(&bench, &[first, ("kernel", &boot), ("rootfs.tar", &rootfs)])).unwrap();
    let plain = zstd::decode_all(&whole[..]).unwrap();
    for cut in [700, 3000, plain.len() - 3000] {
        fs::write(&path, &plain[..cut]).unwrap();
        let refused = match bundle::describe(&path).await {
            Ok(None) => true,
            Ok(Some(_)) => unpacked(&bench, &path).await.is_err(),
            Err(_) => true,
        };
        assert!(refused, "{cut}");
        bench.assert_clean();
    }
    // What is none is none.
    for (name, bytes) in [("text", &b"no archive at all"[..]), ("rootfs.tar", &rootfs), ("empty", b"")] {
        let path = bench.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        assert!(bundle::describe(&path).await.unwrap().is_none(), "{name}");
    }
    assert!(bundle::describe(bench.dir.path()).await.unwrap().is_none());
}
