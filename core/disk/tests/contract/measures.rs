//! What it costs to make a disk and to remove it.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use super::bench::{Bench, MIB, block};

/// Of base and disk.
const SIZES: [u64; 3] = [10 * MIB, 1024 * MIB, 10240 * MIB];
/// No more of a base is data: holes cost nothing.
const DATA_MAX: u64 = 256 * MIB;
const RUNS: u32 = 9;

pub(crate) async fn what_a_disk_costs(bench: &Bench) {
    for size in SIZES {
        let data = size.min(DATA_MAX);
        let base = File::options().write(true).open(bench.base_path()).unwrap();
        base.set_len(size).unwrap();
        for at in (1..data / MIB).map(|n| n * MIB) {
            base.write_all_at(&block(at as u8, MIB), at).unwrap();
        }
        base.sync_all().unwrap();
        let (mut makes, mut removes, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..RUNS {
            let disk = bench.disk(number, size);
            let free = bench.free_bytes();
            let started = Instant::now();
            bench.make(&disk).await.unwrap();
            makes.push(started.elapsed());
            // The blocks of a file would count what it shares with others.
            bytes.push(free.saturating_sub(bench.free_bytes()));
            let started = Instant::now();
            bench.remove(&disk).await.unwrap();
            removes.push(started.elapsed());
        }
        println!(
            "disk by {:?}, {:5} MiB with {:3} MiB of data: made in {:6.1} ms, removed in {:6.1} ms, {:6} KiB",
            bench.ground,
            size >> 20,
            data >> 20,
            median(makes),
            median(removes),
            bytes.into_iter().min().unwrap_or(0) >> 10
        );
    }
}

/// In milliseconds.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}
