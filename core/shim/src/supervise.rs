//! The shim itself: from a specification to the VMM's exit record.
//!
//! ```text
//!   detach ──> Prepared (run directory locked, logs, sockets) ──> spawn ──> ShimStarted ──> supervise ──> exit.json
//!      └───────────┴──────────────────────────────────────────────┴──> ShimFailed
//! ```
//!
//! SIGTERM and SIGINT kill the VMM and end the shim by the normal way, record included; SIGHUP means nothing to it.
//! SIGKILL ends the VMM too, through PDEATHSIG, without a record.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::fcntl::Flock;
use serde::Serialize;
use tokio::{
    io::BufReader,
    net::UnixStream,
    process::Child,
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use vm_channel::Service;
use vm_types::{
    ProcessRef, VmId, VmPaths,
    shim::{ExitRecord, GuestEnd, ShimFailed, ShimReply, ShimRequest, ShimSpec, ShimStarted, Told},
};

use crate::{
    activity::{Activity, Sort, Use},
    console::{self, Console},
    error::StartError,
    events, halt, lines,
    link::{self, Session},
    log::{BoundedLog, SharedLog},
    own_dir::{self, Metrics, Pipes},
    prepare, setup,
    sockets::Socket,
    words::Listener,
};

/// Bound of `vmm.log` in bytes, both files together.
const VMM_LOG_BYTES: u64 = 256 * 1024;
/// SSH connections at once. Each takes two descriptors, so all stay well below the usual limit of 1024.
const SSH_LIMIT: usize = 200;
/// Likewise, for the guest's control service.
const CONTROL_LIMIT: usize = 32;
/// Likewise, for each of the other sockets.
const OTHER_LIMIT: usize = 64;
// One stream too many would end the session of all of them; a slot is given back a little before its stream is.
const _: () = assert!(SSH_LIMIT + CONTROL_LIMIT + 16 <= vm_channel::MAX_STREAMS);
/// The longest request line in bytes.
const REQUEST_LIMIT: usize = 4 * 1024;
/// How long each pipe of a VMM that has ended is read, and its event socket, should a child of it hold them open.
const DRAIN: Duration = Duration::from_secs(2);
/// How long clients get to take what was still on its way to them when the VMM ended.
const FAREWELL: Duration = Duration::from_secs(2);

/// Runs a shim to the end of its VMM. The specification's path, like all in it, is absolute.
///
/// To be called on the main thread of a process with no other, before it opens any file: it closes all descriptors but
/// stdin, stdout and stderr. Writes one line to stdout, [`ShimStarted`] or [`ShimFailed`], then lets go of all three.
pub fn main(spec_path: &Path) -> ExitCode {
    match run(spec_path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With nobody left to read this there is nobody to tell.
            let _ = say(&ShimFailed { error: vm_types::report::chain(&error), hint: error.hint() });
            ExitCode::FAILURE
        }
    }
}

fn run(spec_path: &Path) -> Result<(), StartError> {
    prepare::detach()?;
    let spec: ShimSpec = vm_host::files::read_json(spec_path)
        .map_err(|source| StartError::ReadSpec { path: spec_path.to_owned(), source })?
        .ok_or_else(|| StartError::NoSpec { path: spec_path.to_owned() })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| StartError::Detach { what: "set up an event loop", source })?;
    runtime.block_on(async {
        let prepared = Prepared::new(spec, spec_path.to_owned()).await?;
        let running = prepared.start().await?;
        running.supervise().await;
        Ok(())
    })
}

/// Everything but the VMM.
struct Prepared {
    spec: ShimSpec,
    spec_path: PathBuf,
    paths: VmPaths,
    console_log: SharedLog,
    vmm_log: SharedLog,
    sockets: Sockets,
    pipes: Pipes,
    signals: Signals,
    /// Fields are dropped in order: this one after the sockets' files are gone.
    lock: Flock<File>,
}

struct Sockets {
    shim: Socket,
    ssh: Socket,
    control: Socket,
    console: Socket,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// A handler and not SIG_IGN, which the VMM would inherit. Never read.
    _hang_up: Signal,
}

