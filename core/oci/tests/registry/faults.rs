//! What networks and registries do, and what becomes of a pull then.

use std::{env, fs, process::Command, time::Duration};

use nix::sys::signal::Signal;
use vm_oci::{Client, Compression, Digest, OciError, Settings, Store, silent};

use crate::{
    bench::{AT, Bench, Registry, at, client, in_namespace, settings, skopeo_copy, until},
    made::{Image, Made, one, tar},
    proxy::{Fault, Proxy},
};

/// Of the layer that things happen to.
const SIZE: usize = 2 << 20;

async fn filled(bench: &Bench) -> (Registry, Proxy, Made, Image) {
    let registry = bench.registry().await;
    let (made, image) = one(&bench.path("layout"), SIZE);
    skopeo_copy(
        &format!("oci:{}:v1", bench.text("layout")),
        &format!("docker://{AT}/tool:v1"),
        &["--preserve-digests"],
    );
    (registry, Proxy::start().await, made, image)
}

#[test]
fn what_breaks_off_goes_on_where_it_was() {
    in_namespace(|bench| async move {
        let (_registry, proxy, made, image) = filled(&bench).await;
        let layer = image.layers[0].to_string();
        proxy.on(&layer, 1, Fault::Reset(SIZE / 4));
        proxy.on(&layer, 1, Fault::Truncate(SIZE / 4));
        let store = bench.store();
        client().pull(&at(proxy.address, "tool:v1"), &store, &silent()).await.unwrap();
        let asked = proxy.asked(&layer);
        assert!(asked.len() == 3 && asked[0].range.is_none(), "{asked:?}");
        // A reset may take with it what was on its way.
        let begins =
            asked[2].range.as_deref().unwrap().strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap();
        assert!(begins.parse::<usize>().unwrap() >= SIZE / 4, "{begins}");
        let size = made.size(&image.layers[0]);
        assert!(proxy.bytes(&layer) < size * 2, "{} of {size}", proxy.bytes(&layer));
        assert_eq!(Digest::of(&fs::read(store.path(&image.layers[0])).unwrap()), image.layers[0]);
    });
}

#[test]
fn a_registry_that_falls_silent_is_asked_again() {
    in_namespace(|bench| async move {
        let (_registry, proxy, made, image) = filled(&bench).await;
        let layer = image.layers[0].to_string();
        proxy.on(&layer, 1, Fault::Stall(SIZE / 2));
        proxy.on("/manifests/", 1, Fault::Stall(10));
        let stall_timeout = Duration::from_secs(1);
        let client = Client::new(Settings { stall_timeout, attempts: 50, ..settings() }).unwrap();
        client.pull(&at(proxy.address, "tool:v1"), &bench.store(), &silent()).await.unwrap();
        assert!(proxy.asked(&layer)[1].range.is_some());
        assert!(proxy.bytes(&layer) < made.size(&image.layers[0]) * 2);
        // One that is never anything else is given up, and named.
        proxy.on("/manifests/", 1000, Fault::Stall(10));
        let client =
            Client::new(Settings { stall_timeout: Duration::from_millis(200), attempts: 2, ..settings() })
                .unwrap();
        let error = client.pull(&at(proxy.address, "tool:v1"), &bench.store(), &silent()).await.unwrap_err();
        assert!(matches!(error, OciError::Stalled { .. }), "{error}");
        assert!(
            error.to_string().contains("tool:v1") && error.hint().contains("not fetched twice"),
            "{error}"
        );
    });
}

