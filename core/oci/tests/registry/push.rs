//! Images that go the other way.

use vm_oci::{Compression, OciError, Pulled, silent};

use crate::{
    bench::{AT, at, client, in_namespace, run, skopeo_copy},
    made::{Made, tar},
    proxy::{Fault, Proxy},
};

#[test]
fn a_pushed_image_is_the_same_image() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let mut made = Made::default();
        let shared = (tar("shared", 2 << 20), Compression::Gzip);
        let one = made.image("amd64", &[shared.clone(), (tar("one", 1000), Compression::Zstd)]);
        let two = made.image("amd64", &[shared, (tar("two", 1000), Compression::None)]);
        made.tag(&one, "one");
        made.tag(&two, "two");
        made.write(&bench.path("layout"));
        let (store, client, proxy) = (bench.store(), client(), Proxy::start().await);
        let import = async |tag: &str| {
            let source = format!("oci:{}:{tag}", bench.text("layout")).parse_source();
            client.fetch(&source, &store, &silent()).await.unwrap()
        };
        let (first, second) = (import("one").await, import("two").await);
        proxy.on("PUT /v2/team/tool/blobs/uploads/", 1, Fault::Answer("502 Gateway", String::new(), ""));
        proxy.on("PUT /v2/team/tool/manifests/", 1, Fault::Answer("503 Busy", String::new(), ""));
        let pushed =
            client.push(&first, &store, &at(proxy.address, "team/tool:one"), &silent()).await.unwrap();
        assert_eq!(pushed, one.manifest);
        let told = run("skopeo", &["inspect", "--tls-verify=false", &format!("docker://{AT}/team/tool:one")]);
        assert!(told.contains(&one.manifest.to_string()), "{told}");

        proxy.forget();
        client.push(&second, &store, &at(proxy.address, "team/tool:two"), &silent()).await.unwrap();
        assert_eq!(proxy.asked("PUT /v2/team/tool/blobs/").len(), 2, "config and its own layer");
        proxy.forget();
        client.push(&second, &store, &at(proxy.address, "team/tool:again"), &silent()).await.unwrap();
        assert!(proxy.asked("POST").is_empty() && proxy.asked("PUT").len() == 1, "the manifest alone");

        // Back again, into another store, by another client as well.
        let other = vm_oci::Store::open(&bench.path("other")).unwrap();
        let back =
            client.pull(&at(AT, &format!("team/tool@{}", two.manifest)), &other, &silent()).await.unwrap();
        assert_eq!((back.digests(), &back.config), (second.digests(), &second.config));
        skopeo_copy(
            &format!("docker://{AT}/team/tool:one"),
            &format!("oci:{}:x", bench.text("copied")),
            &["--preserve-digests"],
        );

        let wrong = at(AT, &format!("team/tool@{}", one.manifest));
        assert!(matches!(
            client.push(&second, &store, &wrong, &silent()).await,
            Err(OciError::Digest { .. })
        ));
        let opened = Pulled::open(&store, &one.manifest).unwrap();
        client.push(&opened, &store, &at(AT, "reopened:v1"), &silent()).await.unwrap();
    });
}

trait Parse {
    fn parse_source(&self) -> vm_oci::ImageSource;
}

impl Parse for String {
    fn parse_source(&self) -> vm_oci::ImageSource {
        vm_oci::ImageSource::parse(self, &vm_oci::ReferenceDefaults::default()).unwrap()
    }
}
