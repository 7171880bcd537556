//! Files by their addresses, and artifacts that are no images.

use std::{
    fs,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use vm_oci::{ArtifactKind, Compression, Digest, ImageSource, OciError, Progress, silent};

use crate::{
    bench::{AT, Bench, Registry, at, client, in_namespace, skopeo_copy, until},
    made::{Made, one, tar},
    proxy::{Fault, Proxy},
};

const SIZE: usize = 2 << 20;

/// A registry serves its blobs as files; the address of one of 2 MiB, and its digest.
async fn served(bench: &Bench) -> (Registry, Proxy, String, Digest) {
    let registry = bench.registry().await;
    let (_, image) = one(&bench.path("layout"), SIZE);
    skopeo_copy(
        &format!("oci:{}:v1", bench.text("layout")),
        &format!("docker://{AT}/tool:v1"),
        &["--preserve-digests"],
    );
    let proxy = Proxy::start().await;
    let digest = image.layers[0];
    let address = format!("http://{}/v2/tool/blobs/{digest}", proxy.address);
    (registry, proxy, address, digest)
}

#[test]
fn a_file_is_downloaded_in_pieces_and_verified() {
    in_namespace(|bench| async move {
        let (_registry, proxy, address, digest) = served(&bench).await;
        let (store, client) = (bench.store(), client());
        let address = client.address(&address).unwrap();
        proxy.on("/blobs/", 1, Fault::Reset(SIZE / 4));
        proxy.on("/blobs/", 1, Fault::Truncate(SIZE / 4));
        let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
        let keep = seen.clone();
        let sink: vm_oci::ProgressSink = Arc::new(move |progress| keep.lock().unwrap().push(progress));
        let file = client.download(&address, digest, &store, &sink).await.unwrap();
        assert_eq!(Digest::of(&fs::read(&file.path).unwrap()), digest);
        assert_eq!(file.size, fs::metadata(&file.path).unwrap().len());
        assert!(proxy.asked("/blobs/")[2].range.is_some());
        assert!(proxy.bytes("/blobs/") < file.size * 2);
        let told = seen.lock().unwrap();
        assert_eq!(told[0], Progress::Begun { blobs: 1, bytes: file.size });
        assert_eq!(told.last(), Some(&Progress::Done { digest, size: file.size, present: false }));
        // It stays as long as somebody has it, and belongs to nothing.
        assert!(matches!(store.remove(&digest), Err(OciError::InUse { .. })));
        drop(file);
        assert!(store.remove(&digest).unwrap());
    });
}

#[test]
fn a_cancelled_download_leaves_a_rest_that_the_next_takes_up() {
    in_namespace(|bench| async move {
        let (_registry, proxy, address, digest) = served(&bench).await;
        let (store, client) = (bench.store(), client());
        let address = client.address(&address).unwrap();
        proxy.on("/blobs/", 1, Fault::Stall(SIZE / 2));
        let partial = bench.path("store/ingest").join(digest.hex());
        {
            let sink = silent();
            let download = client.download(&address, digest, &store, &sink);
            let there = until("half of it is there", || {
                fs::metadata(&partial).is_ok_and(|about| about.len() >= SIZE as u64 / 2)
            });
            tokio::select! {
                done = download => panic!("it cannot end: {done:?}"),
                () = there => {}
            }
        }
        let file = client.download(&address, digest, &store, &silent()).await.unwrap();
        assert!(proxy.asked("/blobs/")[1].range.is_some());
        assert!(proxy.bytes("/blobs/") < file.size + SIZE as u64 / 2);
    });
}

#[test]
fn what_is_another_file_is_refused_and_not_kept() {
    in_namespace(|bench| async move {
        let (_registry, proxy, address, digest) = served(&bench).await;
        let (store, client) = (bench.store(), client());
        let address = client.address(&address).unwrap();
        let other = Digest::of(b"another");
        let error = client.download(&address, other, &store, &silent()).await.unwrap_err();
        assert!(
            matches!(&error, OciError::Digest { found, expected, .. } if (*found, *expected) == (digest, other)),
            "{error}"
        );
        let kept = |dir: &str| fs::read_dir(bench.path("store").join(dir)).unwrap().count();
        assert_eq!((kept("blobs/sha256"), kept("ingest")), (0, 0));
        let missing = client.address(&format!("http://{}/v2/tool/blobs/{other}", proxy.address)).unwrap();
        let error = client.download(&missing, other, &store, &silent()).await.unwrap_err();
        assert!(error.hint().contains("address"), "{error}: {}", error.hint());
        assert!(client.document(&address, 1000).await.is_err_and(|error| error.to_string().contains("1000")));
        assert_eq!(Digest::of(&client.document(&address, 4 << 20).await.unwrap()), digest);
    });
}

/// A server that does not say how much there is, and breaks off once.
#[test]
fn a_file_of_unknown_size_is_whole_when_its_digest_says_so() {
    in_namespace(|bench| async move {
        let content = vec![7_u8; 200_000];
        let digest = Digest::of(&content);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}/file", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let mut whole = false;
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut piece = vec![0; 4096];
                let _ = stream.read(&mut piece).await;
                let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                let cut = if whole { content.len() } else { 50_000 };
                let mut answer = format!("{head}{cut:x}\r\n").into_bytes();
                answer.extend(&content[..cut]);
                answer.extend(if whole { &b"\r\n0\r\n\r\n"[..] } else { b"" });
                let _ = stream.write_all(&answer).await;
                whole = true;
            }
        });
        let (store, client) = (bench.store(), client());
        let address = client.address(&address).unwrap();
        let file = client.download(&address, digest, &store, &silent()).await.unwrap();
        assert_eq!((file.size, Digest::of(&fs::read(&file.path).unwrap())), (200_000, digest));
    });
}