#[test]
fn what_is_not_what_it_should_be_is_refused() {
    in_namespace(|bench| async move {
        let (_registry, proxy, _made, image) = filled(&bench).await;
        let (store, client) = (bench.store(), client());
        let layer = image.layers[0];
        let pull = async || client.pull(&at(proxy.address, "tool:v1"), &store, &silent()).await;
        proxy.on(&image.config.to_string(), 1, Fault::Corrupt);
        assert!(matches!(pull().await, Err(OciError::Digest { expected, .. }) if expected == image.config));
        proxy.on(&layer.to_string(), 1, Fault::Corrupt);
        let error = pull().await.unwrap_err();
        assert!(matches!(error, OciError::Digest { expected, .. } if expected == layer), "{error}");
        assert!(!store.has(&layer).unwrap() && store.usage().unwrap().partials == 0);
        proxy.on("/manifests/", 1, Fault::Corrupt);
        let pinned = at(proxy.address, &format!("tool@{}", image.manifest));
        let error = client.pull(&pinned, &store, &silent()).await.unwrap_err();
        assert!(matches!(error, OciError::Digest { expected, .. } if expected == image.manifest), "{error}");
        for body in ["", "<html>a captive portal</html>", "[]"] {
            proxy.on("/manifests/", 1, Fault::Answer("200 OK", String::new(), body));
            assert!(matches!(pull().await, Err(OciError::Malformed { .. })), "{body}");
        }
        // Of another size than it should be: nobody downloads all of it to see that.
        proxy.on(&layer.to_string(), 1, Fault::Answer("200 OK", String::new(), "short"));
        assert!(matches!(pull().await, Err(OciError::Size { found: 5, .. })));
        pull().await.unwrap();
    });
}

#[test]
fn a_damaged_rest_of_an_earlier_try_costs_another_download_and_no_more() {
    in_namespace(|bench| async move {
        let (_registry, proxy, _made, image) = filled(&bench).await;
        let store = bench.store();
        let layer = image.layers[0];
        fs::write(bench.path("store/ingest").join(layer.hex()), vec![0; SIZE / 2]).unwrap();
        client().pull(&at(proxy.address, "tool:v1"), &store, &silent()).await.unwrap();
        let asked = proxy.asked(&layer.to_string());
        assert!(asked.len() == 2 && asked[0].range.is_some() && asked[1].range.is_none(), "{asked:?}");
        // A registry that knows no ranges gives all of it.
        store.remove(&layer).unwrap();
        drop(store);
        let store = bench.store();
        fs::write(bench.path("store/ingest").join(layer.hex()), tar("data", SIZE).split_at(1000).0).unwrap();
        proxy.on(&layer.to_string(), 1, Fault::Answer("416 No Range", String::new(), ""));
        client().pull(&at(proxy.address, "tool:v1"), &store, &silent()).await.unwrap();
    });
}

#[test]
fn a_busy_registry_is_asked_when_it_says() {
    in_namespace(|bench| async move {
        let (_registry, proxy, _made, image) = filled(&bench).await;
        let (store, client) = (bench.store(), client());
        let pull = async || client.pull(&at(proxy.address, "tool:v1"), &store, &silent()).await;
        proxy.on("/manifests/", 1, Fault::Answer("500 Oops", String::new(), ""));
        proxy.on("/manifests/", 1, Fault::Answer("503 Busy", String::new(), ""));
        proxy.on("/manifests/", 1, Fault::Answer("429 Slow", "Retry-After: 1\r\n".into(), ""));
        proxy.on(&image.config.to_string(), 1, Fault::Answer("429 Slow", String::new(), ""));
        proxy.on(&image.layers[0].to_string(), 2, Fault::Answer("502 Gateway", String::new(), ""));
        let begun = std::time::Instant::now();
        pull().await.unwrap();
        assert_eq!(proxy.asked("/manifests/").len(), 4);
        assert!(begun.elapsed() >= Duration::from_secs(1), "it has asked for a second");
        // For longer than anybody waits.
        proxy.on("/manifests/", 1, Fault::Answer("429 Slow", "Retry-After: 7200\r\n".into(), ""));
        let error = pull().await.unwrap_err();
        assert!(error.to_string().contains("for 7200 s"), "{error}");
        proxy.forget();
        let body = r#"{"errors":[{"code":"UNKNOWN","message":"the disk is full"}]}"#;
        proxy.on("/manifests/", 1000, Fault::Answer("500 Oops", String::new(), body));
        let error = pull().await.unwrap_err();
        assert!(
            error.to_string().contains("status 500") && error.to_string().contains("the disk is full"),
            "{error}"
        );
        assert_eq!(proxy.asked("/manifests/").len(), 6, "as often as the settings say");
    });
}