impl Prepared {
    async fn new(spec: ShimSpec, spec_path: PathBuf) -> Result<Self, StartError> {
        let on = |kind| signal(kind).map_err(|source| StartError::Detach { what: "handle signals", source });
        let signals = Signals {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            _hang_up: on(SignalKind::hangup())?,
        };
        let paths = VmPaths { run: spec.run_dir.clone(), state: spec.state_dir.clone() };
        let lock = prepare::lock(&paths.run).await?;
        let record = paths.exit_record();
        vm_host::files::remove_if_there(&record)
            .map_err(|source| StartError::RemoveRecord { path: record, source })?;
        let log = |path: PathBuf, bound| {
            BoundedLog::create(path.clone(), bound)
                .map(SharedLog::new)
                .map_err(|source| StartError::CreateLog { path, source })
        };
        let console_log = log(paths.console_log(), spec.console_log_bytes)?;
        let vmm_log = log(paths.vmm_log(), VMM_LOG_BYTES)?;
        let sockets = Sockets {
            shim: Socket::bind(paths.shim_sock(), None)?,
            ssh: Socket::bind(paths.ssh_sock(), spec.socket_group)?,
            control: Socket::bind(paths.control_sock(), None)?,
            console: Socket::bind(paths.console_sock(), spec.socket_group)?,
        };
        // A VMM that finds a former one's socket may refuse to start; a client could mistake it for the new one.
        let launch = &spec.launch;
        let control = launch.setup.as_ref().map(|setup| setup.socket.as_path());
        for socket in [Some(launch.channel.socket()), launch.events.as_deref(), control].into_iter().flatten()
        {
            vm_host::files::remove_if_there(socket)
                .map_err(|source| StartError::Socket { path: socket.to_owned(), source })?;
        }
        let user = launch.jail.as_ref().map(|jail| jail.user);
        let pipes = launch.own_dir.as_ref().map(|own| own_dir::make(own, user)).transpose()?;
        let pipes = pipes.unwrap_or_default();
        Ok(Self { spec, spec_path, paths, console_log, vmm_log, sockets, pipes, signals, lock })
    }

    async fn start(self) -> Result<Running, StartError> {
        let spawned = prepare::spawn(&self.spec_path, &self.spec.launch);
        let (mut child, vmm) = spawned.inspect_err(|_| prepare::tidy(&self.spec))?;
        let shim = vm_host::process::identify(std::process::id()).ok_or_else(|| StartError::Detach {
            what: "find the shim itself in /proc",
            source: io::ErrorKind::NotFound.into(),
        })?;
        let about = About { vm: self.spec.vm.clone(), shim, vmm, started_at: now() };

        let console = Console::new(child.stdin.take());
        let mut drains = Vec::new();
        let (listener, last_words) = self.spec.launch.last_words.clone().map(Listener::new).unzip();
        if let Some(stdout) = child.stdout.take() {
            let output = Some(console.output());
            drains.push(tokio::spawn(console::drain(stdout, self.console_log, output, listener)));
        }
        if let Some(stderr) = child.stderr.take() {
            drains.push(tokio::spawn(console::drain(stderr, self.vmm_log.clone(), None, None)));
        }
        let (over, metrics) = (CancellationToken::new(), Metrics::default());
        for (what, pipe) in self.pipes {
            let log = self.vmm_log.clone();
            drains.push(match what {
                Told::Log => tokio::spawn(own_dir::read(pipe, over.clone(), move |bytes| log.append(bytes))),
                Told::Metrics => tokio::spawn(own_dir::read(pipe, over.clone(), metrics.taker())),
            });
        }
        let close = || self.spec.launch.own_dir.as_ref().map_or(Ok(()), own_dir::close);
        if let Some(setup) = &self.spec.launch.setup
            && let Err(error) = setup::configure(setup, &mut child, close).await
        {
            // The run directory is another's to use only when this VMM is gone.
            let _ = child.kill().await;
            over.cancel();
            for drain in drains {
                let _ = timeout(DRAIN, drain).await;
            }
            prepare::tidy(&self.spec);
            return Err(error);
        }
        // A starter that is gone already has a successor that will find the sockets.
        let _ = say(&ShimStarted { shim, vmm });
        let _ = prepare::close_standard_streams();
        Ok(Running {
            spec: self.spec,
            paths: self.paths,
            sockets: self.sockets,
            signals: self.signals,
            child,
            about,
            console,
            drains,
            over,
            metrics,
            last_words,
            _lock: self.lock,
        })
    }
}

