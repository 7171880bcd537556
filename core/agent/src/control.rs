//! The control service of the guest channel: [`Request`] and [`Reply`] lines.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use vm_types::guest::{
    config,
    control::{ENDED_NAMES, InitKind, Phase, Reply, Request, ShutdownKind, code},
};

use crate::{
    agent::{Init, Shared, State},
    boot, init,
    link::{HOME, Message},
    machine, ssh,
};

/// How long the host may take to close the stream behind the last reply.
const ACKNOWLEDGED: Duration = Duration::from_millis(50);

/// Answers requests until the stream ends.
pub(crate) async fn serve(shared: Arc<Shared>, stream: impl AsyncRead + AsyncWrite + Unpin) {
    let (read, mut write) = tokio::io::split(stream);
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let (reply, then) = match serde_json::from_str(&line) {
            Ok(request) => answer(&shared, request).await,
            Err(error) => (failed(code::REQUEST, format!("not a request: {error}")), None),
        };
        let Ok(mut text) = serde_json::to_vec(&reply) else { return };
        text.push(b'\n');
        if write.write_all(&text).await.is_err() || write.flush().await.is_err() {
            return;
        }
        if let Some((kind, grace_ms)) = then {
            // The reply has arrived when the host closes its side in turn; one that does not is not waited for.
            let _ = write.shutdown().await;
            let _ = tokio::time::timeout(ACKNOWLEDGED, lines.next_line()).await;
            if let Err(message) = shut_down(&shared, kind, grace_ms).await {
                crate::console::error(format_args!("shutdown: {message}"));
            }
            return;
        }
    }
}

async fn answer(shared: &Shared, request: Request) -> (Reply, Option<(ShutdownKind, u64)>) {
    let reply = match request {
        Request::Hello => Reply::Hello {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            config_version: config::VERSION,
            kernel_release: nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            init: match &*shared.init.borrow() {
                Init::Own => InitKind::Agent,
                Init::Awaited(path) | Init::Image(path) => InitKind::Image(path.display().to_string()),
            },
        },
        Request::WaitReady { phase } => wait_ready(shared, phase).await,
        Request::Apply { config } if config.version > config::VERSION => failed(
            "config.version",
            format!(
                "the configuration has version {}, this agent knows up to {}",
                config.version,
                config::VERSION
            ),
        ),
        Request::Apply { config } => match settled(shared).await {
            State::Failed { code, message } => failed(&code, message),
            _ => Reply::Applied { warnings: shared.apply(&config).await },
        },
        Request::Shutdown { kind, grace_ms } => return (Reply::ShuttingDown, Some((kind, grace_ms))),
        Request::Sync => {
            let _ = tokio::task::spawn_blocking(nix::unistd::sync).await;
            Reply::Done
        }
        Request::GrowRoot { drive_bytes } => match settled(shared).await {
            State::Failed { code, message } => failed(&code, message),
            _ => grow_root(shared, drive_bytes).await,
        },
        Request::EndProcesses { grace_ms } => match settled(shared).await {
            State::Failed { code, message } => failed(&code, message),
            _ => end_processes(shared, Duration::from_millis(grace_ms)).await,
        },
    };
    (reply, None)
}

async fn grow_root(shared: &Shared, drive_bytes: u64) -> Reply {
    let serial = match boot::read_config(Path::new(HOME)) {
        Ok(config) => config.root.serial,
        Err(error) => return failed(error.code(), vm_types::report::chain(&error)),
    };
    match shared.grow(serial, drive_bytes).await {
        Ok(bytes) => Reply::Grown { bytes },
        Err(error) => failed("root.grow", format!("cannot grow the root filesystem: {error}")),
    }
}

async fn end_processes(shared: &Shared, grace: Duration) -> Reply {
    if let Init::Awaited(path) | Init::Image(path) = &*shared.init.borrow() {
        let message = format!("{} is init here, and starts again what is ended", path.display());
        return failed(code::PROCESSES_INIT, message);
    }
    match tokio::task::spawn_blocking(move || machine::end_processes(grace)).await {
        Ok(Ok(ended)) => Reply::ProcessesEnded {
            count: ended.count,
            names: ended.names.into_iter().take(ENDED_NAMES).collect(),
        },
        Ok(Err(left)) => failed(code::PROCESSES_STAY, format!("cannot end the guest's processes {left}")),
        Err(panic) => failed(code::PROCESSES_STAY, panic.to_string()),
    }
}

fn failed(code: &str, message: String) -> Reply {
    Reply::Error { code: code.into(), message }
}

/// The state once it is no longer [`State::Starting`].
pub(crate) async fn settled(shared: &Shared) -> State {
    let mut state = shared.state.subscribe();
    match state.wait_for(|state| *state != State::Starting).await {
        Ok(state) => state.clone(),
        Err(_) => State::Starting,
    }
}

async fn wait_ready(shared: &Shared, phase: Phase) -> Reply {
    if let State::Failed { code, message } = settled(shared).await {
        return failed(&code, message);
    }
    if phase == Phase::Init
        && let Some(path) = image_init(shared).await
    {
        init::started(&path).await;
    }
    let warnings = shared.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Reply::Ready { phase, warnings }
}

/// The image's init once it is PID 1.
async fn image_init(shared: &Shared) -> Option<PathBuf> {
    let mut init = shared.init.subscribe();
    match init.wait_for(|init| !matches!(init, Init::Awaited(_))).await {
        Ok(init) => match &*init {
            Init::Image(path) => Some(path.clone()),
            Init::Own | Init::Awaited(_) => None,
        },
        Err(_) => None,
    }
}

async fn shut_down(shared: &Shared, kind: ShutdownKind, grace_ms: u64) -> Result<(), String> {
    let grace = Duration::from_millis(grace_ms);
    // A filesystem that is growing cannot be made read-only, and the kernel ends that for no signal.
    let _ = tokio::time::timeout(grace, shared.growing.lock()).await;
    if let Some(path) = image_init(shared).await {
        ssh::groups::end_all(grace / 2).await;
        let Err(message) = init::shut_down(&path, kind).await else { return Ok(()) };
        crate::console::note(format_args!("{message}; doing it without"));
        let own = nix::unistd::Pid::this();
        let _ = tokio::task::spawn_blocking(move || machine::take_down(kind, grace, Some(own))).await;
        return Err(message);
    }
    Message::Shutdown { kind, grace_ms }.send(&shared.pid1).map_err(|error| format!("to PID 1: {error}"))
}
