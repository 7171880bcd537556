//! What `vm run` costs above the bare machine and with large images ([`images`]), what bringing a workspace costs
//! ([`workspaces`]), and what the daemon costs with many VMs ([`scale`]) and with many plugins ([`plugins`]).
//!
//! The floor is the very QEMU command line that the shim would run, with the same kernel, initramfs and a copy of the same
//! disk, started by hand and timed until the guest's agent has answered on the guest channel. Runs of both alternate, so
//! that a busier or idler moment of the host touches both. `VM_BENCH_RUNS` says how many; the first argument names a file
//! for the figures as JSON. `VM_BENCH_FAKE_BIN` is a directory with a `vmd` that knows fakes; `VM_BENCH_ONLY` names
//! the one part to measure: `run`, `images` or `workspaces`, which need real VMs, `scale` or `plugins`.

mod images;
mod plugins;
mod scale;
mod workspaces;

use std::{
    collections::BTreeMap,
    env, fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};
use vm_channel::HostChannel;
use vm_tests::{World, fixtures};
use vm_types::{
    guest::control::{Phase, Reply, Request, Service},
    shim::{ChannelEndpoint, LaunchPlan, ShimSpec},
};

fn main() {
    let only = env::var("VM_BENCH_ONLY").ok();
    let wanted = |part| only.as_deref().is_none_or(|only| only == part);
    let mut figures = if wanted("run") { real() } else { json!({}) };
    if wanted("images") {
        figures["images"] = images::measure();
    }
    if wanted("scale") {
        figures["scale"] = scale::measure().unwrap_or_default();
    }
    if wanted("plugins") {
        figures["plugins"] = plugins::measure().unwrap_or_default();
    }
    if wanted("workspaces") {
        figures["workspaces"] = workspaces::measure();
    }
    if let Some(file) = env::args_os().nth(1) {
        fs::write(&file, format!("{figures:#}\n")).expect("the figures can be written");
        println!("figures: {}", Path::new(&file).display());
    }
}

