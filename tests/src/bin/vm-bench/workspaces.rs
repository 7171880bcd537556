//! What it takes to bring a workspace into a VM, beside `tar` through `vm ssh` into the same VM.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use vm_tests::{World, repository::Repository};

use super::{Samples, goal};

/// A small file's size, and how many there are: about 1 GB.
const FILE: usize = 50_000;
const FILES: usize = 20_000;
/// Different ones in all files.
const WORDS: usize = 100;
/// Files that change before the second import.
const TOUCHED: usize = 10;
/// How long one of them may take.
const LIMIT: Duration = Duration::from_secs(1800);
/// Of both ways in turn, so that a busier moment of the host touches both.
const ROUNDS: usize = 2;

/// The figures.
pub(crate) fn measure() -> Value {
    let world = World::new();
    let directory = world.directory().join("bench");
    let repository = make(&directory);
    let path = directory.to_str().expect("the bench's directory is UTF-8");
    world.vm(&["create", "--name", "bench", "--memory", "1G", "--disk", "12G", "--start"]).run().exits(0);
    let remove = |path: &str| {
        world.vm(&["ssh", "bench", &format!("rm -rf '{path}'; sync")]).within(LIMIT).run().exits(0);
    };
    let timed = |arguments: &[&str]| world.vm(arguments).within(LIMIT).run().exits(0).took;

    let (mut tar, mut copy, mut first, mut again) =
        (Samples::default(), Samples::default(), Samples::default(), Samples::default());
    for round in 0..ROUNDS {
        tar.add(piped(&world, &directory));
        remove("/work/tar");
        copy.add(timed(&["workspace", "prepare", "bench", path, "--importer", "copy", "--to", "/work/copy"]));
        remove("/work/copy");
        let took = timed(&[
            "workspace",
            "prepare",
            "bench",
            path,
            "--to",
            "/work/bench",
            "--replace",
            "--importer",
            "git",
        ]);
        first.add(took);
        for number in 0..TOUCHED {
            repository.write(&name(number * 997), &format!("touched in round {round}\n"));
        }
        again.add(timed(&["workspace", "prepare", "bench", path, "--to", "/work/bench"]));
        eprintln!("round {} of {ROUNDS}: tar {:.1?}", round + 1, tar.median());
    }
    world.vm(&["delete", "--force", "bench"]).run().exits(0);

    let bytes = (FILE * FILES) as f64;
    println!(
        "\n{:48} {:>8} {:>8}",
        format!("{FILES} files, {:.1} GB, {ROUNDS} rounds", bytes / 1e9),
        "seconds",
        "MB/s"
    );
    for (what, samples) in [
        ("tar c | vm ssh VM tar x", &tar),
        ("vm workspace prepare --importer copy", &copy),
        ("vm workspace prepare (git/shallow)", &first),
        ("the same after 10 files have changed", &again),
    ] {
        println!("{what:48} {:>8.1} {:>8.0}", samples.min(), bytes / 1e6 / samples.min());
    }
    let goals = [
        goal("prepare of a copy / tar through ssh", copy.min() / tar.min(), 1.1),
        goal("prepare with git / tar through ssh", first.min() / tar.min(), 1.1),
        goal("second prepare / first", again.min() / first.min(), 0.1),
    ];
    json!({
        "tar_s": tar.json(),
        "copy_s": copy.json(),
        "git_s": first.json(),
        "again_s": again.json(),
        "goals": goals,
    })
}

fn name(number: usize) -> String {
    format!("part{:03}/file{number}", number % 200)
}

/// A repository whose files compress about as source text does, all of them committed.
fn make(directory: &Path) -> Repository {
    fs::create_dir_all(directory).expect("a directory can be made");
    let repository = Repository(directory.to_owned());
    let mut random = fastrand::Rng::with_seed(7);
    let words: Vec<String> =
        (0..WORDS).map(|_| (0..random.usize(2..12)).map(|_| random.lowercase()).collect()).collect();
    for number in 0..FILES {
        let mut content = String::with_capacity(FILE);
        while content.len() < FILE {
            content.push_str(&words[random.usize(..WORDS)]);
            content.push(if random.u8(..8) == 0 { '\n' } else { ' ' });
        }
        content.truncate(FILE);
        let path = directory.join(name(number));
        fs::create_dir_all(path.parent().expect("it has one")).expect("a directory can be made");
        fs::write(path, &content).expect("a file can be written");
    }
    repository.git(&["init", "-q", "-b", "main"]);
    repository.git(&["add", "-A"]);
    repository.git(&["commit", "-q", "-m", "all"]);
    repository
}

/// The same tree as users would bring it without a workspace: tar here, tar there, `vm ssh` between.
fn piped(world: &World, directory: &Path) -> Duration {
    let begin = Instant::now();
    let archive = world.directory().join("pipe");
    nix::unistd::mkfifo(&archive, nix::sys::stat::Mode::S_IRWXU).expect("a pipe can be made");
    let mut tar = Command::new("tar")
        .arg("-C")
        .arg(directory)
        .arg("-cf")
        .arg(&archive)
        .arg(".")
        .stdin(Stdio::null())
        .spawn()
        .expect("tar is installed");
    let vm = world.program("vm");
    let dirs = world.dirs();
    let script = format!(
        "VMD_RUN_DIR='{}' VMD_STATE_DIR='{}' VMD_CONFIG_DIR='{}' exec '{}' ssh bench 'mkdir -p /work/tar && tar -C /work/tar -x' <'{}'",
        dirs.run.display(),
        dirs.state.display(),
        dirs.config.display(),
        vm.display(),
        archive.display()
    );
    world.tool("sh", &["-c", &script]).within(LIMIT).run().exits(0);
    let status = tar.wait().expect("tar can be waited for");
    assert!(status.success(), "tar packs the tree");
    let took = begin.elapsed();
    fs::remove_file(archive).expect("the pipe can be removed");
    took
}