#[test]
fn a_cancelled_pull_leaves_a_rest_that_the_next_takes_up() {
    in_namespace(|bench| async move {
        let (_registry, proxy, made, image) = filled(&bench).await;
        let (store, client) = (bench.store(), client());
        let layer = image.layers[0];
        let partial = bench.path("store/ingest").join(layer.hex());
        proxy.on(&layer.to_string(), 1, Fault::Stall(SIZE / 2));
        let (reference, sink) = (at(proxy.address, "tool:v1"), silent());
        {
            let pull = client.pull(&reference, &store, &sink);
            let there = until("half of it is there", || {
                fs::metadata(&partial).is_ok_and(|about| about.len() >= SIZE as u64 / 2)
            });
            tokio::select! {
                pulled = pull => panic!("it cannot end: {pulled:?}"),
                () = there => {}
            }
        }
        client.pull(&reference, &store, &sink).await.unwrap();
        assert!(proxy.asked(&layer.to_string())[1].range.is_some());
        assert!(proxy.bytes(&layer.to_string()) < made.size(&layer) + SIZE as u64 / 2);
    });
}

/// Where the process that is killed finds its store and its registry.
const KILLED: &str = "VM_OCI_TEST_KILLED";

#[test]
#[ignore = "the part of the next test that is killed"]
fn the_one_that_is_killed() {
    let Ok(place) = env::var(KILLED) else { return };
    let (address, dir) = place.split_once(' ').unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(dir.as_ref()).unwrap();
        let pulled = client().pull(&at(address, "tool:v1"), &store, &silent()).await;
        panic!("it cannot end: {pulled:?}");
    });
}

#[test]
fn what_a_killed_process_left_is_taken_up() {
    in_namespace(|bench| async move {
        let (_registry, proxy, made, image) = filled(&bench).await;
        let layer = image.layers[0];
        proxy.on(&layer.to_string(), 1, Fault::Stall(SIZE / 2));
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "faults::the_one_that_is_killed", "--ignored", "--nocapture"])
            .env(KILLED, format!("{} {}", proxy.address, bench.text("store")))
            .spawn()
            .unwrap();
        let partial = bench.path("store/ingest").join(layer.hex());
        let half = SIZE as u64 / 2;
        until("half of it is there", || fs::metadata(&partial).is_ok_and(|about| about.len() >= half)).await;
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
        child.wait().unwrap();

        let store = bench.store();
        assert!(!store.has(&layer).unwrap());
        assert_eq!(store.usage().unwrap().partials, half);
        client().pull(&at(proxy.address, "tool:v1"), &store, &silent()).await.unwrap();
        let asked = proxy.asked(&layer.to_string());
        assert_eq!(asked[1].range, Some(format!("bytes={half}-")));
        assert_eq!(proxy.bytes(&layer.to_string()), made.size(&layer), "no byte came twice");
    });
}

#[test]
fn layers_come_some_at_a_time() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let mut made = Made::default();
        let names = ["a", "b", "c", "d", "e"];
        let image = made.image("amd64", &names.map(|name| (tar(name, 20_000), Compression::None)));
        made.tag(&image, "v1");
        made.write(&bench.path("layout"));
        skopeo_copy(
            &format!("oci:{}:v1", bench.text("layout")),
            &format!("docker://{AT}/tool:v1"),
            &["--preserve-digests"],
        );
        let proxy = Proxy::start().await;
        for layer in &image.layers {
            proxy.on(&layer.to_string(), 1, Fault::Stall(100));
        }
        let client = Client::new(Settings { parallel: 2, ..settings() }).unwrap();
        let (reference, store, sink) = (at(proxy.address, "tool:v1"), bench.store(), silent());
        let stalled = || image.layers.iter().filter(|layer| proxy.bytes(&layer.to_string()) == 100).count();
        tokio::select! {
            pulled = client.pull(&reference, &store, &sink) => panic!("it cannot end: {pulled:?}"),
            () = until("two have begun", || stalled() == 2) => {}
        }
        assert_eq!(proxy.asked("/blobs/").len(), 3, "the config and two layers");
    });
}
