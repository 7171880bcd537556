//! One command of an SSH session, from its start to its exit status on the wire.

use std::{
    io,
    os::{fd::AsFd, unix::process::ExitStatusExt},
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use nix::{
    pty::Winsize,
    sys::signal::{Signal, killpg},
    unistd::{Gid, Pid, Uid, chdir, setgid, setgroups, setsid, setuid},
};
use russh::{
    ChannelWriteHalf, Sig,
    server::{Handle, Msg},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, ChildStdin},
    sync::{Notify, mpsc},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    backlog::Receiver,
    command::{Command, Refusal},
    groups,
    pty::{Master, Terminal},
    users::User,
};

/// One SSH packet's worth.
const CHUNK: usize = 32 << 10;
/// How long output may stay silent after a command's end while others still hold its pipe. What the command itself wrote
/// is in the pipe when it ends; this is for helpers that it left behind. Time in which the client takes nothing does not
/// count.
const SILENCE: Duration = Duration::from_secs(1);
/// The most that is read from a pipe after the silence: no pipe holds more (`/proc/sys/fs/pipe-max-size`), so a helper that
/// begins to write just then cannot keep the channel open.
const LEFT_OVER: usize = 1 << 20;
/// Between SIGHUP, SIGTERM and SIGKILL for the command of a client that has gone.
const PATIENCE: Duration = Duration::from_secs(3);

/// What happens to a running command.
#[derive(Debug)]
pub(crate) enum Event {
    Signal(Signal),
    Resize(Winsize),
}

/// The wire's side of a command.
pub(crate) struct Wire {
    pub output: ChannelWriteHalf<Msg>,
    pub handle: Handle,
    pub input: Receiver,
    /// Ends when the channel or the connection does.
    pub events: mpsc::UnboundedReceiver<Event>,
}

enum Input {
    Pipe(Option<ChildStdin>),
    Terminal(Arc<Master>),
}

/// Runs a planned command, or says why there is none, and closes the channel.
pub(crate) async fn run(
    plan: Result<Command, Refusal>,
    user: User,
    terminal: Option<Terminal>,
    mut wire: Wire,
) {
    let alone = plan.as_ref().is_ok_and(|command| command.alone);
    let started = plan.and_then(|command| start(&command, &user, terminal.as_ref()));
    let (mut child, input, mut outputs) = match started {
        Ok(started) => started,
        Err(refusal) => {
            let end = if terminal.is_some() { "\r\n" } else { "\n" };
            let message = Bytes::from(format!("vm-agent: {refusal}{end}"));
            // Cancel-safe: a client that has gone needs no message.
            tokio::select! {
                _ = wire.output.extended_data_bytes(1, message) => {}
                () = hang_up(&mut wire.events) => {}
            }
            finish(&wire, Some(refusal.exit_status()), None).await;
            return;
        }
    };
    let group = child.id().map(|id| Pid::from_raw(id.cast_signed()));
    let registered = group.map(groups::register);
    let master = match &input {
        Input::Terminal(master) => Some(Arc::clone(master)),
        Input::Pipe(_) => None,
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(pump_input(wire.input, input));
    let mut exited: Option<ExitStatus> = None;
    let output = Arc::new(wire.output);
    let activity = Arc::<Activity>::default();
    let mut pumps = JoinSet::new();
    for source in outputs.drain(..) {
        pumps.spawn(pump_output(source, Arc::clone(&output), Arc::clone(&activity)));
    }
    let mut events = wire.events;
    while exited.is_none() || !pumps.is_empty() {
        // Cancel-safe: child.wait, recv and join_next lose nothing; the silence is measured anew after each event.
        tokio::select! {
            status = child.wait(), if exited.is_none() => {
                exited = Some(status.unwrap_or_else(|_| ExitStatus::from_raw(255 << 8)));
                if alone {
                    activity.over.cancel();
                }
            }
            _ = pumps.join_next(), if !pumps.is_empty() => {}
            event = events.recv() => match (event, group) {
                // Whoever still holds the output may be of the group: its number is taken as long as it has members.
                (Some(Event::Signal(signal)), Some(group)) => drop(killpg(group, signal)),
                (Some(Event::Resize(size)), _) => {
                    if let Some(master) = &master {
                        master.resize(&size);
                    }
                }
                (Some(_), _) => {}
                (None, _) => {
                    // Nobody is left to write to, and a command that waits to write must see that.
                    pumps.abort_all();
                    tasks.abort_all();
                    drop(master);
                    if let (None, Some(group)) = (exited, group) {
                        end(&mut child, group).await;
                    }
                    return;
                }
            },
            () = activity.quiet(), if exited.is_some() && !activity.over.is_cancelled() => activity.over.cancel(),
        }
    }
    drop(registered);
    tasks.abort_all();
    let Ok(output) = Arc::try_unwrap(output).map_err(drop) else { return };
    let (status, signal) = match exited {
        Some(status) => (
            status.code().map(i32::cast_unsigned),
            status.signal().map(|signal| (signal, status.core_dumped())),
        ),
        None => (Some(255), None),
    };
    finish_on(&output, &wire.handle, status, signal).await;
}

/// What a command's pumps are doing.
#[derive(Default)]
struct Activity {
    /// Something was read or sent.
    happened: Notify,
    /// Pumps that hold data which the client has not taken yet.
    sending: AtomicUsize,
    /// Pumps take what there is and end.
    over: CancellationToken,
}

impl Activity {
    /// Resolves when every pump has waited for output for [`SILENCE`].
    async fn quiet(&self) {
        while timeout(SILENCE, self.happened.notified()).await.is_ok()
            || self.sending.load(Ordering::Relaxed) > 0
        {}
    }
}

/// Resolves when channel or connection end.
pub(super) async fn hang_up(events: &mut mpsc::UnboundedReceiver<Event>) {
    while events.recv().await.is_some() {}
}

/// [`finish_on`] a command's wire.
pub(super) async fn finish(wire: &Wire, status: Option<u32>, signal: Option<(i32, bool)>) {
    finish_on(&wire.output, &wire.handle, status, signal).await;
}

/// Exit status or signal, end of data, close: in this order, behind all data.
async fn finish_on(
    output: &ChannelWriteHalf<Msg>,
    handle: &Handle,
    status: Option<u32>,
    signal: Option<(i32, bool)>,
) {
    match (status, signal) {
        (_, Some((number, core))) => {
            let name = signal_name(number);
            let _ = handle.exit_signal_request(output.id(), name, core, String::new(), String::new()).await;
        }
        (status, None) => drop(output.exit_status(status.unwrap_or(255)).await),
    }
    let _ = output.eof().await;
    let _ = output.close().await;
}

/// Ends the command of a client that has gone, with everything in its process group.
async fn end(child: &mut Child, group: Pid) {
    for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGKILL] {
        let _ = killpg(group, signal);
        // A stopped process takes no signal before this one.
        let _ = killpg(group, Signal::SIGCONT);
        if timeout(PATIENCE, child.wait()).await.is_ok() {
            return;
        }
    }
}

