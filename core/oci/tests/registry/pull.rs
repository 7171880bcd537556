//! Images that a registry has, and what is fetched of them.

use std::sync::{Arc, Mutex};

use vm_oci::{
    Client, Compression, Digest, ImageSource, OciError, Platform, Progress, Pulled, ReferenceDefaults,
    Settings, silent,
};

use crate::{
    bench::{AT, Bench, LONG, at, client, in_namespace, run, settings, skopeo_copy},
    made::{Made, tar},
    proxy::Proxy,
};

fn three_layers() -> (Made, crate::made::Image) {
    let mut made = Made::default();
    let layers = [
        (tar("plain", 300_000), Compression::None),
        (tar("gzip", 200_000), Compression::Gzip),
        (tar("zstd", 100_000), Compression::Zstd),
    ];
    let image = made.image("amd64", &layers);
    made.tag(&image, "v1");
    (made, image)
}

fn fill(bench: &Bench, made: &Made, tag: &str, name: &str) {
    made.write(&bench.path("layout"));
    skopeo_copy(
        &format!("oci:{}:{tag}", bench.text("layout")),
        &format!("docker://{AT}/{name}"),
        &["--all", "--preserve-digests"],
    );
}

#[test]
fn an_image_is_pulled_whole_and_verified() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let (made, image) = three_layers();
        fill(&bench, &made, "v1", "team/tool:v1");
        let store = bench.store();
        let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
        let keep = seen.clone();
        let sink: vm_oci::ProgressSink = Arc::new(move |progress| keep.lock().unwrap().push(progress));
        let source =
            ImageSource::parse(&format!("{AT}/team/tool:v1"), &ReferenceDefaults::default()).unwrap();
        let pulled = client().fetch(&source, &store, &sink).await.unwrap();
        assert_eq!(
            (pulled.manifest_digest, pulled.config_digest, pulled.index_digest),
            (image.manifest, image.config, None)
        );
        let layers: Vec<_> = pulled
            .layers
            .iter()
            .map(|layer| (layer.digest, layer.diff_id, layer.compression, layer.size))
            .collect();
        let kinds = [Compression::None, Compression::Gzip, Compression::Zstd];
        let expected: Vec<_> = (0..3)
            .map(|n| (image.layers[n], image.diff_ids[n], kinds[n], made.size(&image.layers[n])))
            .collect();
        assert_eq!(layers, expected);
        let config = &pulled.config;
        assert_eq!(
            (config.command(), config.env.len(), config.user.as_str()),
            (vec!["/run".into(), "-v".into()], 2, "1000")
        );
        assert_eq!(
            (config.exposed_ports.as_slice(), config.labels["team"].as_str()),
            (&["80/tcp".to_owned()][..], "a")
        );
        for digest in pulled.digests() {
            assert_eq!(Digest::of(&std::fs::read(store.path(digest)).unwrap()), *digest);
        }
        assert_eq!(pulled.size(), store.usage().unwrap().blobs);
        assert_eq!(pulled.names, [format!("{AT}/team/tool:v1")]);

        let seen = seen.lock().unwrap();
        let blobs: u64 = image.layers.iter().chain([&image.config]).map(|digest| made.size(digest)).sum();
        assert_eq!(seen[0], Progress::Begun { blobs: 4, bytes: blobs });
        let done: u64 = seen
            .iter()
            .map(|progress| match progress {
                Progress::Done { size, present: false, .. } => *size,
                _ => 0,
            })
            .sum();
        assert_eq!(done, blobs);
        // It is there without the registry, too; and no longer when one of its blobs is gone.
        let opened = Pulled::open(&store, &image.manifest).unwrap();
        assert_eq!((&opened.layers, &opened.config), (&pulled.layers, &pulled.config));
        drop((opened, pulled));
        store.remove(&image.layers[1]).unwrap();
        assert!(
            matches!(Pulled::open(&store, &image.manifest), Err(OciError::Gone { digest, .. }) if digest == image.layers[1])
        );
    });
}

#[test]
fn by_its_digest_an_image_is_that_one_or_none() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let (made, image) = three_layers();
        fill(&bench, &made, "v1", "tool:v1");
        let store = bench.store();
        let pull = async |rest: &str| client().pull(&at(AT, rest), &store, &silent()).await;
        let pulled = pull(&format!("tool@{}", image.manifest)).await.unwrap();
        assert_eq!(pulled.manifest_digest, image.manifest);
        // The digest decides, whatever the tag is.
        assert_eq!(
            pull(&format!("tool:other@{}", image.manifest)).await.unwrap().config_digest,
            image.config
        );
        let error = pull(&format!("tool@{}", Digest::of(b"another"))).await.unwrap_err();
        assert!(matches!(error, OciError::NotFound { .. }), "{error}");
        let error = pull("tool:v2").await.unwrap_err();
        assert_eq!(error.to_string(), format!("{AT} has no tool:v2"));
        assert!(matches!(pull("other").await, Err(OciError::NotFound { .. })));
    });
}

