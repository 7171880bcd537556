//! The long-living agent process: applies the configuration, lets the image's init start, serves the channel.

use std::{
    ffi::OsString,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use nix::sys::{
    resource::{Resource, setrlimit},
    signal::SigSet,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use vm_channel::Service;
use vm_types::guest::config::GuestConfig;

use crate::{
    apply, boot, console, control, init,
    link::{Arguments, HOME, Message},
    port::{self, Carrier, Port},
    ssh, vsock,
};

/// Name of the process. systemd spares processes whose name begins with `@` at shutdown
/// (<https://systemd.io/ROOT_STORAGE_DAEMONS/>).
pub(crate) const ARGV0: &str = "@vm-agent";

/// How far this agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// Under way.
    Starting,
    /// All applied, SSH served.
    Ready,
    /// The boot went wrong.
    Failed { code: String, message: String },
}

/// Who PID 1 is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Init {
    /// The agent's own.
    Own,
    /// The agent's own, which is about to become the image's.
    Awaited(PathBuf),
    /// The image's.
    Image(PathBuf),
}

/// What all connections share.
pub(crate) struct Shared {
    /// SSH settings; replaced whole by a new configuration. `None` before the first.
    pub ssh: RwLock<Option<Arc<ssh::Settings>>>,
    /// How far.
    pub state: watch::Sender<State>,
    /// What went wrong without stopping anything.
    pub warnings: Mutex<Vec<String>>,
    /// Who PID 1 is.
    pub init: watch::Sender<Init>,
    /// To PID 1.
    pub pid1: OwnedFd,
    /// One configuration at a time.
    pub applying: tokio::sync::Mutex<()>,
    /// One growth at a time; ext4 refuses a second.
    pub growing: tokio::sync::Mutex<()>,
}

impl Shared {
    /// Records a warning for whoever asks for readiness.
    pub(crate) fn warn(&self, warning: String) {
        console::note(&warning);
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(warning);
    }

    /// [`boot::grow`] of the root, one after the other.
    pub(crate) async fn grow(&self, serial: String, at_least: u64) -> io::Result<u64> {
        let _one = self.growing.lock().await;
        tokio::task::spawn_blocking(move || boot::grow(&serial, at_least)).await?
    }

    /// Applies a configuration; the warnings are its own only.
    pub(crate) async fn apply(&self, config: &GuestConfig) -> Vec<String> {
        let _one = self.applying.lock().await;
        let systemd = match &*self.init.borrow() {
            Init::Awaited(path) if init::family(path) == init::Family::Systemd => apply::Systemd::Coming,
            Init::Image(path) if init::family(path) == init::Family::Systemd => apply::Systemd::Running,
            _ => apply::Systemd::None,
        };
        let mut warnings = apply::apply(config, systemd).await;
        match ssh::Settings::new(&config.ssh, &config.environment) {
            Ok(settings) => {
                warnings.extend(settings.warnings.iter().cloned());
                *self.ssh.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(settings));
            }
            Err(error) => warnings.push(vm_types::report::chain(&error)),
        }
        warnings
    }
}

pub(crate) fn main(arguments: &[OsString]) -> ExitCode {
    let arguments = Arguments::decode(arguments);
    // PID 1 blocks signals to collect them; commands would inherit that.
    let _ = SigSet::all().thread_unblock();
    let _ = nix::unistd::setsid();
    let _ = nix::sys::prctl::set_name(c"vm-agent");
    // Commands inherit these: the kernel's own limit of 1024 open files fails many a build.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 65_536, 1 << 20);
    // The last to go when memory runs out; commands set it back.
    let _ = fs::write("/proc/self/oom_score_adj", "-999");
    let Ok(pid1) = std::io::stdin().as_fd().try_clone_to_owned() else { return ExitCode::FAILURE };
    if let Ok(null) = fs::File::open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(&null);
    }
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run(arguments, pid1)),
        Err(error) => console::error(format_args!("the agent cannot start: {error}")),
    }
    ExitCode::FAILURE
}

async fn run(arguments: Arguments, pid1: OwnedFd) {
    // Handled, not ignored: that would be inherited by commands.
    for kind in [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()] {
        if let Ok(mut signals) = signal(kind) {
            tokio::spawn(async move { while signals.recv().await.is_some() {} });
        }
    }
    let shared = Arc::new(Shared {
        ssh: RwLock::new(None),
        state: watch::Sender::new(State::Starting),
        warnings: Mutex::new(arguments.warnings.clone()),
        init: watch::Sender::new(arguments.image_init.clone().map_or(Init::Own, Init::Awaited)),
        pid1,
        applying: tokio::sync::Mutex::new(()),
        growing: tokio::sync::Mutex::new(()),
    });
    tokio::spawn(Box::pin(prepare(Arc::clone(&shared), arguments)));
    serve(&shared).await;
}