/// What [`ShimReply::Status`] tells and never changes.
#[derive(Clone)]
struct About {
    vm: VmId,
    shim: ProcessRef,
    vmm: ProcessRef,
    started_at: u64,
}

/// A VMM and all that serves it.
struct Running {
    spec: ShimSpec,
    paths: VmPaths,
    sockets: Sockets,
    signals: Signals,
    child: Child,
    about: About,
    console: Console,
    drains: Vec<JoinHandle<()>>,
    /// That the VMM has ended.
    over: CancellationToken,
    metrics: Metrics,
    /// Of a guest whose VMM tells nothing of its end.
    last_words: Option<watch::Receiver<Option<GuestEnd>>>,
    _lock: Flock<File>,
}

impl Running {
    async fn supervise(mut self) {
        let (session_sender, session) = watch::channel(None);
        let link = tokio::spawn(link::maintain(self.spec.launch.channel.clone(), session_sender));
        let over = self.over;
        let (guest_sender, guest) = watch::channel(None);
        let events = self.spec.launch.events.take().map(|socket| {
            let over = over.clone();
            tokio::spawn(async move { events::listen(&socket, over, guest_sender).await })
        });
        let (kill, mut kills) = mpsc::channel(4);
        let halt = self.last_words.clone().map(|said| {
            let endpoint = self.spec.launch.channel.clone();
            let paused = self.spec.launch.last_words.as_ref().and_then(|words| words.paused.clone());
            tokio::spawn(halt::watch(endpoint, paused, self.about.vmm.pid, said, kill.clone()))
        });
        let tasks = TaskTracker::new();
        let ending = CancellationToken::new();

        let Sockets { shim, ssh, control, console } = &self.sockets;
        let activity = Activity::new(self.about.started_at);
        let requests = Requests {
            about: self.about.clone(),
            session: session.clone(),
            activity: activity.clone(),
            metrics: self.metrics,
            kill,
            ending: ending.clone(),
        };
        let carry = |stream, service| link::carry(stream, service, session.clone(), ending.clone());
        let serving = async {
            tokio::join!(
                shim.serve(OTHER_LIMIT, &tasks, |stream| requests.clone().serve(stream)),
                ssh.serve(SSH_LIMIT, &tasks, |stream| {
                    used(activity.begin(Sort::Ssh), carry(stream, Service::Ssh))
                }),
                control.serve(CONTROL_LIMIT, &tasks, |stream| carry(stream, Service::Control)),
                console.serve(OTHER_LIMIT, &tasks, |stream| {
                    used(activity.begin(Sort::Console), self.console.serve(stream))
                }),
            )
        };
        let ended = watch_over(&mut self.child, &mut kills, &mut self.signals);
        // Dropping the acceptors loses at most connections that the end of the VMM would end anyway.
        let status = tokio::select! {
            _ = serving => None,
            status = ended => status.ok(),
        };

        over.cancel();
        if let Some(halt) = halt {
            halt.abort();
        }
        for mut rest in events.into_iter().chain(self.drains) {
            if timeout(DRAIN, &mut rest).await.is_err() {
                rest.abort();
            }
        }
        let status = status.map_or(vm_types::vm::ExitStatus::Unknown, prepare::exit_status);
        let told = *guest.borrow();
        let record = ExitRecord {
            vmm: self.about.vmm,
            guest: self.last_words.map_or(told, |said| end_by_words(*said.borrow(), &status)),
            status,
            at: now(),
            boot_id: vm_host::process::boot_id().unwrap_or_default(),
        };
        // Without a record (a full disk) the daemon sees an unknown end, which is the truth.
        let _ = vm_host::files::write_json(&self.paths.exit_record(), 0o640, &record);

        prepare::tidy(&self.spec);
        // Clients see the end only when the record can be read.
        drop(self.sockets);
        drop(self.console);
        ending.cancel();
        tasks.close();
        let _ = timeout(FAREWELL, tasks.wait()).await;
        link.abort();
    }
}

