//! Layouts and archives: read, as other tools write them, and written, as other tools read them.

use std::{collections::BTreeMap, fs, io::Write, os::unix::fs::symlink, path::Path};

use vm_oci::{
    Compression, Digest, Form, ImageSource, OciError, Pulled, ReferenceDefaults, Store, export, silent,
};

use crate::{
    bench::{Bench, client, in_namespace, run, skopeo_copy, until},
    made::{Image, Made, one, tar},
};

async fn fetch(text: &str, store: &Store) -> Result<Pulled, OciError> {
    let source = ImageSource::parse(text, &ReferenceDefaults::default()).unwrap();
    client().fetch(&source, store, &silent()).await
}

fn made(bench: &Bench, last: Compression) -> (Made, Image) {
    let mut made = Made::default();
    let layers = [
        (tar("plain", 30_000), Compression::None),
        (tar("gzip", 20_000), Compression::Gzip),
        (tar("last", 10_000), last),
    ];
    let image = made.image("amd64", &layers);
    made.tag(&image, "v1");
    made.write(&bench.path("layout"));
    (made, image)
}

/// All of a directory, with what changes when something is written.
fn snapshot(dir: &Path) -> BTreeMap<String, (Vec<u8>, u32, i64)> {
    use std::os::unix::fs::MetadataExt;
    let mut files = BTreeMap::new();
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let about = entry.metadata().unwrap();
            if about.is_dir() {
                left.push(entry.path());
            } else {
                let content = fs::read(entry.path()).unwrap();
                files.insert(
                    entry.path().display().to_string(),
                    (content, about.mode(), about.ctime_nsec() + about.ctime()),
                );
            }
        }
    }
    files
}

#[test]
fn a_layout_is_read_and_left_as_it_is() {
    in_namespace(|bench| async move {
        let (_, image) = made(&bench, Compression::Zstd);
        let before = snapshot(&bench.path("layout"));
        let store = bench.store();
        let layout = bench.text("layout");
        for text in [
            format!("oci:{layout}"),
            format!("oci:{layout}:v1"),
            format!("oci:{layout}@{}", image.manifest),
            layout.clone(),
        ] {
            let pulled = fetch(&text, &store).await.unwrap();
            assert_eq!(
                (pulled.manifest_digest, pulled.names.as_slice()),
                (image.manifest, &["v1".to_owned()][..]),
                "{text}"
            );
            assert_eq!(pulled.layers.iter().map(|layer| layer.digest).collect::<Vec<_>>(), image.layers);
        }
        assert_eq!(snapshot(&bench.path("layout")), before);
        // What is in the store is a copy: a later change of the layout is none of it.
        fs::write(bench.path("layout/blobs/sha256").join(image.layers[0].hex()), "other").unwrap();
        assert_eq!(Digest::of(&fs::read(store.path(&image.layers[0])).unwrap()), image.layers[0]);
        let other = Store::open(&bench.path("other")).unwrap();
        let error = fetch(&format!("oci:{layout}"), &other).await.unwrap_err();
        assert!(matches!(error, OciError::Size { found: 5, .. }), "{error}");
        let mut bytes = fs::read(store.path(&image.layers[0])).unwrap();
        bytes[600] ^= 1;
        fs::write(bench.path("layout/blobs/sha256").join(image.layers[0].hex()), bytes).unwrap();
        let error = fetch(&format!("oci:{layout}"), &other).await.unwrap_err();
        assert!(matches!(error, OciError::Digest { expected, .. } if expected == image.layers[0]), "{error}");
        assert!(!other.has(&image.layers[0]).unwrap());
    });
}

