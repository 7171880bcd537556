//! A Debian root filesystem for real: mmdebstrap, then ext4. Needs the network.

use std::{fs, time::Duration, time::Instant};

use crate::common::{Bench, mounted, recorded, silent};
use vm_image::{ImageError, debian, rootfs};

#[tokio::test]
async fn a_suite_becomes_a_root_filesystem() {
    let bench = Bench::new();
    let (sink, seen) = recorded();
    let tarball =
        debian::pull(&bench.runner, &"bookworm".parse().unwrap(), &bench.scratch(), sink).await.unwrap();
    let stages: Vec<String> = seen.lock().unwrap().iter().map(|progress| progress.stage.clone()).collect();
    assert!(stages.iter().any(|stage| stage == "downloading packages"), "{stages:?}");
    let bytes = fs::metadata(tarball.path()).unwrap().len();
    let start = Instant::now();
    let source = rootfs::TarSource::Path(tarball.path().to_owned());
    let built = rootfs::build(source, &bench.out(), &bench.scratch(), silent()).await.unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("{bytes} bytes of tar in {seconds:.2} s, {:.0} MB/s: {built:?}", bytes as f64 / 1e6 / seconds);
    drop(tarball);
    bench.check();
    mounted(&bench.out(), |root| {
        let sources = fs::read_to_string(root.join("etc/apt/sources.list")).unwrap();
        assert!(sources.contains(" bookworm main") && sources.contains("bookworm-security"), "{sources}");
        for file in ["usr/bin/apt-get", "usr/sbin/ip", "usr/bin/ps", "etc/ssl/certs/ca-certificates.crt"] {
            assert!(fs::symlink_metadata(root.join(file)).is_ok() || root.join("bin/ip").exists(), "{file}");
        }
        // What would be every VM's ballast, and what is this host's.
        for file in
            ["etc/hostname", "etc/resolv.conf", "usr/share/man/man1", "etc/apt/apt.conf.d/99mmdebstrap"]
        {
            assert!(!root.join(file).exists(), "{file}");
        }
        let lists = fs::read_dir(root.join("var/lib/apt/lists")).unwrap();
        assert!(
            lists.flatten().all(|entry| entry.file_type().unwrap().is_dir() || entry.file_name() == "lock")
        );
    });
    tokio::time::timeout(Duration::from_secs(60), async {
        while fs::read_dir(bench.scratch()).unwrap().count() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the scratch directory was not emptied");
}

#[tokio::test]
async fn an_unknown_suite_is_told_from_other_failures() {
    let bench = Bench::new();
    let error = debian::pull(&bench.runner, &"nosuchsuite".parse().unwrap(), &bench.scratch(), silent())
        .await
        .unwrap_err();
    assert!(matches!(&error, ImageError::UnknownSuite { suite } if suite == "nosuchsuite"), "{error:?}");
    assert!(error.hint().unwrap().contains("bookworm"));
    bench.assert_clean();
}