/// How a guest ended whose VMM tells nothing of that, by its last words.
fn end_by_words(said: Option<GuestEnd>, status: &vm_types::vm::ExitStatus) -> Option<GuestEnd> {
    match (said, status) {
        // Only a reset ends such a VMM well, and not every one is announced.
        (None, vm_types::vm::ExitStatus::Code(0)) => Some(GuestEnd::Reboot),
        _ => said,
    }
}

/// Waits for the end of the VMM, killing it when asked to.
async fn watch_over(
    child: &mut Child,
    kills: &mut mpsc::Receiver<oneshot::Sender<()>>,
    signals: &mut Signals,
) -> io::Result<std::process::ExitStatus> {
    loop {
        // Cancel-safe: waiting, receiving and signals keep what they have not yet returned.
        let answer = tokio::select! {
            status = child.wait() => return status,
            Some(answer) = kills.recv() => Some(answer),
            Some(()) = signals.terminate.recv() => None,
            Some(()) = signals.interrupt.recv() => None,
        };
        // Fails only where it has ended, which `wait` will tell.
        let _ = child.start_kill();
        if let Some(answer) = answer {
            let _ = answer.send(());
        }
    }
}

/// Serves a connection, which is in use for as long as that takes.
async fn used(in_use: Use, serving: impl Future<Output = ()>) {
    serving.await;
    drop(in_use);
}

/// The service of `shim.sock`.
#[derive(Clone)]
struct Requests {
    about: About,
    session: Session,
    activity: Activity,
    metrics: Metrics,
    kill: mpsc::Sender<oneshot::Sender<()>>,
    ending: CancellationToken,
}

impl Requests {
    async fn serve(self, stream: UnixStream) {
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::with_capacity(512, read);
        loop {
            // A request that the end of the VMM interrupts is seen by its sender to end without a reply.
            let line = tokio::select! {
                line = lines::read_line(&mut read, REQUEST_LIMIT) => line,
                () = self.ending.cancelled() => return,
            };
            let (reply, last) = match line {
                Ok(None) => return,
                Ok(Some(line)) => match serde_json::from_slice(&line) {
                    Ok(request) => (self.answer(request).await, false),
                    Err(error) => (ShimReply::Error { message: error.to_string() }, false),
                },
                Err(error) => (ShimReply::Error { message: error.to_string() }, true),
            };
            if lines::write_json(&mut write, &reply).await.is_err() || last {
                return;
            }
        }
    }

    async fn answer(&self, request: ShimRequest) -> ShimReply {
        match request {
            ShimRequest::Status => {
                let counts = self.activity.counts();
                ShimReply::Status {
                    vm: self.about.vm.clone(),
                    shim: self.about.shim,
                    vmm: self.about.vmm,
                    started_at: self.about.started_at,
                    guest_connected: self.session.borrow().is_some(),
                    ssh_connections: counts.ssh,
                    ssh_idle_since: counts.ssh_idle_since,
                    console_connections: counts.console,
                    idle_since: counts.idle_since,
                    vmm_metrics: self.metrics.last(),
                }
            }
            ShimRequest::Kill => {
                let (done, killed) = oneshot::channel();
                // Nobody to take or answer it means that the VMM has ended by itself.
                if self.kill.send(done).await.is_ok() {
                    tokio::select! {
                        _ = killed => {}
                        () = self.ending.cancelled() => {}
                    }
                }
                ShimReply::Killed
            }
        }
    }
}

fn say<T: Serialize>(line: &T) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&text)?;
    stdout.flush()
}

/// Seconds since the Unix epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