const TYPE: &str = "application/vnd.vm.test.v1";
const ONE: &str = "application/vnd.vm.test.one.v1";
const TWO: &str = "application/vnd.vm.test.two.v1";
const KIND: ArtifactKind =
    ArtifactKind { name: "test", media_type: TYPE, layers: &[(ONE, 1000), (TWO, 1000)] };

#[test]
fn an_artifact_is_what_its_type_says_from_registries_and_layouts() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let mut made = Made::default();
        made.artifact(TYPE, &[(ONE, b"one"), (TWO, b"two")], "good");
        made.artifact("application/vnd.other.v1", &[(ONE, b"one")], "other");
        made.artifact(TYPE, &[("text/html", b"one")], "layer");
        made.artifact(TYPE, &[(ONE, &[1; 1001])], "large");
        made.artifact(TYPE, &[(ONE, b"1"), (ONE, b"2")], "twice");
        let image = made.image("amd64", &[(tar("data", 10), Compression::None)]);
        made.tag(&image, "image");
        made.write(&bench.path("layout"));
        let tags = ["good", "other", "layer", "large", "twice", "image"];
        for tag in tags {
            let from = format!("oci:{}:{tag}", bench.text("layout"));
            skopeo_copy(&from, &format!("docker://{AT}/tool:{tag}"), &["--preserve-digests"]);
        }
        let store = bench.store();
        let of_registry = |tag: &str| ImageSource::Registry(at(AT, &format!("tool:{tag}")));
        let of_layout = |tag: &str| {
            ImageSource::parse(&format!("oci:{}:{tag}", bench.text("layout")), &Default::default()).unwrap()
        };
        for source in [&of_registry as &dyn Fn(&str) -> ImageSource, &of_layout] {
            let get = async |tag: &str| client().artifact(&source(tag), KIND, &store, &silent()).await;
            let good = get("good").await.unwrap();
            let read = |media_type| good.layer(&[media_type]).unwrap().map(|path| fs::read(path).unwrap());
            assert_eq!((read(ONE), read(TWO)), (Some(b"one".to_vec()), Some(b"two".to_vec())));
            assert_eq!(read("another"), None);
            let error = get("other").await.unwrap_err();
            assert!(error.to_string().contains("is no test but application/vnd.other.v1"), "{error}");
            assert!(error.hint().contains(TYPE));
            let error = get("layer").await.unwrap_err();
            assert!(matches!(&error, OciError::MediaType { found, .. } if found == "text/html"), "{error}");
            assert!(matches!(get("large").await, Err(OciError::Large { bytes: 1001, .. })));
            assert!(get("twice").await.unwrap().layer(&[ONE]).is_err());
            assert!(matches!(get("image").await, Err(OciError::ArtifactType { .. })));
            drop(good);
            store.collect(&Default::default(), std::time::Duration::ZERO).unwrap();
            assert!(store.list().unwrap().is_empty());
        }
    });
}
