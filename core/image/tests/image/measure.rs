//! How long an image's layers take to become a disk, against what others would do it with. Ignored: it needs the network,
//! skopeo, umoci and minutes; `cargo test --release -p vm-image --test image -- --ignored measure --nocapture`.

use std::{
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

use crate::layout::{Layout, layers};
use vm_image::rootfs;

const LAYERS: u64 = 5;

fn run(program: &str, args: &[&str]) -> f64 {
    let start = Instant::now();
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    start.elapsed().as_secs_f64()
}

/// A Debian of some 400 MB, cut into layers of one size.
fn debian(dir: &Path) -> PathBuf {
    let whole = dir.join("whole.tar");
    let packages = "--include=gcc,python3,git,vim,curl,perl,ca-certificates";
    run("mmdebstrap", &["--variant=apt", "--quiet", packages, "bookworm", whole.to_str().unwrap()]);
    let size = fs::metadata(&whole).unwrap().len();
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let mut archive = tar::Archive::new(fs::File::open(&whole).unwrap());
    let mut part = Vec::new();
    // Raw, so that headers stay as they are.
    for entry in archive.entries().unwrap().raw(true) {
        let mut entry = entry.unwrap();
        part.extend_from_slice(entry.header().as_bytes());
        entry.read_to_end(&mut part).unwrap();
        part.resize(part.len().next_multiple_of(512), 0);
        let extension = matches!(entry.header().entry_type().as_byte(), b'x' | b'g' | b'L' | b'K');
        if part.len() as u64 > size / LAYERS && !extension {
            parts.push(std::mem::take(&mut part));
        }
    }
    parts.push(part);
    fs::remove_file(&whole).unwrap();
    let parts = parts.into_iter().map(|mut part| {
        part.resize(part.len() + 1024, 0);
        part
    });
    let layout = dir.join("layout");
    Layout::write(&layout, parts.collect(), "gzip");
    layout
}

/// Peak memory of this process since the last call, in MiB.
fn peak_rss() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    fs::write("/proc/self/clear_refs", "5").unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

fn used(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(about) = fs::symlink_metadata(path) else { return 0 };
    if !about.is_dir() {
        return about.blocks() * 512;
    }
    let below = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| used(&entry.path()));
    about.blocks() * 512 + below.sum::<u64>()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures"]
async fn measure_layers_to_disk() {
    let dir = tempfile::tempdir().unwrap();
    let layout = std::env::var_os("VM_BENCH_LAYOUT").map_or_else(|| debian(dir.path()), PathBuf::from);
    let join = |name: &str| dir.path().join(name);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (identity, sources) = layers(&layout);
    let blobs: u64 = sources.iter().map(|layer| fs::metadata(&layer.blob).unwrap().len()).sum();

    // Warm, as after a download.
    for layer in &sources {
        fs::read(&layer.blob).unwrap();
    }
    let start = Instant::now();
    let mut bytes = 0;
    let mut out = fs::File::create(join("floor")).unwrap();
    for layer in &sources {
        let mut input = flate2::read::MultiGzDecoder::new(fs::File::open(&layer.blob).unwrap());
        bytes += io::copy(&mut input, &mut io::sink()).unwrap();
    }
    let decompress = start.elapsed().as_secs_f64();
    let zeros = vec![1; 1 << 20];
    for _ in 0..bytes >> 20 {
        out.write_all(&zeros).unwrap();
    }
    let floor = start.elapsed().as_secs_f64();
    out.sync_all().unwrap();
    let floor_synced = start.elapsed().as_secs_f64();
    drop(out);
    fs::remove_file(join("floor")).unwrap();
    println!(
        "{} layers, {} MB of blobs, {} MB of archives",
        sources.len(),
        blobs / 1_000_000,
        bytes / 1_000_000
    );
    println!("decompress one after the other     {decompress:6.2} s");
    println!("  + write the result's bytes       {floor:6.2} s, on the disk {floor_synced:.2} s");

    let source = format!("oci:{}:latest", text(&layout));
    let copied = format!("oci:{}:latest", text(&join("copy")));
    let skopeo = run("skopeo", &["--insecure-policy", "copy", "-q", &source, &copied]);
    let image = format!("{}:latest", text(&join("copy")));
    let umoci = run("umoci", &["unpack", "--image", &image, &text(&join("bundle"))]);
    let rootfs = text(&join("bundle/rootfs"));
    let unpacked = used(&join("bundle/rootfs"));
    let disk = text(&join("theirs.ext4"));
    let size = format!("{}K", unpacked * 13 / 10 / 1024 + (256 << 10));
    let mkfs = run("mkfs.ext4", &["-q", "-F", "-d", &rootfs, &disk, &size]);
    let theirs = skopeo + umoci + mkfs;
    let extra = used(&join("copy")) + used(&join("bundle")) + used(&join("theirs.ext4"));
    println!(
        "skopeo {skopeo:.2} + umoci {umoci:.2} + mkfs.ext4 -d {mkfs:.2}  {theirs:6.2} s, {:.2} of the unpacked size on the disk",
        extra as f64 / unpacked as f64
    );
    for name in ["copy", "bundle"] {
        fs::remove_dir_all(join(name)).unwrap();
    }
    fs::remove_file(join("theirs.ext4")).unwrap();

    let mut hashes = Vec::new();
    for verified in [true, true, false] {
        let mut sources = sources.clone();
        if !verified {
            for layer in &mut sources {
                (layer.digest, layer.diff_id) = (None, None);
            }
        }
        let (out, scratch) = (join("ours.ext4"), join("scratch"));
        let done = Arc::new(AtomicBool::new(false));
        let sampler = std::thread::spawn({
            let (done, scratch) = (Arc::clone(&done), scratch.clone());
            move || {
                let mut most = 0;
                while !done.load(Ordering::Relaxed) {
                    most = most.max(used(&scratch));
                    std::thread::sleep(Duration::from_millis(10));
                }
                most
            }
        });
        let unsynced = Arc::new(std::sync::Mutex::new(0.0));
        peak_rss();
        let start = Instant::now();
        let sink: vm_image::ProgressSink = {
            let unsynced = Arc::clone(&unsynced);
            Arc::new(move |progress| {
                if progress.stage == "writing to disk" {
                    *unsynced.lock().unwrap() = start.elapsed().as_secs_f64();
                }
            })
        };
        let built = rootfs::flatten(sources, identity.clone(), &out, &scratch, sink).await.unwrap();
        let seconds = start.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        let most = sampler.join().unwrap().max(built.used_bytes);
        let written = *unsynced.lock().unwrap();
        println!(
            "ours, {:<29}{written:6.2} s ({:.2} of theirs), on the disk {seconds:.2} s; {:.2} of the unpacked size on the \
             disk; {} MiB of memory",
            if verified { "digests verified" } else { "not verified" },
            written / theirs,
            most as f64 / unpacked as f64,
            peak_rss()
        );
        let mut hasher = Sha256::new();
        io::copy(&mut fs::File::open(&out).unwrap(), &mut hasher).unwrap();
        hashes.push(hasher.finalize());
        let check = Command::new("e2fsck").arg("-fn").arg(&out).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        fs::remove_file(&out).unwrap();
    }
    assert!(hashes.windows(2).all(|pair| pair[0] == pair[1]), "not the same bytes");
}