#[test]
fn of_several_images_one_is_named() {
    in_namespace(|bench| async move {
        let mut made = Made::default();
        let images =
            ["amd64", "arm64", "amd64"].map(|name| made.image(name, &[(tar(name, 600), Compression::None)]));
        let other = made.image("amd64", &[(tar("other", 600), Compression::None)]);
        made.tag(&images[0], "v1");
        made.tag(&images[0], "old");
        made.tag(&images[1], "v1");
        made.tag(&other, "v2");
        made.index(&[&images[0], &images[1]], "all");
        // A signature is nobody's image.
        made.tag(&other, &format!("sha256-{}.sig", images[0].manifest.hex()));
        made.write(&bench.path("layout"));
        let (layout, store) = (bench.text("layout"), bench.store());
        let fetched = async |which: &str| fetch(&format!("oci:{layout}{which}"), &store).await;
        let digest = async |which: &str| fetched(which).await.unwrap().manifest_digest;
        // Both are `v1`: for this processor, that one.
        assert_eq!((digest(":v1").await, digest(":v2").await), (images[0].manifest, other.manifest));
        let all = fetched(":all").await.unwrap();
        assert!(all.manifest_digest == images[0].manifest && all.index_digest.is_some());
        let error = fetched("").await.unwrap_err();
        assert!(
            matches!(error, OciError::Ambiguous { .. }) && error.hint().contains("v1, old, v1, v2, all"),
            "{}",
            error.hint()
        );
        let error = fetched(":v3").await.unwrap_err();
        assert!(error.to_string().contains("no image v3") && error.hint().contains("v2"), "{error}");
    });
}

