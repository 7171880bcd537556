//! The fake's process: its sockets, its console and its end.

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use nix::sys::signal::{SigHandler, Signal, raise};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use vm_host::files;
use vm_types::VmId;

use super::{CrashAt, End, FakeBehaviour, guest, monitor};

/// The process's command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Arguments {
    pub(super) vm: VmId,
    pub(super) channel: PathBuf,
    pub(super) control: PathBuf,
    pub(super) behaviour: FakeBehaviour,
}

impl Arguments {
    pub(super) fn to_args(&self) -> Vec<String> {
        let behaviour = serde_json::to_string(&self.behaviour).unwrap_or_default();
        [
            ("--vm", self.vm.to_string()),
            ("--channel", self.channel.display().to_string()),
            ("--control", self.control.display().to_string()),
            ("--behaviour", behaviour),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
    }

    fn parse(args: &[String]) -> Result<Self, String> {
        let value = |name: &str| {
            let pair = args.chunks_exact(2).find(|pair| pair[0] == name);
            pair.map(|pair| pair[1].as_str()).ok_or_else(|| format!("{name} is missing"))
        };
        Ok(Self {
            vm: value("--vm")?.parse().map_err(|error: vm_types::id::InvalidId| error.to_string())?,
            channel: value("--channel")?.into(),
            control: value("--control")?.into(),
            behaviour: serde_json::from_str(value("--behaviour")?)
                .map_err(|error| format!("--behaviour: {error}"))?,
        })
    }
}

/// What the parts of the process share.
#[derive(Debug)]
pub(super) struct World {
    pub(super) vm: VmId,
    pub(super) behaviour: FakeBehaviour,
    pub(super) started: Instant,
    pub(super) paused: watch::Sender<bool>,
    ending: mpsc::Sender<End>,
    console: mpsc::Sender<Output>,
}

#[derive(Debug)]
enum Output {
    Bytes(Vec<u8>),
    Flush(oneshot::Sender<()>),
}

impl World {
    /// Writes a line to the console; lost where nobody empties that, as on a real serial line.
    pub(super) fn print(&self, line: &str) {
        let _ = self.console.try_send(Output::Bytes(format!("{line}\r\n").into_bytes()));
    }

    /// Ends the process soon.
    pub(super) fn end(&self, end: End) {
        // An end that is already under way comes first.
        let _ = self.ending.try_send(end);
    }

    /// Returns when virtual CPUs run.
    pub(super) async fn running(&self) {
        let _ = self.paused.subscribe().wait_for(|paused| !paused).await;
    }
}

/// Plays VMM and guest until told to end. `args` are those that [`super::FakeDriver`] planned, without the leading ones.
pub fn run(args: &[String]) -> ExitCode {
    let arguments = match Arguments::parse(args) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("fake VMM: {error}");
            return ExitCode::from(2);
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("fake VMM: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let end = runtime.block_on(live(arguments)).unwrap_or_else(|error| {
        eprintln!("fake VMM: {error}");
        End::Code(1)
    });
    // A thread of the runtime still reads stdin and cannot be stopped; the process goes without it.
    match end {
        End::Code(code) => std::process::exit(code),
        End::Signal(number) => {
            if let Ok(signal) = Signal::try_from(number) {
                restore_default(signal);
                let _ = raise(signal);
            }
            std::process::exit(1)
        }
    }
}

/// Rust's runtime handles SIGSEGV and SIGBUS and ignores SIGPIPE; a fake has to die of them.
#[expect(unsafe_code, reason = "nix cannot know that a disposition is no handler")]
fn restore_default(signal: Signal) {
    // SAFETY: SIG_DFL runs no code of ours in signal context.
    let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) };
}

async fn live(arguments: Arguments) -> io::Result<End> {
    let Arguments { vm, channel, control, behaviour } = arguments;
    if let Some(crash) = behaviour.crash
        && crash.at == CrashAt::Launch
    {
        eprintln!("fake VMM: crashing as told");
        return Ok(crash.end);
    }
    let (channel, control) = (listen(&channel)?, listen(&control)?);
    let (ending, mut ended) = mpsc::channel(1);
    let (console, output) = mpsc::channel(64);
    let (paused, _) = watch::channel(false);
    let world = Arc::new(World { vm, behaviour, started: Instant::now(), paused, ending, console });

    tokio::spawn(write_console(output));
    world.print(&format!("fake guest {} booting", world.vm));
    tokio::spawn({
        let world = world.clone();
        async move { one_by_one(channel, |stream| guest::serve(stream, world.clone())).await }
    });
    tokio::spawn({
        let world = world.clone();
        async move { one_by_one(control, |stream| monitor::serve(stream, world.clone())).await }
    });
    tokio::spawn(echo_console(world.clone()));
    if world.behaviour.console_flood_bytes_per_s > 0 {
        tokio::spawn(flood_console(world.clone()));
    }

    let end = ended.recv().await.unwrap_or(End::Code(1));
    let (flush, flushed) = oneshot::channel();
    if matches!(end, End::Code(0)) && world.console.send(Output::Flush(flush)).await.is_ok() {
        // A console nobody reads must not keep the VMM alive.
        let _ = timeout(Duration::from_secs(1), flushed).await;
    }
    Ok(end)
}

/// Listens as QEMU does: whatever was left there before gives way.
fn listen(path: &Path) -> io::Result<UnixListener> {
    files::remove_if_there(path)?;
    UnixListener::bind(path)
}

/// Serves one client after the other, as a QEMU character device does.
async fn one_by_one<F: Future<Output = io::Result<()>>>(
    listener: UnixListener,
    serve: impl Fn(UnixStream) -> F,
) {
    while let Ok((stream, _)) = listener.accept().await {
        // How a client's connection broke is the client's business.
        let _ = serve(stream).await;
    }
}

async fn write_console(mut output: mpsc::Receiver<Output>) {
    let mut stdout = tokio::io::stdout();
    while let Some(item) = output.recv().await {
        // A closed console loses what is written to it; the guest runs on.
        match item {
            Output::Bytes(bytes) => drop(stdout.write_all(&bytes).await),
            Output::Flush(done) => {
                let _ = stdout.flush().await;
                let _ = done.send(());
            }
        }
        if output.is_empty() {
            let _ = stdout.flush().await;
        }
    }
}

async fn echo_console(world: Arc<World>) {
    let mut lines = BufReader::new(tokio::io::stdin()).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        world.running().await;
        world.print(&format!("echo: {}", String::from_utf8_lossy(&line).trim_end()));
    }
}

async fn flood_console(world: Arc<World>) {
    const TICKS_PER_S: u64 = 20;
    let mut tick = interval(Duration::from_millis(1000 / TICKS_PER_S));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let share = world.behaviour.console_flood_bytes_per_s.div_ceil(TICKS_PER_S) as usize;
    let chunk: Vec<u8> = b"flood flood flood flood flood flood flood flood flood flood\r\n"
        .iter()
        .copied()
        .cycle()
        .take(share)
        .collect();
    loop {
        tick.tick().await;
        world.running().await;
        if world.console.send(Output::Bytes(chunk.clone())).await.is_err() {
            return;
        }
    }
}
