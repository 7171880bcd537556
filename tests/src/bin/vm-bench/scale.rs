//! What the daemon itself costs, with fake guests: VMs made and deleted per second, listing, memory, descriptors.

use std::{
    env, fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::{Value, json, value::RawValue};
use vm_tests::{FakeWorld, rpc::Api};

use super::{Samples, goal};

/// Numbers of VMs at which is measured.
const VMS: [usize; 3] = [1, 100, 1000];
/// VMs made and deleted for one figure.
const PAIRS: usize = 100;
/// Listings for one figure.
const LISTINGS: usize = 1000;
/// Full lives before descriptors are counted again.
const CYCLES: usize = 50;
/// Clients that fill the daemon up.
const FILLERS: usize = 4;

/// Goals.
const LIST_P99: Duration = Duration::from_millis(2);
const RATE_RATIO: f64 = 1.3;
const GROWTH_KIB: f64 = 64.0;

/// The figures; `None` without a daemon that has fakes.
pub(crate) fn measure() -> Option<Value> {
    let programs = PathBuf::from(env::var_os("VM_BENCH_FAKE_BIN")?);
    let mut host = FakeWorld::with_programs(programs, "[network]\nsubnet = \"10.88.0.0/20\"");
    host.start("");
    let cycles = descriptors(&host);
    let mut figures = Vec::new();
    let idle = resident_kib(&host);
    println!(
        "\nwith fake guests{:>15} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "create+delete/s", "list p50", "list p99", "daemon CPU", "client CPU", "bytes", "RSS, KiB"
    );
    let mut there = 0;
    for vms in VMS {
        fill(&host, there, vms);
        there = vms;
        let rate = rate(&host);
        let processes = [host.daemon_pid(), std::process::id()];
        let before = processes.map(cpu);
        let (listing, bytes) = listing(&host);
        let after = processes.map(cpu);
        let each = |process: usize| {
            after[process].saturating_sub(before[process]) / u32::try_from(LISTINGS).unwrap_or(1)
        };
        let (daemon, client) = (each(0), each(1));
        let resident = resident_kib(&host);
        let (median, high) = (listing.median(), listing.quantile(0.99));
        println!(
            "{vms:>8} VMs {rate:>19.1} {median:>10.2?} {high:>10.2?} {daemon:>10.2?} {client:>10.2?} {bytes:>10} {resident:>10}"
        );
        figures.push(json!({
            "vms": vms,
            "create_delete_per_s": rate,
            "list_p50_s": median.as_secs_f64(),
            "list_p99_s": high.as_secs_f64(),
            "list_daemon_cpu_s": daemon.as_secs_f64(),
            "list_client_cpu_s": client.as_secs_f64(),
            "list_bytes": bytes,
            "rss_kib": resident,
        }));
    }
    let number = |row: usize, name: &str| figures[row][name].as_f64().unwrap_or(f64::NAN);
    let last = VMS.len() - 1;
    let ratio = number(0, "create_delete_per_s") / number(last, "create_delete_per_s");
    let growth = (number(last, "rss_kib") - number(0, "rss_kib")) / (VMS[last] - VMS[0]) as f64;
    let (before, after) = cycles;
    println!("{:8} idle {:>84}", "", idle);
    let goals = [
        goal("vm.list p99 at 1,000 VMs, ms", number(last, "list_p99_s") * 1e3, LIST_P99.as_secs_f64() * 1e3),
        goal("create+delete rate at 1 / at 1,000", ratio, RATE_RATIO),
        goal("growth per VM, KiB", growth, GROWTH_KIB),
        goal("descriptors more after 50 full lives", after as f64 - before as f64, 0.0),
    ];
    host.terminate();
    Some(json!({
        "by_vms": figures,
        "idle_rss_kib": idle,
        "growth_kib_per_vm": growth,
        "rate_ratio": ratio,
        "descriptors": {"before": before, "after": after},
        "goals": goals,
    }))
}

/// How many descriptors the daemon has before and after some full lives.
fn descriptors(host: &FakeWorld) -> (usize, usize) {
    let life = async |api: &Api| {
        api.create("life", true).await?;
        api.stop("life").await?;
        api.delete("life").await
    };
    let live = || drop(host.ask(life).expect("a life"));
    // What is made once, such as the network, is made now.
    live();
    let count = || fs::read_dir(format!("/proc/{}/fd", host.daemon_pid())).map_or(0, Iterator::count);
    let before = count();
    (0..CYCLES).for_each(|_| live());
    let deadline = Instant::now() + Duration::from_secs(10);
    // What the last life leaves to be done beside it.
    while count() > before && Instant::now() < deadline {
        std::thread::park_timeout(Duration::from_millis(10));
    }
    (before, count())
}

fn fill(host: &FakeWorld, from: usize, to: usize) {
    let working: Vec<_> = (0..FILLERS)
        .map(|filler| {
            let api = host.connect();
            host.spawn(async move {
                for number in (from..to).filter(|number| number % FILLERS == filler) {
                    api.create(&format!("v{number}"), false).await.expect("it is created");
                }
            })
        })
        .collect();
    for working in working {
        host.block_on(working).expect("a client does not panic");
    }
}

/// Pairs of create and delete per second, one after the other.
fn rate(host: &FakeWorld) -> f64 {
    let begun = Instant::now();
    host.ask(async |api| {
        for number in 0..PAIRS {
            let name = format!("pair{number}");
            api.create(&name, false).await.expect("it is created");
            api.delete(&name).await.expect("it is deleted");
        }
    });
    PAIRS as f64 / begun.elapsed().as_secs_f64()
}

/// The time to the whole answer, as text, and its length in bytes.
fn listing(host: &FakeWorld) -> (Samples, usize) {
    let mut samples = Samples::default();
    let mut bytes = 0;
    host.ask(async |api| {
        for _ in 0..LISTINGS {
            let begun = Instant::now();
            let answer: Box<RawValue> = api.call("vm.list", &[]).await.expect("the daemon answers");
            samples.add(begun.elapsed());
            bytes = answer.get().len();
        }
    });
    (samples, bytes)
}

/// What a process has had of the processors, in user and system mode (proc_pid_stat(5), fields 14 and 15, in ticks of 10 ms).
fn cpu(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|word| word.parse::<u64>().ok());
    Duration::from_millis(ticks.sum::<u64>() * 10)
}

fn resident_kib(host: &FakeWorld) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", host.daemon_pid())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_default()
}