/// From the configuration in the initramfs to readiness.
async fn prepare(shared: Arc<Shared>, arguments: Arguments) {
    if let Some((code, message)) = arguments.failure {
        shared.state.send_replace(State::Failed { code, message });
        return;
    }
    match boot::read_config(Path::new(HOME)) {
        Ok(config) => {
            if config.root.grow {
                let serial = config.root.serial.clone();
                let shared = Arc::clone(&shared);
                // Beside all else: a large step takes the kernel seconds.
                tokio::spawn(async move {
                    if let Err(error) = shared.grow(serial, 0).await {
                        shared.warn(format!("cannot grow the root filesystem: {error}"));
                    }
                });
            }
            for warning in shared.apply(&config).await {
                shared.warn(warning);
            }
            if !arguments.again {
                for warning in apply::run_boot_commands(&config).await {
                    shared.warn(warning);
                }
            }
            shared.state.send_replace(State::Ready);
        }
        Err(error) => {
            let message = vm_types::report::chain(&error);
            console::error(&message);
            shared.state.send_replace(State::Failed { code: error.code().into(), message });
        }
    }
    let _ = Message::Go.send(&shared.pid1);
    let awaited = match &*shared.init.borrow() {
        Init::Awaited(path) => path.clone(),
        Init::Own | Init::Image(_) => return,
    };
    let known = tokio::task::spawn_blocking(move || {
        let init = match hand_over(&shared.pid1) {
            None => Init::Image(awaited),
            Some(why) => {
                shared.warn(format!("cannot run {}: {why}; the VM goes on without", awaited.display()));
                Init::Own
            }
        };
        shared.init.send_replace(init);
    });
    let _ = known.await;
}

/// Waits until PID 1 has become the image's init, by which it loses its end of the socket, or says why it has not.
fn hand_over(pid1: &OwnedFd) -> Option<String> {
    let mut buffer = [0; 4096];
    loop {
        match nix::unistd::read(pid1, &mut buffer) {
            Err(nix::errno::Errno::EINTR) => {}
            Ok(length @ 1..) => {
                if let Some(Message::Stay(why)) = Message::decode(&String::from_utf8_lossy(&buffer[..length]))
                {
                    return Some(why);
                }
            }
            _ => return None,
        }
    }
}

/// Serves the channel for ever, on whatever carries it in this machine.
async fn serve(shared: &Arc<Shared>) {
    loop {
        let error = match port::carrier() {
            Some(Carrier::VirtioSerial) => match Port::open().await {
                Ok(port) => serve_port(shared, port).await,
                Err(error) => error,
            },
            Some(Carrier::Vsock) => {
                let session = |stream| {
                    let shared = Arc::clone(shared);
                    async move { ended(serve_session(&shared, stream).await) }
                };
                match vsock::serve(session).await {
                    Ok(()) => continue,
                    Err(error) => error,
                }
            }
            None => io::Error::new(io::ErrorKind::NotFound, "neither a virtio-serial nor a vsock device"),
        };
        console::error(format_args!(
            "no guest channel: {error}; attach its device, and pack the kernel's virtio_console or \
             vmw_vsock_virtio_transport module"
        ));
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
}

/// Serves one session of the port after the other, for ever.
async fn serve_port(shared: &Arc<Shared>, mut port: Port) -> ! {
    loop {
        let session = match port.session().await {
            Ok(session) => serve_session(shared, session).await,
            Err(error) => Err(error),
        };
        let failed = session.is_err();
        ended(session);
        if failed {
            // A port that fails at once must not take the processor.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn serve_session(
    shared: &Arc<Shared>,
    carrier: impl AsyncRead + AsyncWrite + Unpin + Send,
) -> io::Result<()> {
    vm_channel::serve_guest(carrier, |service, stream| {
        let shared = Arc::clone(shared);
        match service {
            Service::Control => drop(tokio::spawn(control::serve(shared, stream))),
            Service::Ssh => drop(tokio::spawn(Box::pin(ssh::serve(shared, stream)))),
        }
    })
    .await
}

fn ended(session: io::Result<()>) {
    if let Err(error) = session {
        console::note(format_args!("channel session: {error}"));
    }
}
