//! How fast a large tree is listed and packed, beside tar. Run by hand:
//! `cargo test --release -p vm-workspace --test workspace -- --ignored --nocapture throughput`.

use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
    time::Instant,
};

use vm_workspace::Selection;

use crate::repo::Repo;

const FILES: usize = 20_000;
const BYTES: usize = 1 << 30;

#[test]
#[ignore = "writes a gibibyte, and shows numbers only"]
fn throughput() {
    let repo = Repo::git_repository();
    // What is measured is not how git packs files that cannot be packed.
    repo.git(&["config", "core.compression", "0"]);
    let mut seed = 1_u64;
    let mut content = vec![0; BYTES / FILES];
    for number in 0..FILES {
        for byte in content.chunks_mut(8) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            byte.copy_from_slice(&seed.to_be_bytes()[..byte.len()]);
        }
        repo.write(format!("{}/{}/{number}", number % 20, number % 200), &content);
    }
    repo.commit();
    let sink = || {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        (child.stdin.take().unwrap(), child)
    };
    for round in 0..2 {
        let began = Instant::now();
        let workspace = repo.open();
        let opened = began.elapsed();
        let (to, mut child) = sink();
        let began = Instant::now();
        let sent = workspace.archive(Selection::All, to).unwrap();
        child.wait().unwrap();
        let packed = began.elapsed();
        println!("round {round}: open {opened:?}, archive {packed:?}, {} entries", sent.entries.len());
        let began = Instant::now();
        let (mut to, mut child) = sink();
        let top = repo.top();
        let mut tar = Command::new("tar")
            .args(["-c", "--exclude=.git", "-C"])
            .arg(&top)
            .arg(".")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::copy(tar.stdout.as_mut().unwrap(), &mut to).unwrap();
        to.flush().unwrap();
        drop(to);
        tar.wait().unwrap();
        child.wait().unwrap();
        println!("round {round}: tar {:?}", began.elapsed());
        let began = Instant::now();
        let git = workspace.git_directory(Some(1), std::io::sink());
        git.unwrap();
        println!("round {round}: git_directory(1) {:?}", began.elapsed());
    }
    fs::remove_dir_all(repo.top()).unwrap();
}