/// `vm run` and the floor.
fn real() -> Value {
    let runs = env::var("VM_BENCH_RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(7).max(1);
    let world = World::new();
    let floor = Floor::prepare(&world);
    let run = ["run", "--rm", "--", "true"];
    // Once for the page cache and the network, which the daemon keeps.
    world.vm(&run).run().exits(0);
    floor.once(&world);

    let mut hello = Samples::default();
    let mut ready = Samples::default();
    let mut whole = Samples::default();
    let log = world.dirs().log_file();
    let mut steps: BTreeMap<String, Samples> = BTreeMap::new();
    for number in 1..=runs {
        let (answered, usable) = floor.once(&world);
        hello.add(answered);
        ready.add(usable);
        let before = fs::metadata(&log).map_or(0, |about| about.len());
        let output = world.vm(&run).run().exits(0);
        whole.add(output.took);
        for (step, took) in effects(&log, before) {
            steps.entry(step).or_default().add(took);
        }
        eprintln!("run {number} of {runs}: floor {answered:.2?}, vm run {:.2?}", output.took);
    }
    let import = import_rate(&world);
    drop(world);

    let ratio = whole.median().as_secs_f64() / hello.median().as_secs_f64();
    println!("{:34} {:>8} {:>8} {:>8}", format!("{runs} runs, seconds"), "min", "median", "max");
    for (name, samples) in [
        ("vm run --rm -- true", &whole),
        ("floor: QEMU to the agent's answer", &hello),
        ("       to its root being ready", &ready),
    ] {
        println!(
            "{name:34} {:>8.3} {:>8.3} {:>8.3}",
            samples.min(),
            samples.median().as_secs_f64(),
            samples.max()
        );
    }
    let least = whole.min() / hello.min();
    println!(
        "\nvm run / floor: {ratio:.3} by the medians, {least:.3} by the minima\n\nwhat the daemon did (median, ms):"
    );
    let mut accounted = Duration::ZERO;
    for (step, samples) in &steps {
        accounted += samples.median();
        println!("  {step:32} {:>8.1}", samples.median().as_secs_f64() * 1e3);
    }
    let rest = whole.median().saturating_sub(ready.median()).saturating_sub(accounted);
    println!("  {:32} {:>8.1}", "client, RPC, SSH, shutdown", rest.as_secs_f64() * 1e3);
    println!("\nimage import: {import:.0} MB/s of tarball");

    json!({
        "runs": runs,
        "vm_run_over_floor": ratio,
        "vm_run_over_floor_of_minima": least,
        "vm_run_s": whole.json(),
        "floor_s": hello.json(),
        "floor_ready_s": ready.json(),
        "steps_s": steps.iter().map(|(step, samples)| (step.clone(), samples.json())).collect::<BTreeMap<_, _>>(),
        "image_import_mb_per_s": import,
    })
}

/// A VMM as the shim would start it, with files of its own.
struct Floor {
    launch: LaunchPlan,
    pristine: std::path::PathBuf,
    disk: std::path::PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Floor {
    fn prepare(world: &World) -> Self {
        world.vm(&["create", "--name", "floor"]).run().exits(0);
        let paths = world.paths("floor");
        let own = world.directory().join("floor");
        fs::create_dir(&own).expect("a directory can be made");
        let pristine = own.join("pristine.raw");
        copy(&paths.disk(), &pristine);
        world.vm(&["start", "floor"]).run().exits(0);
        let spec = fs::read(paths.shim_spec()).expect("a running VM has a specification");
        let spec: ShimSpec = serde_json::from_slice(&spec).expect("the specification can be read");
        fs::copy(paths.initramfs(), own.join("initramfs.cpio")).expect("the initramfs can be copied");
        world.vm(&["kill", "floor"]).run().exits(0);
        world.vm(&["delete", "floor"]).run().exits(0);

        // The same words, about files of our own.
        let moved = |text: &str| {
            let text = text.replace(&*paths.run.to_string_lossy(), &own.to_string_lossy());
            text.replace(&*paths.state.to_string_lossy(), &own.to_string_lossy())
        };
        let socket = spec.launch.channel.socket();
        let launch = LaunchPlan {
            program: spec.launch.program.clone(),
            args: spec.launch.args.iter().map(|word| moved(word)).collect(),
            channel: ChannelEndpoint::VirtioSerial { socket: moved(&socket.to_string_lossy()).into() },
            events: None,
            setup: None,
            last_words: None,
            own_dir: None,
            inherited: Vec::new(),
            jail: None,
        };
        // A tap of its own, beside those that the daemon makes and removes for the other runs.
        if launch.args.iter().any(|word| word.contains("ifname=")) {
            world.tool("ip", &["tuntap", "add", FLOOR_TAP, "mode", "tap"]).run().exits(0);
            world.tool("ip", &["link", "set", FLOOR_TAP, "up"]).run().exits(0);
        }
        let args = launch.args.iter().map(|word| with_tap(word)).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Self { launch: LaunchPlan { args, ..launch }, pristine, disk: own.join("disk.raw"), runtime }
    }

    /// Time to the agent's first answer, and to its root being ready.
    fn once(&self, world: &World) -> (Duration, Duration) {
        copy(&self.pristine, &self.disk);
        let socket = self.launch.channel.socket();
        let _ = fs::remove_file(socket);
        let mut command = Command::new(&self.launch.program);
        command.args(&self.launch.args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let started = Instant::now();
        let mut vmm = world.namespaces().spawn(&mut command).expect("the VMM starts");
        let times = self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(120), answers(socket, started, &mut vmm)).await
        });
        let _ = vmm.kill();
        let _ = vmm.wait();
        times.expect("the agent answers in time")
    }
}

const FLOOR_TAP: &str = "floor0";

fn with_tap(word: &str) -> String {
    let parts = word.split(',').map(|part| match part.strip_prefix("ifname=") {
        Some(_) => format!("ifname={FLOOR_TAP}"),
        None => part.to_owned(),
    });
    parts.collect::<Vec<_>>().join(",")
}