#[test]
fn what_leads_out_of_a_layout_or_blocks_is_not_read() {
    in_namespace(|bench| async move {
        let (_, image) = one(&bench.path("layout"), 1000);
        let (layout, store) = (bench.text("layout"), bench.store());
        let blob = bench.path("layout/blobs/sha256").join(image.layers[0].hex());
        fs::rename(&blob, bench.path("outside")).unwrap();
        symlink(bench.path("outside"), &blob).unwrap();
        let error = fetch(&format!("oci:{layout}"), &store).await.unwrap_err();
        assert!(matches!(error, OciError::Outside { .. }), "{error}");
        fs::remove_file(&blob).unwrap();
        nix::unistd::mkfifo(&blob, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = fetch(&format!("oci:{layout}"), &store).await.unwrap_err();
        assert!(vm_types::report::chain(&error).contains("no regular file"), "{error}");
        fs::remove_file(&blob).unwrap();
        let error = fetch(&format!("oci:{layout}"), &store).await.unwrap_err();
        assert!(
            matches!(&error, OciError::NoPart { name, .. } if name.contains(&image.layers[0].hex())),
            "{error}"
        );
        let error = fetch("oci:/no/such/dir", &store).await.unwrap_err();
        assert!(error.to_string().contains("/no/such/dir"), "{error}");
    });
}

#[test]
fn archives_of_other_tools_are_the_same_image() {
    in_namespace(|bench| async move {
        // Docker knows no layers by zstd.
        let (_, image) = made(&bench, Compression::Gzip);
        let layout = format!("oci:{}:v1", bench.text("layout"));
        let (oci, docker) = (bench.text("oci.tar"), bench.text("docker.tar"));
        skopeo_copy(&layout, &format!("oci-archive:{oci}:v1"), &["--preserve-digests"]);
        skopeo_copy(&layout, &format!("docker-archive:{docker}:team/tool:v1"), &[]);
        let store = bench.store();
        for text in [format!("oci-archive:{oci}"), format!("oci-archive:{oci}:v1"), oci.clone()] {
            assert_eq!(fetch(&text, &store).await.unwrap().manifest_digest, image.manifest, "{text}");
        }
        let mut digests = Vec::new();
        for which in ["", ":v1", ":team/tool:v1", ":docker.io/team/tool:v1"] {
            let pulled = fetch(&format!("docker-archive:{docker}{which}"), &store).await.unwrap();
            let layers: Vec<_> =
                pulled.layers.iter().map(|layer| (layer.digest, layer.diff_id, layer.compression)).collect();
            let expected: Vec<_> =
                image.diff_ids.iter().map(|diff| (*diff, *diff, Compression::None)).collect();
            assert_eq!(layers, expected, "layers of Docker's archives are plain: {which}");
            assert_eq!(pulled.config.labels["team"], "a");
            assert_eq!(pulled.names, ["docker.io/team/tool:v1"]);
            digests.push(pulled.manifest_digest);
        }
        digests.push(fetch(&docker, &store).await.unwrap().manifest_digest);
        digests.dedup();
        assert_eq!(digests.len(), 1, "one image has one digest");
        let error = fetch(&format!("docker-archive:{docker}:other"), &store).await.unwrap_err();
        assert!(
            matches!(error, OciError::NoEntry { .. }) && error.hint().contains("team/tool:v1"),
            "{error}"
        );

        // Somebody has compressed the whole.
        let gzip = bench.path("oci.tar.gz");
        let mut encoder =
            flate2::write::GzEncoder::new(fs::File::create(&gzip).unwrap(), flate2::Compression::fast());
        encoder.write_all(&fs::read(&oci).unwrap()).unwrap();
        encoder.finish().unwrap();
        let zstd = bench.path("docker.tar.zst");
        fs::write(&zstd, zstd::encode_all(&fs::read(&docker).unwrap()[..], 1).unwrap()).unwrap();
        assert_eq!(fetch(gzip.to_str().unwrap(), &store).await.unwrap().manifest_digest, image.manifest);
        assert_eq!(fetch(zstd.to_str().unwrap(), &store).await.unwrap().manifest_digest, digests[0]);
        assert_eq!(fs::read_dir(bench.path("store/ingest")).unwrap().count(), 0, "nothing is left of them");

        // A part of an archive is none.
        let cut = bench.path("cut.tar");
        fs::write(&cut, &fs::read(&docker).unwrap()[..20_000]).unwrap();
        let error = fetch(&format!("docker-archive:{}", cut.display()), &store).await.unwrap_err();
        assert!(matches!(error, OciError::Malformed { .. } | OciError::NoPart { .. }), "{error}");
    });
}

#[test]
fn a_path_is_what_is_there() {
    in_namespace(|bench| async move {
        let identify = async |name: &str| ImageSource::Path(bench.path(name)).identify().await;
        fs::write(bench.path("rootfs.tar"), tar("etc/passwd", 10)).unwrap();
        assert!(matches!(identify("rootfs.tar").await.unwrap(), ImageSource::Tarball { .. }));
        let error = fetch(&bench.text("rootfs.tar"), &bench.store()).await.unwrap_err();
        assert!(matches!(error, OciError::NoImage { .. }) && error.hint().contains("imported"), "{error}");
        fs::write(bench.path("text"), "just text, of more than a block".repeat(40)).unwrap();
        assert!(matches!(identify("text").await, Err(OciError::NoImage { .. })));
        fs::create_dir(bench.path("empty")).unwrap();
        assert!(matches!(identify("empty").await, Err(OciError::NoImage { .. })));
        assert!(matches!(identify("nothing").await, Err(OciError::Read { .. })));
    });
}

#[test]
fn what_is_exported_other_tools_take() {
    in_namespace(|bench| async move {
        let (_, image) = made(&bench, Compression::Zstd);
        let store = bench.store();
        let pulled = fetch(&format!("oci:{}", bench.text("layout")), &store).await.unwrap();
        let path = |name: &str| bench.path(name);
        export(&pulled, &store, Form::Layout, &path("out"), Some("v2")).await.unwrap();
        export(&pulled, &store, Form::LayoutArchive, &path("out.tar"), Some("v2")).await.unwrap();
        export(&pulled, &store, Form::DockerArchive, &path("docker.tar"), Some("team/tool:v2"))
            .await
            .unwrap();
        for from in
            [format!("oci:{}:v2", bench.text("out")), format!("oci-archive:{}:v2", bench.text("out.tar"))]
        {
            let told = run("skopeo", &["inspect", &from]);
            let told: serde_json::Value = serde_json::from_str(&told).unwrap();
            assert_eq!(told["Digest"], image.manifest.to_string(), "{from}");
            // It reads all of it, and checks it.
            skopeo_copy(&from, &format!("dir:{}", bench.text("taken")), &[]);
        }
        let docker = format!("docker-archive:{}:team/tool:v2", bench.text("docker.tar"));
        let told: serde_json::Value = serde_json::from_str(&run("skopeo", &["inspect", &docker])).unwrap();
        let plain: Vec<String> = image.diff_ids.iter().map(Digest::to_string).collect();
        assert_eq!(told["Layers"], serde_json::json!(plain), "{told}");
        skopeo_copy(&docker, &format!("oci:{}:x", bench.text("converted")), &[]);
        run("tar", &["-tf", &bench.text("docker.tar")]);
        let back = fetch(&docker, &store).await.unwrap();
        assert_eq!(
            (back.config_digest, back.names.as_slice()),
            (image.config, &["team/tool:v2".to_owned()][..])
        );

        // Twice the same, and nothing is overwritten.
        export(&pulled, &store, Form::DockerArchive, &path("again.tar"), Some("team/tool:v2")).await.unwrap();
        assert!(fs::read(path("again.tar")).unwrap() == fs::read(path("docker.tar")).unwrap());
        for (form, name) in
            [(Form::Layout, "out"), (Form::LayoutArchive, "out.tar"), (Form::DockerArchive, "docker.tar")]
        {
            let error = export(&pulled, &store, form, &path(name), None).await.unwrap_err();
            assert!(matches!(error, OciError::Exists { .. }), "{error}");
        }
        // What the configuration says of a layer is compared.
        let mut lying = pulled.clone();
        lying.layers[1].diff_id = Digest::of(b"another");
        let error = export(&lying, &store, Form::DockerArchive, &path("lie.tar"), None).await.unwrap_err();
        assert!(matches!(error, OciError::Digest { .. }) && !path("lie.tar").exists(), "{error}");
        let left: Vec<_> = fs::read_dir(path(""))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name.to_string_lossy().starts_with('.'))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    });
}