#[test]
fn of_a_sibling_only_its_own_layers_are_fetched() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let mut made = Made::default();
        let base = (tar("base", 400_000), Compression::Gzip);
        let one = made.image("amd64", &[base.clone(), (tar("one", 1000), Compression::Gzip)]);
        let two = made.image("amd64", &[base.clone(), (tar("two", 1000), Compression::Gzip), base]);
        made.tag(&one, "one");
        made.tag(&two, "two");
        fill(&bench, &made, "one", "tool:one");
        fill(&bench, &made, "two", "tool:two");
        let (proxy, store, client) = (Proxy::start().await, bench.store(), client());
        let first = client.pull(&at(proxy.address, "tool:one"), &store, &silent()).await.unwrap();
        assert_eq!(proxy.asked("/blobs/").len(), 3);
        proxy.forget();
        let second = client.pull(&at(proxy.address, "tool:two"), &store, &silent()).await.unwrap();
        let asked = proxy.asked("/blobs/");
        assert_eq!(asked.len(), 2, "config and its own layer: {asked:?}");
        assert!(proxy.asked(&two.layers[0].to_string()).is_empty());
        assert_eq!(second.layers.len(), 3, "one blob may be two layers");
        proxy.forget();
        client.pull(&at(proxy.address, "tool:two"), &store, &silent()).await.unwrap();
        assert!(proxy.asked("/blobs/").is_empty(), "nothing is fetched twice");

        // What both have stays when one goes.
        let live = second.digests().iter().copied().collect();
        drop((first, second));
        let collected = store.collect(&live, std::time::Duration::ZERO).unwrap();
        assert_eq!(collected.blobs, 3, "manifest, config and layer of the first");
        assert!(Pulled::open(&store, &two.manifest).is_ok() && Pulled::open(&store, &one.manifest).is_err());
    });
}

#[test]
fn of_an_index_the_image_for_the_host_is_taken() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let mut made = Made::default();
        let intel = made.image("amd64", &[(tar("intel", 1000), Compression::Gzip)]);
        let arm = made.image("arm64", &[(tar("arm", 1000), Compression::Gzip)]);
        let index = made.index(&[&intel, &arm], "all");
        made.tag(&arm, "arm");
        fill(&bench, &made, "all", "tool:all");
        fill(&bench, &made, "arm", "tool:arm");
        let store = bench.store();
        let pulled = client().pull(&at(AT, "tool:all"), &store, &silent()).await.unwrap();
        assert_eq!((pulled.manifest_digest, pulled.index_digest), (intel.manifest, Some(index)));
        assert!(!store.has(&arm.layers[0]).unwrap(), "nothing of the others is fetched");
        let platform =
            |architecture: &str| Platform { architecture: architecture.to_owned(), ..crate::bench::amd64() };
        let other = |architecture: &str| {
            Client::new(Settings { platform: platform(architecture), ..settings() }).unwrap()
        };
        let pulled = other("arm64").pull(&at(AT, &format!("tool@{index}")), &store, &silent()).await.unwrap();
        assert_eq!(pulled.manifest_digest, arm.manifest);
        let error = other("riscv64").pull(&at(AT, "tool:all"), &store, &silent()).await.unwrap_err();
        assert_eq!(
            (error.to_string().as_str(), error.hint().as_str()),
            ("there is no image for linux/riscv64", "there is: linux/amd64, linux/arm64")
        );
        // One without an index says what it is in its configuration.
        let error = client().pull(&at(AT, "tool:arm"), &store, &silent()).await.unwrap_err();
        assert!(matches!(&error, OciError::Platform { there, .. } if there == &["linux/arm64"]), "{error}");
    });
}

#[test]
fn images_of_dockers_own_form_are_images_too() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let mut made = Made::default();
        let image =
            made.image("amd64", &[(tar("a", 50_000), Compression::Gzip), (tar("b", 100), Compression::Gzip)]);
        made.tag(&image, "v1");
        made.write(&bench.path("layout"));
        skopeo_copy(
            &format!("oci:{}:v1", bench.text("layout")),
            &format!("docker://{AT}/tool:v1"),
            &["--format", "v2s2"],
        );
        let store = bench.store();
        let pulled = client().pull(&at(AT, "tool:v1"), &store, &silent()).await.unwrap();
        assert_ne!(pulled.manifest_digest, image.manifest);
        assert!(pulled.layers[0].media_type.contains("docker"), "{}", pulled.layers[0].media_type);
        assert_eq!(pulled.layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>(), image.diff_ids);
        assert_eq!(pulled.config.user, "1000");
    });
}

