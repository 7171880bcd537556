//! The fake's process: its sockets, its console and its end.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use nix::sys::signal::{SigHandler, Signal, raise};
use tokio::{
    io::{AsyncBufReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedWriteHalf, pipe},
    },
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use vm_host::files;
use vm_types::{
    VmId,
    machine::Drive,
    shim::{GuestEnd, QmpEvent, QmpEventData},
};

use super::{Crash, CrashAt, End, FakeBehaviour, firecracker, guest, monitor};

/// How long one who is about to listen for the guest's end is waited for.
const LISTENER: Duration = Duration::from_secs(5);

/// The process's command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Arguments {
    pub(super) vm: VmId,
    pub(super) channel: PathBuf,
    pub(super) control: PathBuf,
    pub(super) events: PathBuf,
    pub(super) drives: Vec<Drive>,
    pub(super) behaviour: FakeBehaviour,
}

impl Arguments {
    pub(super) fn to_args(&self) -> Vec<String> {
        let behaviour = serde_json::to_string(&self.behaviour).unwrap_or_default();
        let drives = serde_json::to_string(&self.drives).unwrap_or_default();
        [
            ("--vm", self.vm.to_string()),
            ("--channel", self.channel.display().to_string()),
            ("--control", self.control.display().to_string()),
            ("--events", self.events.display().to_string()),
            ("--drives", drives),
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
            events: value("--events")?.into(),
            drives: serde_json::from_str(value("--drives")?).map_err(|error| format!("--drives: {error}"))?,
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
    pub(super) drives: Vec<Drive>,
    /// Who is told how the guest ends.
    pub(super) listener: watch::Sender<Option<OwnedWriteHalf>>,
    ending: mpsc::Sender<End>,
    console: mpsc::Sender<Output>,
}

#[derive(Debug)]
enum Output {
    Bytes(Vec<u8>),
    Flush(oneshot::Sender<()>),
}

impl World {
    /// A world whose console is the process's, and how it is to end.
    pub(super) fn new(
        vm: VmId,
        behaviour: FakeBehaviour,
        drives: Vec<Drive>,
    ) -> (Arc<Self>, mpsc::Receiver<End>) {
        let (ending, ended) = mpsc::channel(1);
        let (console, output) = mpsc::channel(64);
        let (paused, listener) = (watch::Sender::new(false), watch::Sender::new(None));
        tokio::spawn(write_console(output));
        let started = Instant::now();
        (Arc::new(Self { vm, behaviour, started, paused, drives, listener, ending, console }), ended)
    }

    /// Returns when all that was printed is out, or nobody takes it.
    pub(super) async fn flush(&self) {
        let (flush, flushed) = oneshot::channel();
        if self.console.send(Output::Flush(flush)).await.is_ok() {
            // A console nobody reads must not keep the VMM alive.
            let _ = timeout(Duration::from_secs(1), flushed).await;
        }
    }

    /// Writes a line to the console; lost where nobody empties that, as on a real serial line.
    pub(super) fn print(&self, line: &str) {
        let _ = self.console.try_send(Output::Bytes(format!("{line}\r\n").into_bytes()));
    }

    /// Ends the process soon.
    pub(super) fn end(&self, end: End) {
        // An end that is already under way comes first.
        let _ = self.ending.try_send(end);
    }

    /// Ends the process after a while.
    pub(super) fn end_later(self: &Arc<Self>, after: Duration, end: End) {
        let world = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            world.end(end);
        });
    }

    /// Tells how the guest ends to whoever listens, or is about to.
    async fn tell(&self, end: End) {
        let (guest, reason) = match end {
            End::Guest(GuestEnd::PowerOff) => (true, "guest-shutdown"),
            End::Guest(GuestEnd::Reboot) => (true, "guest-reset"),
            End::Guest(GuestEnd::Panic) => (true, "guest-panic"),
            End::Code(0) => (false, "host-qmp-quit"),
            End::Code(_) | End::Signal(_) => return,
        };
        let data = QmpEventData { guest, reason: Some(reason.to_owned()) };
        let event = QmpEvent { event: Some("SHUTDOWN".to_owned()), data };
        let mut line = serde_json::to_vec(&event).unwrap_or_default();
        line.extend_from_slice(b"\r\n");
        if guest {
            let mut listener = self.listener.subscribe();
            let _ = timeout(LISTENER, listener.wait_for(Option::is_some)).await;
        }
        // One line always fits, or nobody reads.
        if let Some(listener) = &*self.listener.borrow() {
            let _ = listener.try_write(&line);
        }
    }

    /// Returns when virtual CPUs run.
    pub(super) async fn running(&self) {
        let _ = self.paused.subscribe().wait_for(|paused| !paused).await;
    }
}

/// Plays VMM and guest until told to end. `args` are those that [`super::FakeDriver`] planned, without the leading ones.
pub fn run(args: &[String]) -> ExitCode {
    if args.iter().any(|arg| matches!(arg.as_str(), "--api-sock" | "--version")) {
        return firecracker::run(args);
    }
    let arguments = match Arguments::parse(args) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("fake VMM: {error}");
            return ExitCode::from(2);
        }
    };
    leave(live(arguments))
}