/// Whoever asks what a large root filesystem is does not unpack it for that.
#[test]
fn of_an_archive_only_what_is_needed_is_read() {
    in_namespace(|bench| async move {
        let packed = |names: &[&str], name: &str| {
            let mut file = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            for name in names {
                let entry = tar(name, 50_000);
                // Without the archive's end.
                file.write_all(&entry[..entry.len() - 1024]).unwrap();
            }
            file.flush().unwrap();
            // Whoever reads on fails.
            let mut bytes = file.finish().unwrap();
            bytes.truncate(bytes.len() - 30_000);
            fs::write(bench.path(name), bytes).unwrap();
            ImageSource::Path(bench.path(name)).identify()
        };
        let rootfs = ["./bin/sh", "./etc/passwd", "./manifest.json", "./usr/lib/large"];
        assert!(matches!(packed(&rootfs, "rootfs.tar.gz").await.unwrap(), ImageSource::Tarball { .. }));
        let layout = ["blobs/sha256/00", "index.json", "oci-layout", "blobs/sha256/01"];
        assert!(matches!(packed(&layout, "layout.tar.gz").await.unwrap(), ImageSource::LayoutArchive { .. }));
        // Docker's format is told by its list, which may be the last entry.
        let hex = "0".repeat(64);
        let docker = [&*format!("{hex}/layer.tar"), "manifest.json", &*format!("sha256:{hex}"), "b.tar.gz"];
        let docker = docker.map(|name| tar(name, 10));
        let whole: Vec<u8> = docker.iter().flat_map(|entry| &entry[..1024]).copied().collect();
        fs::write(bench.path("docker.tar"), [whole, vec![0; 1024]].concat()).unwrap();
        let docker = ImageSource::Path(bench.path("docker.tar")).identify();
        assert!(matches!(docker.await.unwrap(), ImageSource::DockerArchive { .. }));
    });
}

