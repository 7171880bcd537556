//! How fast a tree is packed and unpacked, beside tar. Run by hand:
//! `cargo test --release -p vm-archive -- --ignored --nocapture throughput`.

use std::{
    fs, io,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use vm_types::guest::files::{PackOptions, UnpackOptions};

use crate::{Output, Replaced, Unpacking, pack, unpack};

const FILES: usize = 20_000;
const BYTES: usize = 1 << 30;
/// As the agent has them.
const PIECES: usize = 32;

/// Pieces as the agent's worker reads them.
struct Pieces {
    pieces: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl io::Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.current = piece,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

fn timed(work: impl FnOnce()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

fn by_tar(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    let mut packing =
        Command::new("tar").arg("-cC").arg(from).arg(".").stdout(Stdio::piped()).spawn().unwrap();
    let input = packing.stdout.take().unwrap();
    let unpacking = Command::new("tar").arg("-xC").arg(to).stdin(input).status().unwrap();
    assert!(unpacking.success() && packing.wait().unwrap().success());
}

fn by_us(from: &Path, to: &Path) {
    let (output, pieces) = mpsc::channel(PIECES);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            pack(from, None, &PackOptions::default(), Replaced::new(), &Output(output)).unwrap()
        });
        let how = Unpacking {
            owner: Some((0, 0)),
            modes: 0o7777,
            only: None,
            careful: false,
            options: UnpackOptions::default(),
        };
        unpack(to, how, Pieces { pieces, current: Bytes::new() }).unwrap();
    });
}

fn only_packed(from: &Path) {
    let (output, mut pieces) = mpsc::channel(PIECES);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            pack(from, None, &PackOptions::default(), Replaced::new(), &Output(output)).unwrap()
        });
        while pieces.blocking_recv().is_some() {}
    });
}

#[test]
#[ignore = "writes gibibytes, and shows numbers only"]
fn throughput() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let content = vec![7; BYTES / FILES];
    for number in 0..FILES {
        let directory = at("from").join(format!("{}/{}", number % 20, number % 200));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(number.to_string()), &content).unwrap();
    }
    for round in 0..3 {
        let packed = timed(|| only_packed(&at("from")));
        let ours = timed(|| by_us(&at("from"), &at("ours")));
        fs::remove_dir_all(at("ours")).unwrap();
        let tar = timed(|| by_tar(&at("from"), &at("tar")));
        fs::remove_dir_all(at("tar")).unwrap();
        println!("round {round}: packed {packed:?}, packed and unpacked {ours:?}, tar | tar {tar:?}");
    }
}
