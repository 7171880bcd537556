//! What an image's size adds to the start of a VM, on each filesystem and backend on which a disk is no full copy.
//!
//! One image has 8 MB beside its programs and the other 300 MB, which do not compress. Runs of both alternate. Each filesystem is a
//! file of its own, mounted where only this program's child sees it.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use vm_tests::{World, fixtures};

use super::{Samples, goal};

/// What is measured in the child: which backend, and where the images of all tests are.
const BACKEND: &str = "VM_BENCH_BACKEND";
const SEED: &str = "VM_BENCH_SEED";
/// What the larger image may take of the smaller one's time.
const RATIO: f64 = 1.1;
const SIZES: [(&str, usize); 2] = [("small", 8 << 20), ("large", 300 << 20)];
/// Filesystem, what makes it, and the backend on it.
const PLACES: [(&str, &str, &str); 3] = [
    ("xfs", "mkfs.xfs -q -m reflink=1", "reflink"),
    ("btrfs", "mkfs.btrfs -q", "reflink"),
    ("ext4", "mkfs.ext4 -q", "dm-snapshot"),
];
/// Of the file that is a filesystem; it takes what is in it.
const PLACE_BYTES: u64 = 4 << 30;
/// $1 file, $2 directory, $3 this program, $4 where its figures go.
const MOUNTED: &str = "mount -o loop \"$1\" \"$2\" && \"$3\" \"$4\"";

/// The figures.
pub(crate) fn measure() -> Value {
    if let Ok(backend) = env::var(BACKEND) {
        return one(&backend);
    }
    let seed = fixtures::seed();
    println!("\n{:34} {:>8} {:>8} {:>8}", "vm run --rm -- true, seconds", "min", "median", "max");
    let places = PLACES.iter().filter_map(|place| in_place(place, &seed)).collect::<Vec<_>>();
    json!({ "by_place": places })
}

/// Measures on a filesystem of its own; `None` where this host has it not.
fn in_place((filesystem, make, backend): &(&str, &str, &str), seed: &Path) -> Option<Value> {
    let place = tempfile::Builder::new().prefix("place").tempdir_in(fixtures::cache()).expect("a directory");
    let (file, mount) = (place.path().join("file"), place.path().join("mount"));
    fs::create_dir(&mount).expect("a directory can be made");
    fs::File::create(&file).and_then(|file| file.set_len(PLACE_BYTES)).expect("a file can be made");
    let made =
        Command::new("sh").args(["-c", &format!("{make} \"$0\"")]).arg(&file).output().expect("sh runs");
    if !made.status.success() {
        println!("{filesystem}: {}", String::from_utf8_lossy(&made.stderr).trim());
        return None;
    }
    let figures = place.path().join("figures.json");
    let status = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", MOUNTED, "sh"])
        .args([&file, &mount])
        .arg(env::current_exe().expect("this program has a path"))
        .arg(&figures)
        .envs([("VM_BENCH_ONLY", "images"), (BACKEND, backend)])
        .envs([(SEED, seed), ("VM_TEST_CACHE", &mount)])
        .status()
        .expect("unshare runs");
    if !status.success() {
        println!("{backend} on {filesystem}: not measured");
        return None;
    }
    let figures: Value = serde_json::from_slice(&fs::read(&figures).ok()?).ok()?;
    let mut figures = figures["images"].clone();
    figures["filesystem"] = json!(filesystem);
    Some(figures)
}

fn one(backend: &str) -> Value {
    let runs = env::var("VM_BENCH_RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(7).max(1);
    let seed = PathBuf::from(env::var_os(SEED).expect("the parent names it"));
    let world = World::with_seed(&seed, &format!("[disk]\nbackend = \"{backend}\"\n"));
    for (name, bytes) in SIZES {
        let tarball = world.directory().join("image.tar");
        write(&tarball, bytes).expect("an archive can be written");
        world.vm(&["image", "import", &tarball.to_string_lossy(), name]).run().exits(0);
        fs::remove_file(&tarball).expect("it can be removed");
    }
    let run = |name: &str| {
        world.vm(&["run", "--rm", "--memory", "256M", "--image", name, "--", "true"]).run().exits(0).took
    };
    let mut samples: [Samples; SIZES.len()] = Default::default();
    for (name, _) in SIZES {
        run(name);
    }
    for number in 1..=runs {
        for ((name, _), samples) in SIZES.iter().zip(&mut samples) {
            samples.add(run(name));
        }
        eprintln!("{backend}: run {number} of {runs}");
    }
    let mut rows = Vec::new();
    for ((name, bytes), samples) in SIZES.iter().zip(&samples) {
        let (least, median, most) = (samples.min(), samples.median().as_secs_f64(), samples.max());
        let what = format!("{backend}, {} MB", bytes >> 20);
        println!("{what:34} {least:>8.3} {median:>8.3} {most:>8.3}");
        rows.push(json!({ "image": name, "bytes": bytes, "run_s": samples.json() }));
    }
    let [small, large] = &samples;
    let ratio = large.median().as_secs_f64() / small.median().as_secs_f64();
    let goals = [goal("the large one over the small one", ratio, RATIO)];
    json!({ "backend": backend, "runs": runs, "by_size": rows, "goals": goals })
}

/// A busybox tree, and so many bytes that do not compress.
fn write(path: &Path, bytes: usize) -> std::io::Result<()> {
    let mut tar = tar::Builder::new(fs::File::create(path)?);
    fixtures::busybox_tree(&mut tar)?;
    let mut random = fastrand::Rng::with_seed(7);
    let mut content = vec![0; bytes];
    random.fill(&mut content);
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, "ballast", &content[..])?;
    tar.into_inner()?.flush()
}