#[test]
fn of_a_cancelled_export_nothing_is_left() {
    in_namespace(|bench| async move {
        made(&bench, Compression::Zstd);
        let store = bench.store();
        let pulled = fetch(&format!("oci:{}", bench.text("layout")), &store).await.unwrap();
        // A layer that comes when we say so.
        let slow = store.path(&pulled.layers[1].digest);
        fs::remove_file(&slow).unwrap();
        nix::unistd::mkfifo(&slow, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for form in [Form::Layout, Form::LayoutArchive, Form::DockerArchive] {
            let (dir, file) = (bench.path("to"), bench.path("to/out"));
            fs::create_dir_all(&dir).unwrap();
            let export = tokio::spawn({
                let (pulled, store, file) = (pulled.clone(), store.clone(), file.clone());
                async move { export(&pulled, &store, form, &file, None).await }
            });
            // Opening it waits for the one who reads, and the other way round.
            let come = slow.clone();
            let writer = tokio::task::spawn_blocking(move || fs::File::create(come)).await.unwrap().unwrap();
            export.abort();
            assert!(export.await.unwrap_err().is_cancelled());
            drop(writer);
            until("it is cleaned up", || fs::read_dir(&dir).unwrap().next().is_none()).await;
        }
    });
}

/// Archives below a directory that this process has open, files without a name, too, and how far each is read or written.
fn open_below(dir: &Path) -> BTreeMap<String, u64> {
    let mut open = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let Ok(file) = fs::read_link(entry.path()) else { continue };
        let number = entry.file_name().into_string().unwrap();
        if let Ok(about) = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))
            && file.starts_with(dir)
            && [".gz", " (deleted)"].iter().any(|end| file.display().to_string().ends_with(end))
        {
            let at = about.lines().find_map(|line| line.strip_prefix("pos:")).unwrap();
            open.insert(file.display().to_string(), at.trim().parse().unwrap());
        }
    }
    open
}

#[test]
fn unpacking_a_whole_archive_ends_once_nobody_waits_and_leaves_nothing() {
    /// Bytes of zeros in one member of the compressed file, and how often that stands there: seconds of work.
    const PIECE: u64 = 8 << 20;
    const PIECES: u64 = 512;
    in_namespace(|bench| async move {
        let packed = |bytes: &[u8]| {
            let mut file = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            file.write_all(bytes).unwrap();
            file.finish().unwrap()
        };
        let mut header = ::tar::Header::new_gnu();
        header.set_path("layer.tar").unwrap();
        header.set_mode(0o644);
        header.set_size(PIECE * PIECES);
        header.set_cksum();
        let mut file = packed(header.as_bytes());
        file.extend(packed(&vec![0; PIECE as usize]).repeat(PIECES as usize));
        let archive = bench.path("image.tar.gz");
        fs::write(&archive, &file).unwrap();
        let (whole, archive) = (file.len() as u64, archive.display().to_string());
        let store = bench.store();
        let dir = bench.path("");
        let before: Vec<_> = snapshot(&dir).into_keys().collect();
        // Told what it is, it is unpacked to the disk; otherwise it is read first to find that out.
        for text in [format!("docker-archive:{archive}"), archive.clone()] {
            let fetching = tokio::spawn({
                let (text, store) = (text.clone(), store.clone());
                async move { fetch(&text, &store).await.map(drop) }
            });
            until("it is under way", || {
                let open = open_below(&dir);
                let unpacks = open.iter().any(|(name, at)| name.ends_with(" (deleted)") && *at > PIECE);
                let reads = open.get(&archive).is_some_and(|at| *at > 0);
                reads && (unpacks || text == archive)
            })
            .await;
            fetching.abort();
            assert!(fetching.await.unwrap_err().is_cancelled());
            let mut read = 0;
            until("it has ended", || {
                let open = open_below(&dir);
                read = open.get(&archive).copied().unwrap_or(read);
                open.is_empty()
            })
            .await;
            assert!(read < whole, "{text}: it went on to its end");
            assert_eq!(snapshot(&dir).into_keys().collect::<Vec<_>>(), before);
        }
    });
}