async fn answers(socket: &Path, started: Instant, vmm: &mut Child) -> (Duration, Duration) {
    let carrier = loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => break stream,
            Err(_) => {
                assert!(matches!(vmm.try_wait(), Ok(None)), "the VMM ended");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    };
    let channel = HostChannel::connect(carrier).await.expect("the agent shakes hands");
    let stream = channel.open(Service::Control).await.expect("the control service opens");
    let mut stream = BufReader::new(stream);
    let mut ask = async |request: &Request| {
        let mut line = serde_json::to_vec(request).expect("a request is JSON");
        line.push(b'\n');
        stream.write_all(&line).await.expect("the agent reads");
        stream.flush().await.expect("the agent reads");
        let mut answer = String::new();
        stream.read_line(&mut answer).await.expect("the agent answers");
        serde_json::from_str::<Reply>(&answer).expect("the answer is a reply")
    };
    let hello = ask(&Request::Hello).await;
    assert!(matches!(hello, Reply::Hello { .. }), "{hello:?}");
    let answered = started.elapsed();
    let ready = ask(&Request::WaitReady { phase: Phase::Agent }).await;
    assert!(matches!(ready, Reply::Ready { .. }), "{ready:?}");
    (answered, started.elapsed())
}

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp").arg("--sparse=always").arg("--reflink=auto").arg(from).arg(to).status();
    assert!(done.is_ok_and(|status| status.success()), "{} can be copied", from.display());
}

/// What the daemon's log says of effects since `from`: `applied` or `undone`, which kind, and how long it took. Directories and
/// plain files are summed up.
fn effects(log: &Path, from: u64) -> Vec<(String, Duration)> {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(usize::try_from(from).unwrap_or(0)..).unwrap_or_default())
        .into_owned();
    let mut sums: BTreeMap<String, Duration> = BTreeMap::new();
    for line in text.lines() {
        let value = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name));
        let (Some(effect), Some(took)) = (value("effect="), value("took=").and_then(duration)) else {
            continue;
        };
        let verb = if line.contains(" undone ") { "undo" } else { "apply" };
        let kind = effect.split(':').next().unwrap_or_default();
        *sums.entry(format!("{verb} {kind}")).or_default() += took;
    }
    sums.into_iter().collect()
}

/// As `{:?}` of a [`Duration`] writes it.
fn duration(text: &str) -> Option<Duration> {
    let unit = text.find(|c: char| c != '.' && !c.is_ascii_digit())?;
    let scale = match &text[unit..] {
        "s" => 1.0,
        "ms" => 1e-3,
        "µs" => 1e-6,
        "ns" => 1e-9,
        _ => return None,
    };
    Some(Duration::from_secs_f64(text[..unit].parse::<f64>().ok()? * scale))
}

/// MB of tarball a second, median of three.
fn import_rate(world: &World) -> f64 {
    let cached = fs::read_dir(fixtures::cache()).into_iter().flatten().flatten().map(|entry| entry.path());
    let Some(tarball) = cached.into_iter().find(|path| path.extension().is_some_and(|end| end == "tar"))
    else {
        return 0.0;
    };
    let mut samples = Samples::default();
    for _ in 0..3 {
        samples
            .add(world.vm(&["image", "import", &tarball.to_string_lossy(), "systemd"]).run().exits(0).took);
    }
    let bytes = fs::metadata(&tarball).map_or(0, |about| about.len());
    bytes as f64 / 1e6 / samples.median().as_secs_f64()
}

fn goal(what: &str, is: f64, at_most: f64) -> Value {
    let met = is <= at_most;
    println!("  {what:40} {is:>9.2}   goal: at most {at_most:<6} {}", if met { "met" } else { "MISSED" });
    json!({"what": what, "is": is, "at_most": at_most, "met": met})
}

#[derive(Debug, Default)]
struct Samples(Vec<Duration>);

impl Samples {
    fn add(&mut self, sample: Duration) {
        let place = self.0.partition_point(|other| *other < sample);
        self.0.insert(place, sample);
    }

    fn median(&self) -> Duration {
        self.0.get(self.0.len() / 2).copied().unwrap_or_default()
    }

    fn quantile(&self, part: f64) -> Duration {
        let place = (self.0.len() as f64 * part) as usize;
        self.0.get(place.min(self.0.len().saturating_sub(1))).copied().unwrap_or_default()
    }

    fn min(&self) -> f64 {
        self.0.first().copied().unwrap_or_default().as_secs_f64()
    }

    fn max(&self) -> f64 {
        self.0.last().copied().unwrap_or_default().as_secs_f64()
    }

    fn json(&self) -> Value {
        json!({"min": self.min(), "median": self.median().as_secs_f64(), "max": self.max()})
    }
}
