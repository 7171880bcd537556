//! No interleaving, crash or kill leaves a VM stuck, lost or leaking. Only the guests are fakes here: daemon, journal, shims,
//! taps, firewall, files and processes are real, and leaks are judged by looking at the host.

mod crash;
mod kills;
mod leaks;
mod listing;
mod model;
mod plugins;

/// To stderr itself: what libtest captures of a test that passes nobody sees.
fn say(what: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{what}");
}

/// Random numbers that are the same in each run, unless `VM_TEST_SEED` says otherwise. The seed is printed.
fn seeded(what: &str) -> fastrand::Rng {
    let seed = std::env::var("VM_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7);
    say(&format!("{what}: VM_TEST_SEED={seed}"));
    fastrand::Rng::with_seed(seed)
}