type Started = (Child, Input, Vec<Source>);

fn start(command: &Command, user: &User, terminal: Option<&Terminal>) -> Result<Started, Refusal> {
    let mut process = tokio::process::Command::new(&command.program);
    process.arg0(&command.arg0).args(&command.arguments).env_clear().envs(&command.environment);
    let mut master = None;
    if let Some(terminal) = terminal {
        let opened =
            super::pty::open(terminal, user).map_err(|error| Refusal::NoTerminal(error.to_string()))?;
        let (server, slave, path) = opened;
        let copy = |fd: &std::os::fd::OwnedFd| {
            fd.try_clone().map_err(|error| Refusal::NoTerminal(error.to_string()))
        };
        process.stdin(copy(&slave)?).stdout(copy(&slave)?).stderr(slave).env("TERM", &terminal.name);
        if let Some(path) = path {
            process.env("SSH_TTY", path);
        }
        master = Some(Arc::new(server));
    } else {
        process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let groups: Vec<_> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let (directory, home) = (command.directory.clone(), user.home.clone());
    let on_terminal = terminal.is_some();
    let prepare = move || -> io::Result<()> {
        setsid()?;
        if on_terminal {
            controlling_terminal()?;
        }
        if let Ok(file) = nix::fcntl::open(
            "/proc/self/oom_score_adj",
            nix::fcntl::OFlag::O_WRONLY,
            nix::sys::stat::Mode::empty(),
        ) {
            let _ = nix::unistd::write(&file, b"0");
        }
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
        setgroups(&groups)?;
        setgid(gid)?;
        setuid(uid)?;
        match &directory {
            Some(directory) => chdir(directory.as_path())
                .map_err(|errno| io::Error::from_raw_os_error(DIRECTORY + errno as i32))?,
            None => chdir(home.as_path()).or_else(|_| chdir(Path::new("/")))?,
        }
        Ok(())
    };
    #[expect(unsafe_code, reason = "runs between fork and exec")]
    // SAFETY: the closure makes system calls on values made before the fork, and neither allocates nor locks.
    unsafe {
        process.pre_exec(prepare);
    }
    let mut child = process.spawn().map_err(|error| refusal(command, &error))?;
    drop(process);
    if let Some(master) = master {
        return Ok((child, Input::Terminal(Arc::clone(&master)), vec![Source::Terminal(master)]));
    }
    let mut outputs = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        outputs.push(Source::Pipe(Box::new(stdout), None));
    }
    if let Some(stderr) = child.stderr.take() {
        outputs.push(Source::Pipe(Box::new(stderr), Some(1)));
    }
    let stdin = child.stdin.take();
    Ok((child, Input::Pipe(stdin), outputs))
}

/// Marks an error number, the only thing that comes back from between fork and exec, as that of the directory.
const DIRECTORY: i32 = 1 << 16;

