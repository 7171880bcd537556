//! What plugins add to the start of a VM, with fake guests: nothing but the daemon's own work is in the difference.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use vm_tests::{FakeWorld, programs, rpc::Api};

use super::{Samples, goal};

/// Numbers of plugins at which is measured.
const PLUGINS: [usize; 3] = [0, 5, 50];
/// Starts for one figure.
const STARTS: usize = 40;
/// What the last number of [`PLUGINS`] may add to a start.
const ADDED: Duration = Duration::from_millis(20);
/// Bundled plugins that are copied under other names, in turn, and their configuration: one that only judges, one that plans
/// for the guest and is asked again when the guest is up.
const COPIED: [(&str, &str); 2] = [("limits", "max-cpus=64"), ("provision", r#"environment={"BENCH":"1"}"#)];

/// The figures; `None` without a daemon that has fakes.
pub(crate) fn measure() -> Option<Value> {
    let programs = PathBuf::from(env::var_os("VM_BENCH_FAKE_BIN")?);
    let mut host = FakeWorld::with_programs(programs, "[network]\nsubnet = \"10.88.0.0/20\"");
    let sources = host.world().directory().join("copies");
    host.start("");
    host.ask(async |api| api.create("bench", false).await).expect("a VM can be made");
    println!("\nstart of a fake guest {:>10} {:>10} {:>10}", "min", "median", "added");
    let (mut rows, mut none, mut there) = (Vec::new(), Duration::ZERO, 0);
    let mut last = 0.0;
    for plugins in PLUGINS {
        for number in there..plugins {
            let (name, config) = COPIED[number % COPIED.len()];
            let copy = copy(&sources, name, number);
            let install = ["plugin", "install", &copy, "--grant", "all", "--config", config];
            host.world().vm(&install).run().exits(0);
        }
        there = plugins;
        let samples = starts(&host);
        if plugins == 0 {
            none = samples.median();
        }
        last = (samples.median().as_secs_f64() - none.as_secs_f64()) * 1e3;
        println!(
            "{plugins:>12} plugins {:>9.2}ms {:>10.2?} {last:>8.2}ms",
            samples.min() * 1e3,
            samples.median()
        );
        rows.push(json!({"plugins": plugins, "start_s": samples.json(), "added_ms": last}));
    }
    let what = format!("{} plugins add to a start, ms", PLUGINS[PLUGINS.len() - 1]);
    let goals = [goal(&what, last, ADDED.as_secs_f64() * 1e3)];
    host.ask(async |api| api.delete("bench").await).expect("a VM can be deleted");
    host.terminate();
    Some(json!({"by_plugins": rows, "goals": goals}))
}

/// A bundled plugin under another name; its directory.
fn copy(into: &Path, name: &str, number: usize) -> String {
    let from = PathBuf::from(programs::bundled_plugin(name));
    let to = into.join(format!("{name}-{number}"));
    fs::create_dir_all(&to).expect("a directory can be made");
    for entry in fs::read_dir(&from).expect("the plugin can be read").flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).expect("a file can be copied");
    }
    let manifest = to.join("plugin.toml");
    let text = fs::read_to_string(&manifest).expect("a plugin has a manifest");
    let renamed = text.replacen(&format!("name = \"{name}\""), &format!("name = \"{name}-{number}\""), 1);
    fs::write(&manifest, renamed).expect("the manifest can be written");
    to.display().to_string()
}

fn starts(host: &FakeWorld) -> Samples {
    let mut samples = Samples::default();
    let once = async |api: &Api| {
        let begun = Instant::now();
        api.start("bench").await?;
        let took = begun.elapsed();
        api.stop("bench").await.map(|_| took)
    };
    for number in 0..=STARTS {
        let took = host.ask(once).expect("a fake guest starts and stops");
        // The first one compiles or loads what is not in memory yet.
        if number > 0 {
            samples.add(took);
        }
    }
    samples
}
