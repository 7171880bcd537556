//! Measurements, for `make bench`: `cargo test --release -p vm-plugin -- --ignored --nocapture measure`.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use vm_plugin::{Compiler, Granted, Hook, Input, Limits, Plugin, Runtime};

use crate::{
    common::{component, input, manifest, state},
    names::{query, resolver},
};

/// Goals, for the median.
const FRESH: Duration = Duration::from_micros(60);
const WARM: Duration = Duration::from_micros(5);
const LOAD: Duration = Duration::from_millis(1);

/// Prints median and 99th percentile of some runs.
fn print(what: &str, mut times: Vec<Duration>, goal: Duration) {
    times.sort();
    let (median, high) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    let met = if median <= goal { "met" } else { "MISSED" };
    println!("{what:<40} p50 {median:>10.1?}   p99 {high:>10.1?}   goal: p50 at most {goal:?}, {met}");
}

async fn plugin(runtime: &Arc<Runtime>, guest: &str, wasm: &[u8]) -> Plugin {
    Plugin::new(runtime, manifest(guest, "capability"), wasm, Granted::All, json!({})).await.unwrap()
}

fn runtime(dir: &Path) -> Arc<Runtime> {
    Arc::new(Runtime::new(dir, Compiler::InProcess, Limits::default()).unwrap())
}

#[tokio::test]
#[ignore = "a measurement"]
async fn measure() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("aot");
    for guest in ["only-preflight", "full"] {
        let wasm = component(guest);
        let begin = Instant::now();
        let first = plugin(&runtime(&cache), guest, &wasm).await;
        println!("{guest}: {} KiB, compiled and loaded in {:.1?}", wasm.len() >> 10, begin.elapsed());
        let runtime = runtime(&cache);
        let mut times = Vec::new();
        for _ in 0..200 {
            let begin = Instant::now();
            plugin(&runtime, guest, &wasm).await;
            times.push(begin.elapsed());
        }
        print(&format!("{guest}: load"), times, LOAD);
        let state = state();
        let hooks = Hook::CAPABILITY.into_iter().filter(|hook| first.has(*hook));
        for hook in hooks.filter(|hook| !matches!(hook, Hook::PostStart | Hook::ConfigChange)) {
            let mut times = Vec::new();
            for _ in 0..2000 {
                let input: Input = input();
                let begin = Instant::now();
                first.call(hook, input, &state).await.unwrap();
                times.push(begin.elapsed());
            }
            print(&format!("{guest}: {hook}, fresh instance"), times, FRESH);
        }
    }
    let resolver = resolver(&runtime(&cache)).await;
    let mut times = Vec::new();
    for _ in 0..20_000 {
        let query = query("box.vm", 1);
        let begin = Instant::now();
        resolver.resolve(query).await.unwrap();
        times.push(begin.elapsed());
    }
    print("names: one question, warm", times, WARM);
}