fn refusal(command: &Command, error: &io::Error) -> Refusal {
    match (&command.directory, error.raw_os_error()) {
        (Some(directory), Some(number)) if number >= DIRECTORY => {
            let why = nix::errno::Errno::from_raw(number - DIRECTORY).desc();
            Refusal::Directory(directory.display().to_string(), why.to_owned())
        }
        _ => Refusal::of(&command.program, error),
    }
}

/// Makes standard input the controlling terminal of the new session.
fn controlling_terminal() -> io::Result<()> {
    #[expect(unsafe_code, reason = "ioctl")]
    // SAFETY: TIOCSCTTY takes an integer, not a pointer.
    let result = unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

async fn pump_input(mut from: Receiver, to: Input) {
    match to {
        Input::Terminal(master) => {
            while let Some(data) = from.next().await {
                if master.write_all(&data).await.is_err() {
                    return;
                }
            }
        }
        Input::Pipe(mut stdin) => {
            while let Some(data) = from.next().await {
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&data).await.is_err()
                {
                    return;
                }
            }
        }
    }
}

/// A pipe's reading end, non-blocking.
trait Pipe: AsyncRead + AsFd + Send + Unpin {}
impl<P: AsyncRead + AsFd + Send + Unpin> Pipe for P {}

enum Source {
    /// A pipe, and the kind of extended data it carries.
    Pipe(Box<dyn Pipe>, Option<u32>),
    Terminal(Arc<Master>),
}

impl Source {
    /// Waits for output. Cancel-safe.
    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe, _) => pipe.read(buffer).await,
            Self::Terminal(master) => master.read(buffer).await,
        }
    }

    /// Takes output that is there, past what the runtime believes about that.
    fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe, _) => Ok(nix::unistd::read(pipe.as_fd(), buffer)?),
            Self::Terminal(master) => master.read_now(buffer),
        }
    }
}

/// Sends what a command writes, no faster than the client takes it, until nobody can write any more or the time is over.
async fn pump_output(mut from: Source, to: Arc<ChannelWriteHalf<Msg>>, activity: Arc<Activity>) {
    let mut buffer = BytesMut::new();
    let mut left = LEFT_OVER;
    while left > 0 {
        buffer.resize(CHUNK, 0);
        // Cancel-safe: a read that was not completed has taken nothing.
        let length = tokio::select! {
            biased;
            () = activity.over.cancelled() => from.read_now(&mut buffer).inspect(|length| left = left.saturating_sub(*length)),
            length = from.read(&mut buffer) => length,
        };
        let Ok(length @ 1..) = length else { return };
        let data = buffer.split_to(length).freeze();
        activity.sending.fetch_add(1, Ordering::Relaxed);
        let sent = match &from {
            Source::Pipe(_, Some(kind)) => to.extended_data_bytes(*kind, data).await,
            _ => to.data_bytes(data).await,
        };
        activity.sending.fetch_sub(1, Ordering::Relaxed);
        activity.happened.notify_one();
        if sent.is_err() {
            return;
        }
    }
}

/// A signal by its name on the wire (RFC 4254, section 6.10), which is without `SIG`.
pub(crate) fn signal_of(signal: &Sig) -> Option<Signal> {
    Some(match signal {
        Sig::ABRT => Signal::SIGABRT,
        Sig::ALRM => Signal::SIGALRM,
        Sig::FPE => Signal::SIGFPE,
        Sig::HUP => Signal::SIGHUP,
        Sig::ILL => Signal::SIGILL,
        Sig::INT => Signal::SIGINT,
        Sig::KILL => Signal::SIGKILL,
        Sig::PIPE => Signal::SIGPIPE,
        Sig::QUIT => Signal::SIGQUIT,
        Sig::SEGV => Signal::SIGSEGV,
        Sig::TERM => Signal::SIGTERM,
        Sig::USR1 => Signal::SIGUSR1,
        Sig::Custom(name) => format!("SIG{}", name.split('@').next()?).parse().ok()?,
    })
}

fn signal_name(number: i32) -> Sig {
    match Signal::try_from(number) {
        Ok(Signal::SIGABRT) => Sig::ABRT,
        Ok(Signal::SIGALRM) => Sig::ALRM,
        Ok(Signal::SIGFPE) => Sig::FPE,
        Ok(Signal::SIGHUP) => Sig::HUP,
        Ok(Signal::SIGILL) => Sig::ILL,
        Ok(Signal::SIGINT) => Sig::INT,
        Ok(Signal::SIGKILL) => Sig::KILL,
        Ok(Signal::SIGPIPE) => Sig::PIPE,
        Ok(Signal::SIGQUIT) => Sig::QUIT,
        Ok(Signal::SIGSEGV) => Sig::SEGV,
        Ok(Signal::SIGTERM) => Sig::TERM,
        Ok(Signal::SIGUSR1) => Sig::USR1,
        Ok(other) => Sig::Custom(other.as_str().trim_start_matches("SIG").into()),
        // Real-time signals have no names of their own; local ones carry a domain (RFC 4254, section 6.10).
        Err(_) => Sig::Custom(format!("RT{number}@vmd")),
    }
}
