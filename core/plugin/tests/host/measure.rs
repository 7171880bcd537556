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

/// Prints median and 99th percentile of some runs.
fn print(what: &str, mut times: Vec<Duration>) {
    times.sort();
    println!(
        "{what:<40} p50 {:>10.1?}   p99 {:>10.1?}",
        times[times.len() / 2],
        times[times.len() * 99 / 100]
    );
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
        print(&format!("{guest}: load"), times);
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
            print(&format!("{guest}: {hook}, fresh instance"), times);
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
    print("names: one question, warm", times);
}