#[test]
fn an_image_that_umoci_made_is_pulled_as_skopeo_tells_it() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let (layout, file) = (bench.text("umoci"), bench.text("file"));
        std::fs::write(&file, "content").unwrap();
        run("umoci", &["init", "--layout", &layout]);
        run("umoci", &["new", "--image", &format!("{layout}:v1")]);
        run("umoci", &["insert", "--image", &format!("{layout}:v1"), &file, "/etc/file"]);
        run(
            "umoci",
            &[
                "config",
                "--image",
                &format!("{layout}:v1"),
                "--config.env",
                "A=b",
                "--config.cmd",
                "/bin/true",
            ],
        );
        skopeo_copy(&format!("oci:{layout}:v1"), &format!("docker://{AT}/umoci:v1"), &[]);
        let told = run("skopeo", &["inspect", "--tls-verify=false", &format!("docker://{AT}/umoci:v1")]);
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let architecture = told["Architecture"].as_str().unwrap().to_owned();
        let platform = Platform { architecture, ..crate::bench::amd64() };
        let client = Client::new(Settings { platform, ..settings() }).unwrap();
        let pulled = client.pull(&at(AT, "umoci:v1"), &bench.store(), &silent()).await.unwrap();
        assert_eq!(told["Digest"], pulled.manifest_digest.to_string());
        let layers: Vec<String> = pulled.layers.iter().map(|layer| layer.digest.to_string()).collect();
        assert_eq!(told["Layers"], serde_json::json!(layers));
        assert!(pulled.config.env.contains(&"A=b".to_owned()));
        assert_eq!(pulled.config.cmd, ["/bin/true"]);
    });
}

#[test]
fn mirrors_are_asked_first_and_passed_over_where_they_fail() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let (made, image) = three_layers();
        fill(&bench, &made, "v1", "mirrored/tool:v1");
        fill(&bench, &made, "v1", "tool:v1");
        let (good, bad, origin) = (Proxy::start().await, Proxy::start().await, Proxy::start().await);
        bad.on("/manifests/", 100, crate::proxy::Fault::Answer("503 Busy", String::new(), ""));
        let registry = origin.address.to_string();
        let mirrors = |places: Vec<String>| {
            Client::new(Settings { mirrors: [(registry.clone(), places)].into(), ..settings() }).unwrap()
        };
        let store = bench.store();
        // Nothing listens at the first port.
        let with_path = format!("{}/mirrored", good.address);
        let places = vec!["127.0.0.1:1".to_owned(), bad.address.to_string(), with_path.clone()];
        let pulled = mirrors(places).pull(&at(&registry, "tool:v1"), &store, &silent()).await.unwrap();
        assert_eq!(pulled.manifest_digest, image.manifest);
        assert!(origin.asked("").is_empty() && !bad.asked("").is_empty());
        assert!(good.asked("GET /v2/mirrored/tool/manifests/v1").len() == 1);
        // One that lacks a layer is helped out by the registry.
        let live = std::collections::HashSet::new();
        drop(pulled);
        store.collect(&live, std::time::Duration::ZERO).unwrap();
        let layer = image.layers[1].to_string();
        good.on(&layer, 100, crate::proxy::Fault::Answer("404 None", String::new(), ""));
        mirrors(vec![with_path]).pull(&at(&registry, "tool:v1"), &store, &silent()).await.unwrap();
        assert_eq!(
            origin.asked("").iter().map(|asked| asked.path.contains(&layer)).collect::<Vec<_>>(),
            [true]
        );
    });
}

#[test]
fn plain_http_is_for_this_host_and_for_what_is_configured() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let (made, image) = three_layers();
        fill(&bench, &made, "v1", "tool:v1");
        run("ip", &["address", "add", "10.1.2.3/32", "dev", "lo"]);
        let proxy = Proxy::start_at("10.1.2.3:0").await;
        let (reference, store) = (at(proxy.address, "tool:v1"), bench.store());
        let error = client().pull(&reference, &store, &silent()).await.unwrap_err();
        assert!(
            matches!(error, OciError::Unreachable { .. }) && error.hint().contains("insecure"),
            "{error}"
        );
        assert!(proxy.asked("").is_empty(), "nothing was asked in the clear");
        let insecure = [proxy.address.to_string()].into();
        let client = Client::new(Settings { insecure, ..settings() }).unwrap();
        assert_eq!(client.pull(&reference, &store, &silent()).await.unwrap().manifest_digest, image.manifest);
    });
}

#[test]
fn a_registry_whose_name_has_no_address_is_asked_for_once() {
    in_namespace(|bench| async move {
        // Another try would take longer than the test may.
        let patient = Settings { attempts: 9, backoff: LONG * 60, backoff_most: LONG * 60, ..settings() };
        let client = Client::new(patient).unwrap();
        let (reference, store) = ("registry.invalid/tool:1".parse().unwrap(), bench.store());
        let error = client.pull(&reference, &store, &silent()).await.unwrap_err();
        assert!(matches!(error, OciError::Unreachable { .. }), "{error}");
        assert!(vm_types::report::chain(&error).contains("registry.invalid has no address"), "{error:?}");
    });
}