/// Runs what the process does, and ends it in the way that comes of that.
pub(super) fn leave(live: impl Future<Output = io::Result<End>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("fake VMM: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let end = runtime.block_on(live).unwrap_or_else(|error| {
        eprintln!("fake VMM: {error}");
        End::Code(1)
    });
    match end {
        End::Guest(_) => std::process::exit(0),
        End::Code(code) => std::process::exit(code),
        End::Signal(number) => {
            if let Ok(signal) = Signal::try_from(number) {
                dispose(signal, SigHandler::SigDfl);
                let _ = raise(signal);
            }
            std::process::exit(1)
        }
    }
}

/// Rust's runtime handles SIGSEGV and SIGBUS and ignores SIGPIPE; a fake has to die of them.
#[expect(unsafe_code, reason = "nix cannot know that a disposition is no handler")]
fn dispose(signal: Signal, disposition: SigHandler) {
    // SAFETY: SIG_DFL and SIG_IGN, which is all that callers give, run no code of ours in signal context.
    let _ = unsafe { nix::sys::signal::signal(signal, disposition) };
}

async fn live(arguments: Arguments) -> io::Result<End> {
    let Arguments { vm, channel, control, events, drives, behaviour } = arguments;
    if behaviour.ignore_sigterm {
        dispose(Signal::SIGTERM, SigHandler::SigIgn);
    }
    if let Some(Crash { at: CrashAt::Launch, end }) = behaviour.crash {
        eprintln!("fake VMM: crashing as told");
        return Ok(end);
    }
    let (channel, control, events) = (listen(&channel)?, listen(&control)?, listen(&events)?);
    let (world, mut ended) = World::new(vm, behaviour, drives);
    world.print(&format!("fake guest {} booting", world.vm));
    if let Some(Crash { at: CrashAt::Up { after_millis }, end }) = world.behaviour.crash {
        world.end_later(Duration::from_millis(after_millis), end);
    }
    let of = |world: &Arc<World>| world.clone();
    tokio::spawn(one_by_one(channel, of(&world), guest::serve));
    tokio::spawn(one_by_one(control, of(&world), monitor::serve));
    tokio::spawn(one_by_one(events, of(&world), monitor::serve_events));
    tokio::spawn(read_console(world.clone(), |world, end| world.end(End::Guest(end))));
    if world.behaviour.console_flood_bytes_per_s > 0 {
        tokio::spawn(flood_console(world.clone()));
    }

    let end = ended.recv().await.unwrap_or(End::Code(1));
    world.tell(end).await;
    if matches!(end, End::Code(0) | End::Guest(_)) {
        world.flush().await;
    }
    Ok(end)
}

/// The size of an image file or block device in bytes.
pub(super) fn drive_size(path: &Path) -> io::Result<u64> {
    File::open(path)?.seek(SeekFrom::End(0))
}

/// Listens as QEMU does: whatever was left there before gives way.
fn listen(path: &Path) -> io::Result<UnixListener> {
    files::remove_if_there(path)?;
    UnixListener::bind(path)
}

/// Serves one client after the other, as a QEMU character device does.
async fn one_by_one<F: Future<Output = io::Result<()>>>(
    listener: UnixListener,
    world: Arc<World>,
    serve: fn(UnixStream, Arc<World>) -> F,
) {
    while let Ok((stream, _)) = listener.accept().await {
        // How a client's connection broke is the client's business.
        let _ = serve(stream, world.clone()).await;
    }
}

/// Without a thread where stdout is a pipe, as a shim's is: there may be a thousand fakes on a host.
async fn write_console(mut output: mpsc::Receiver<Output>) {
    let mut stdout: Box<dyn AsyncWrite + Send + Unpin> =
        match io::stdout().as_fd().try_clone_to_owned().and_then(pipe::Sender::from_owned_fd) {
            Ok(pipe) => Box::new(pipe),
            Err(_) => Box::new(tokio::io::stdout()),
        };
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

/// Sends back what is typed, and does what control characters say, see [`crate::contract::Subject`].
pub(super) async fn read_console(world: Arc<World>, typed: impl Fn(&World, GuestEnd)) {
    // Nothing but a pipe types: a null device has nothing to say, and a thread would wait for the rest.
    let Ok(stdin) = io::stdin().as_fd().try_clone_to_owned().and_then(pipe::Receiver::from_owned_fd) else {
        return;
    };
    let mut lines = BufReader::with_capacity(512, stdin).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        world.running().await;
        match line.as_slice() {
            [0x0f] => typed(&world, GuestEnd::PowerOff),
            [0x12] => typed(&world, GuestEnd::Reboot),
            [0x10] => typed(&world, GuestEnd::Panic),
            line => world.print(&format!("echo: {}", String::from_utf8_lossy(line).trim_end())),
        }
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
